"""Saving beside training: what fails is told and costs nothing else; what is kept; checkpoints in an object store."""

import argparse
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moto.server import ThreadedMotoServer
from process_group import limit_files, run_ranks
from small_runs import checkpoint_tensors, config_of, differing, final_tensors, lines, losses, train_on_ranks

from ultrarec.trainer import checkpoint_command, pieces
from ultrarec.trainer import saver as saver_module
from ultrarec.trainer.__main__ import main
from ultrarec.trainer.config import CheckpointConfig
from ultrarec.trainer.manifest import all_checkpoints, checkpoint_folder, complete_checkpoints, step_of
from ultrarec.trainer.parallel import World
from ultrarec.trainer.pieces import Piece
from ultrarec.trainer.retention import kept_steps
from ultrarec.trainer.saver import Saver
from ultrarec.trainer.state import TrainState
from ultrarec.trainer.storage import location, put


def train_here(config, out: Path, recipe: Path) -> int:
    """What `ultrarec train` does in one process."""
    recipe.write_text(config.to_toml())
    return main([str(recipe), "--out", str(out)])


def command_line():
    """`ultrarec checkpoint`."""
    parser = argparse.ArgumentParser()
    checkpoint_command.add_arguments(parser)
    return lambda *words: checkpoint_command.run(parser.parse_args([str(word) for word in words]))


def saved_steps(home) -> list[int]:
    return [step_of(folder) or 0 for folder in complete_checkpoints(home)]


def train_with_little_room(runs, full_from, full_to):
    """Trains, while rank 1 cannot write files of more than 100 kB for some of the steps."""
    from ultrarec.trainer import loop

    record = loop.record

    def record_and_fill(run, step):
        record(run, step)
        is_full = dist.get_rank() == 1 and full_from <= run.state.step < full_to
        run.saver.wait()
        limit_files(100_000 if is_full else resource.RLIM_INFINITY)

    loop.record = record_and_fill
    train_on_ranks(runs)


def test_when_the_disk_of_one_rank_is_full_training_goes_on_and_its_last_checkpoint_stands(trained, dataset, tmp_path):
    settings = ("checkpoint.every=5", "checkpoint.keep_last=1", "trainer.log_every=1")
    config, out = config_of(dataset, "columns", *settings), tmp_path / "out"
    run_ranks(train_with_little_room, [(config, out)], 10, 19, world_size=2)
    # Steps 10 and 15 found no room; in between, 5 was the newest and was not deleted.
    assert [line.get("failed_saves") for line in lines(out)][-1] == 2
    assert saved_steps(out) == [24]
    assert losses(out) == losses(trained(2)["columns"])
    assert not differing(final_tensors(out), final_tensors(trained(2)["columns"]))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_says_what_to_do(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    folder = checkpoint_folder(out, 4)
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder")
    config = config_of(dataset, "ranking", "checkpoint.every=2", "trainer.max_steps=4")
    assert train_here(config, out, tmp_path / "recipe.toml") == 2
    told = capsys.readouterr().err
    assert f"CHECKPOINT OF STEP 4 NOT WRITTEN to {folder}: rank 0: Not a directory; training goes on" in told
    assert f"error: the last step's checkpoint could not be written to {out}: rank 0: Not a directory" in told
    assert saved_steps(out) == [2]
    folder.unlink()
    assert train_here(config, out, tmp_path / "recipe.toml") == 0
    assert saved_steps(out) == [2, 4]


def test_a_synchronous_save_is_the_same_as_an_asynchronous_one(trained, dataset, tmp_path):
    settings = ("checkpoint.every=5", "checkpoint.asynchronous=false")
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *settings), tmp_path / "out")], world_size=2)
    for found, expected in zip(
        complete_checkpoints(tmp_path / "out"), complete_checkpoints(trained(2)["ranking"]), strict=True
    ):
        for name in ("rank-00000.safetensors", "rank-00001.safetensors", "index.json"):
            assert (found / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, [60]),
        ({"keep_last": 2}, [50, 60]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep_last": 1, "keep_best": 1}, [30, 60]),
        ({"keep_last": 1, "keep_best": 2, "keep_every": 50}, [30, 40, 50, 60]),
    ],
)
def test_each_setting_keeps_its_own_checkpoints_and_no_others(settings, kept):
    scores = {10: 0.1, 20: 0.3, 25: 0.9, 30: 0.4, 40: 0.4 - 1e-9, 60: 0.2}
    steps = [10, 20, 30, 40, 50, 60]
    assert sorted(kept_steps(steps, CheckpointConfig(**settings), scores=scores)) == kept


@pytest.mark.parametrize(("metric", "best"), [("loss", min), ("auc/is_click", max), (None, min)])
def test_the_best_checkpoint_is_kept_however_old(dataset, tmp_path, metric, best):
    out = tmp_path / "out"
    settings = ["checkpoint.every=2", "trainer.evaluate_every=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    settings += [f"checkpoint.best_metric={metric}"] if metric else []
    settings += ["trainer.max_steps=8", "optimizer.lr=0.1"]
    assert train_here(config_of(dataset, "ranking", *settings), out, tmp_path / "recipe.toml") == 0

    def value(line):
        return line[metric] if metric else line["ne/is_click"] + line["ne/long_view"]

    expected = best(lines(out, "validation"), key=value)["step"]
    assert saved_steps(out) == sorted({expected, 8})
    assert all_checkpoints(out) == complete_checkpoints(out)


@pytest.fixture(scope="module")
def object_store():
    """An S3 server on this machine, and the options by which pyarrow reaches it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    options = f"endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&region=us-east-1&allow_bucket_creation=true"
    yield server, lambda path: f"s3://key:secret@{path}?{options}"
    server.stop()


def test_a_run_saves_to_an_object_store_and_continues_from_it(trained, dataset, tmp_path, object_store, capsys):
    _, address = object_store
    home = location(address("bucket/run"))
    home.filesystem.create_dir("bucket")
    settings = ("checkpoint.every=5", "checkpoint.keep_last=2", f"checkpoint.path={address('bucket/run')}")
    out, recipe = tmp_path / "out", tmp_path / "recipe.toml"
    assert train_here(config_of(dataset, "ranking", *settings, "trainer.max_steps=12"), out, recipe) == 0
    assert saved_steps(home) == [10, 12]
    assert all_checkpoints(home) == complete_checkpoints(home)
    assert not (out / "checkpoints").exists()
    assert train_here(config_of(dataset, "ranking", *settings), out, recipe) == 0
    assert saved_steps(home) == [20, 24]
    assert "continuing from s3://bucket/run/checkpoints/step-00000012" in capsys.readouterr().err
    assert lines(out) == lines(trained(1)["ranking"])
    assert not differing(final_tensors(home), final_tensors(trained(1)["ranking"]))


def test_an_object_store_that_cannot_be_reached_is_told(dataset, tmp_path, capsys):
    path = "s3://key:secret@bucket/run?endpoint_override=http%3A%2F%2F127.0.0.1%3A9&region=us-east-1"
    config = config_of(dataset, "ranking", f"checkpoint.path={path}")
    assert train_here(config, tmp_path / "out", tmp_path / "recipe.toml") == 2
    told = capsys.readouterr().err
    assert "error: cannot look for checkpoints in s3://bucket/run: " in told
    assert "secret" not in told


def test_commands_read_an_object_store_as_they_read_a_folder(trained, dataset, tmp_path, object_store, capsys):
    _, address = object_store
    home = location(address("shelf/run"))
    home.filesystem.create_dir("shelf")
    source = trained(2)["ranking"]
    for folder in complete_checkpoints(source)[-2:]:
        for path in folder.iterdir():
            put(home / "checkpoints" / folder.name / path.name, path.read_bytes())
    command = command_line()
    assert command("verify", address("shelf/run")) == 0
    assert command("list", address("shelf/run")) == 0
    printed = capsys.readouterr().out
    assert printed.count("s3://shelf/run/checkpoints/step-000000") == 4
    assert command("diff", address("shelf/run"), source) == 0
    assert command("export", address("shelf/run"), "--out", tmp_path / "export", "--dataset", dataset) == 0
    (home / "checkpoints" / "step-00000024" / "rank-00001.safetensors").unlink()
    assert command("verify", address("shelf/run")) == 1
    assert "rank-00001.safetensors is missing" in capsys.readouterr().out


def save_onto_slow_storage(home: Path):
    """Rank 1's storage hangs; what the saves of two steps return, take and say."""
    released = threading.Event()
    write = pieces.Image.write
    rank = dist.get_rank()

    def slow(image, folder):
        if rank == 1:
            released.wait()
        return write(image, folder)

    pieces.Image.write = slow
    saver_module.PATIENCE_SECONDS = 0.2
    said: list[str] = []
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    saver = Saver(CheckpointConfig(), home, world, config_hash="", dataset="", say=said.append)
    values, seconds = torch.zeros(10), []
    for step in (1, 2):
        values.fill_(step)
        started = time.monotonic()
        saver.save([Piece.whole(f"rank/{rank}/values", values)], TrainState(step=step), sync=[])
        seconds.append(time.monotonic() - started)
    values.fill_(99)
    dist.barrier()
    unfinished = complete_checkpoints(home)
    dist.barrier()
    released.set()
    error = saver.wait()
    saver.close()
    return seconds, said, unfinished, error, saver.failures


def test_a_step_waits_for_no_storage_and_a_save_that_is_overtaken_is_left_out(tmp_path):
    for seconds, said, unfinished, error, failures in run_ranks(save_onto_slow_storage, tmp_path, world_size=2):
        assert max(seconds) < 10
        (told,) = said
        assert told.startswith("checkpoint of step 2 left out: that of step 1 is still being written to ")
        assert (unfinished, error, failures) == ([], None, 1)
    (folder,) = complete_checkpoints(tmp_path)
    assert step_of(folder) == 1
    for values in checkpoint_tensors(folder).values():
        assert torch.equal(values, torch.ones(10)), "the state of the step that was saved"
