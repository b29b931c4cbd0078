"""A run folder has one job at a time."""

import fcntl
import os
import subprocess
import threading
import time

import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from small_runs import config_of, lines

from ultrarec.data.errors import UserError
from ultrarec.data.locks import is_locked, open_lock
from ultrarec.trainer import lock
from ultrarec.trainer.__main__ import main
from ultrarec.trainer.parallel import World


@pytest.fixture
def job(dataset, tmp_path):
    """A run of one step, its folder, and a descriptor by which another job holds that."""
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(config_of(dataset, "ranking", "trainer.max_steps=1").to_toml())
    out.mkdir()
    held = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    return [str(recipe), "--out", str(out)], out, held


def test_a_second_job_in_a_run_folder_is_refused_and_changes_nothing(job, monkeypatch, capsys):
    command, out, held = job
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    assert main(command) == 2
    assert (
        f"error: another job trains in {out}, and has for more than 0.3 s; wait for its end" in capsys.readouterr().err
    )
    assert list(out.iterdir()) == [out / ".lock"]
    os.close(held)


def test_a_job_waits_for_the_end_of_the_one_before_and_leaves_the_folder_free(job, monkeypatch, capsys):
    command, out, held = job
    monkeypatch.setattr(lock, "TELL_SECONDS", 0.2)
    threading.Timer(1.0, os.close, (held,)).start()
    assert main(command) == 0
    assert f"another job trains in {out}: waiting up to 60 s for its end\n" in capsys.readouterr().err
    assert [line["step"] for line in lines(out)] == [1]
    after = os.open(out / ".lock", os.O_RDWR)
    fcntl.flock(after, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(after)


def test_a_job_gives_up_before_its_other_ranks_have_waited_for_their_time_limit(job, capsys):
    command, out, held = job
    began = time.monotonic()
    assert main([*command, "--set", "trainer.timeout_seconds=1"]) == 2
    assert time.monotonic() - began < 30
    assert f"another job trains in {out}, and has for more than 0.5 s" in capsys.readouterr().err
    os.close(held)


def test_a_folder_without_room_for_one_more_file_is_locked_all_the_same(tmp_path):
    options = ["-t", "tmpfs", "-o", "size=64k,nr_inodes=1", "tmpfs", tmp_path]
    if subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("may not mount a file system here")
    first, second = open_lock(tmp_path), open_lock(tmp_path)
    try:
        assert list(tmp_path.iterdir()) == []
        assert is_locked(first)
        assert not is_locked(second)
    finally:
        os.close(first)
        os.close(second)
        subprocess.run(["umount", tmp_path], check=True)


def test_two_runs_do_not_share_a_folder_of_checkpoints(dataset, tmp_path, monkeypatch, capsys):
    recipe, home = tmp_path / "recipe.toml", tmp_path / "shared"
    recipe.write_text(config_of(dataset, "ranking", "trainer.max_steps=1", f"checkpoint.path={home}").to_toml())
    home.mkdir()
    held = open_lock(home)
    assert is_locked(held)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    assert main([str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert f"error: another job trains in {home}, and has for more than" in capsys.readouterr().err
    assert not (home / "checkpoints").exists()
    os.close(held)
    assert main([str(recipe), "--out", str(tmp_path / "out")]) == 0
    assert (home / "checkpoints" / "step-00000001").is_dir()


def enter(root):
    """What ranks are told that have folders of their own; one that they share lets them in."""
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
    with (
        pytest.raises(UserError) as refused,
        lock.alone_in(root / f"node-{world.rank}", world, given_as="--out", timeout_seconds=10),
    ):
        pass
    with lock.alone_in(root / "run", world, given_as="--out", timeout_seconds=10):
        return str(refused.value)


def test_a_folder_that_not_all_ranks_share_is_refused_before_training_and_nothing_stays_there(tmp_path):
    for rank, told in enumerate(run_ranks(enter, tmp_path, world_size=2)):
        assert told.startswith(f"rank(s) 1 do not see what rank 0 writes to {tmp_path / f'node-{rank}'}, ")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}
