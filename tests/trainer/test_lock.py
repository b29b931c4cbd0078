"""A run folder has one job at a time."""

import fcntl
import os
import threading

import pytest
from small_runs import config_of, lines

from ultrarec.trainer import lock
from ultrarec.trainer.__main__ import main


@pytest.fixture
def job(dataset, tmp_path):
    """A run of one step, its folder, and a descriptor by which another job holds that."""
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(config_of(dataset, "ranking", "trainer.max_steps=1").to_toml())
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    return [str(recipe), "--out", str(out)], out, held


def test_a_second_job_in_a_run_folder_is_refused_and_changes_nothing(job, monkeypatch, capsys):
    command, out, held = job
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    assert main(command) == 2
    assert (
        f"error: another job trains in {out}, and has for more than 0.3 s; wait for its end" in capsys.readouterr().err
    )
    assert list(out.iterdir()) == []
    os.close(held)


def test_a_job_waits_for_the_end_of_the_one_before_and_leaves_the_folder_free(job):
    command, out, held = job
    threading.Timer(1.0, os.close, (held,)).start()
    assert main(command) == 0
    assert [line["step"] for line in lines(out)] == [1]
    after = os.open(out, os.O_RDONLY)
    fcntl.flock(after, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(after)
