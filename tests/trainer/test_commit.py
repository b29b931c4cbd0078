"""What ranks learn of a save when word of it does not get through."""

import time

import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks

from ultrarec.trainer import commit
from ultrarec.trainer.config import CheckpointConfig
from ultrarec.trainer.manifest import checkpoint_folder, complete_checkpoints, step_of
from ultrarec.trainer.parallel import World
from ultrarec.trainer.pieces import Piece
from ultrarec.trainer.saver import Saver
from ultrarec.trainer.state import TrainState


def save_without_word(home, mute, name):
    """Three saves, of which one rank can tell or hear nothing under a name in the first; what they return and take."""
    rank, said = dist.get_rank(), []
    tell, hear = commit.Board.tell, commit.Board.hear

    def cut_off(board, save, told, *value):
        if (rank, save, told) == (mute, 1, name):
            raise RuntimeError("Broken pipe")
        return (tell if value else hear)(board, save, told, *value)

    commit.Board.tell = commit.Board.hear = cut_off
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    saver = Saver(CheckpointConfig(keep_last=9), home, world, config_hash="", dataset="", say=said.append)
    errors, seconds = [], []
    for step in (1, 2, 3):
        started = time.monotonic()
        saver.save([Piece.whole(f"rank/{rank}/values", torch.full((10,), step))], TrainState(step=step), sync=[])
        errors.append(saver.wait())
        seconds.append(time.monotonic() - started)
    saver.close()
    return errors, max(seconds), said


def test_a_rank_that_can_leave_no_word_fails_that_save_on_all_ranks_and_no_other(tmp_path):
    for home, mute, name in (("part", 1, "rank/1"), ("ready", 0, "ready")):
        results = run_ranks(save_without_word, tmp_path / home, mute, name, world_size=2)
        for rank, (errors, slowest, said) in enumerate(results):
            assert errors[1:] == [None, None]
            assert slowest < 30
            assert len(said) == 1
            if rank == mute:
                assert errors[0] == f"rank {mute}: Broken pipe"
            else:
                assert errors[0].startswith("a rank cannot reach the process group's store, and could not answer (")
        assert [step_of(folder) for folder in complete_checkpoints(tmp_path / home)] == [2, 3]


@pytest.mark.parametrize("mute", [0, 1])
def test_a_save_whose_manifest_stands_is_complete_for_all_although_one_rank_does_not_learn_it(tmp_path, mute):
    results = run_ranks(save_without_word, tmp_path, mute, "outcome", world_size=2)
    assert [errors for errors, _, _ in results] == [[None, None, None]] * 2
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == [1, 2, 3]


def save_on_nodes_of_their_own(root):
    """A save of two ranks to folders that they do not share, though both are there; why it failed."""
    rank = dist.get_rank()
    home = root / str(rank)
    checkpoint_folder(root / "1", 1).mkdir(parents=True, exist_ok=True)
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    saver = Saver(CheckpointConfig(), home, world, config_hash="", dataset="", say=lambda text: None)
    saver.save([Piece.whole(f"rank/{rank}/values", torch.ones(10))], TrainState(step=1), sync=[])
    error = saver.wait()
    saver.close()
    return error, saver.is_lasting


def test_no_manifest_stands_beside_files_that_are_elsewhere(tmp_path):
    for error, is_lasting in run_ranks(save_on_nodes_of_their_own, tmp_path, world_size=2):
        assert error == (
            f"rank 0 does not find what the ranks wrote to {checkpoint_folder(tmp_path / '0', 1)}: "
            "rank-00001.safetensors is missing; it must be a folder that all nodes share"
        )
        assert is_lasting
    assert complete_checkpoints(tmp_path / "0") == []
