"""Preemption, lost ranks and hanging steps, with real signals to real processes under the real torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from process_group import run_ranks
from small_runs import audited_steps, config_of, differing, final_tensors, lines, train_on_ranks

from ultrarec.trainer import signals
from ultrarec.trainer.manifest import complete_checkpoints, step_of
from ultrarec.trainer.signals import SAME_REQUEST_SECONDS

SETTINGS = ("trainer.epochs=40", "model.dropout=0.3", "checkpoint.every=5", "checkpoint.keep_last=2")
SHORT = ("model.dropout=0.3", "checkpoint.every=5")
PATIENCE_SECONDS = 150


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield process
    finally:
        for pid in family(process.pid) if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()


def torchrun(*arguments: str, recipe: Path, out: Path) -> list[str]:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return [*command, "-m", "ultrarec.trainer", str(recipe), "--out", str(out)]


def family(pid: int) -> list[int]:
    """A process and everything below it, itself first."""
    pids = [pid]
    for each in pids:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            pids += [int(child) for child in children.read_text().split()]
    return pids


def rank_pid(launcher: int, rank: int) -> int:
    """Which process below torchrun is a rank."""
    for pid in family(launcher)[1:]:
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank}")


def is_running(pid: int) -> bool:
    """Whether a process is there, and not one that has ended and that nobody has asked about."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)


def write_recipe(dataset: Path, folder: Path, *settings: str) -> Path:
    recipe = folder / "recipe.toml"
    recipe.write_text(config_of(dataset, "ranking", *settings).to_toml())
    return recipe


def steps(out: Path) -> list[int]:
    return [line["step"] for line in lines(out)] if (out / "metrics.jsonl").exists() else []


def test_one_process_finishes_its_step_saves_and_ends_with_the_code_of_the_signal(dataset, tmp_path):
    signum = signal.SIGINT
    recipe, out, log = write_recipe(dataset, tmp_path, *SETTINGS), tmp_path / "out", tmp_path / "log.txt"
    with started(["ultrarec.trainer", str(recipe), "--out", str(out)], log) as process:
        wait_until(lambda: bool(complete_checkpoints(out)), process, log)
        process.send_signal(signum)
        assert process.wait(PATIENCE_SECONDS) == 128 + signum
    last = steps(out)[-1]
    assert step_of(complete_checkpoints(out)[-1]) == last
    said = f"stopped by {signum.name} after step {last}, which is saved; the same command continues the run"
    assert said in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_second_signal_ends_a_process_at_once_even_one_that_hangs():
    """The main thread never returns to Python: it sleeps in C, as in a collective whose other ranks are gone."""
    script = (
        "import ctypes, threading, time\n"
        "from ultrarec.trainer import signals\n"
        "def tell(request):\n"
        "    while not request.signum: time.sleep(0.01)\n"
        "    print('noted', flush=True)\n"
        "with signals.requests_to_stop() as request:\n"
        "    threading.Thread(target=tell, args=[request], daemon=True).start()\n"
        "    print('ready', flush=True)\n"
        "    while True: ctypes.CDLL(None).poll(None, 0, 1000000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noted\n"
        time.sleep(SAME_REQUEST_SECONDS + 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # The sleep in C would last a quarter of an hour.
        assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGINT


@pytest.mark.parametrize(("seconds", "ends"), [(SAME_REQUEST_SECONDS - 0.1, False), (SAME_REQUEST_SECONDS + 0.1, True)])
def test_signals_that_come_together_are_one_request(monkeypatch, seconds, ends):
    ended, now = [], [7.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(signals, "os", SimpleNamespace(_exit=ended.append))
    request = signals.StopRequest()
    request.note(signal.SIGTERM)
    now[0] += seconds
    request.note(signal.SIGINT)
    assert request.signum == signal.SIGTERM
    assert ended == ([128 + signal.SIGINT] if ends else [])


def test_torchrun_hands_a_signal_to_all_ranks_which_save_the_same_step(dataset, tmp_path):
    recipe, out, log = write_recipe(dataset, tmp_path, *SETTINGS), tmp_path / "out", tmp_path / "log.txt"
    with started(torchrun("--max-restarts", "3", recipe=recipe, out=out), log) as process:
        wait_until(lambda: bool(complete_checkpoints(out)), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) != 0, "a scheduler would take the job for done"
    last = steps(out)[-1]
    assert step_of(complete_checkpoints(out)[-1]) == last
    assert log.read_text().count("starting: 2 rank(s)") == 1
    assert [audited_steps(out, rank)[-1]["step"] for rank in (0, 1)] == [last, last]


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_torchrun_restarts_after_a_killed_rank_and_the_run_equals_the_uninterrupted_one(dataset, tmp_path):
    """One rank is killed, later the other is asked to stop: both times all start again and lose nothing."""
    recipe, out, log = write_recipe(dataset, tmp_path, *SHORT, "trainer.epochs=5"), tmp_path / "out", tmp_path / "log"
    with started(torchrun("--max-restarts", "3", recipe=recipe, out=out), log) as process:
        wait_until(lambda: bool(complete_checkpoints(out)), process, log)
        os.kill(rank_pid(process.pid, 1), signal.SIGKILL)
        wait_until(lambda: "continuing from" in log.read_text(), process, log)
        before = len(steps(out))
        wait_until(lambda: len(steps(out)) > before + 5, process, log)
        os.kill(rank_pid(process.pid, 1), signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()[-3000:]
    told = log.read_text()
    assert told.count("continuing from") == 2
    assert re.search(r"error: rank 0 lost its connection to another rank: .*; torchrun starts all ranks again", told)
    assert "Traceback" not in told
    assert "Traceback" in (out / "stacks" / "rank-0.txt").read_text()
    whole = tmp_path / "whole"
    config = config_of(dataset, "ranking", *SHORT, "trainer.epochs=5")
    run_ranks(train_on_ranks, [(config, whole)], world_size=2)
    for split in ("train", "validation", "test"):
        assert lines(out, split) == lines(whole, split)
    for rank in (0, 1):
        assert audited_steps(out, rank) == audited_steps(whole, rank)
    assert not differing(final_tensors(out), final_tensors(whole))


def test_ranks_end_when_their_agent_is_killed(dataset, tmp_path):
    recipe, out, log = write_recipe(dataset, tmp_path, *SETTINGS), tmp_path / "out", tmp_path / "log.txt"
    with started(torchrun(recipe=recipe, out=out), log) as process:
        wait_until(lambda: bool(complete_checkpoints(out)), process, log)
        ranks = [rank_pid(process.pid, rank) for rank in (0, 1)]
        process.kill()
        end = time.monotonic() + PATIENCE_SECONDS
        while any(is_running(pid) for pid in ranks):
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.01)
    assert len(steps(out)) < 480


def test_an_error_of_the_user_is_said_once_although_torchrun_restarts(dataset, tmp_path):
    recipe, log = write_recipe(dataset, tmp_path, *SHORT, f"data.path={tmp_path / 'nothing'}"), tmp_path / "log.txt"
    with started(torchrun("--max-restarts", "2", recipe=recipe, out=tmp_path / "out"), log) as process:
        assert process.wait(PATIENCE_SECONDS) != 0
    assert log.read_text().count(f"error: {tmp_path / 'nothing'}") in (1, 2), "each rank of the first attempt, at most"
    assert "exitcode  : 2" in log.read_text()


def test_a_hanging_rank_leaves_the_stacks_of_those_that_wait_for_it(dataset, tmp_path):
    settings = (*SETTINGS, "trainer.watchdog_seconds=8")
    recipe, out, log = write_recipe(dataset, tmp_path, *settings), tmp_path / "out", tmp_path / "log.txt"
    with started(torchrun(recipe=recipe, out=out), log) as process:
        wait_until(lambda: bool(complete_checkpoints(out)), process, log)
        stopped = rank_pid(process.pid, 1)
        os.kill(stopped, signal.SIGSTOP)
        stacks = out / "stacks" / "rank-0.txt"
        wait_until(lambda: "Current thread" in stacks.read_text(), process, log)
        wait_until(lambda: "aborting" in log.read_text(), process, log)
        # torchrun would give the stopped rank 30 s to answer its SIGTERM.
        os.kill(stopped, signal.SIGKILL)
        assert process.wait(PATIENCE_SECONDS) != 0
    told = stacks.read_text()
    # A step that has finished need not have had its line written when the rank stopped.
    last = int(re.search(r"rank 0: no step has finished for 8 s, the last was (\d+); stacks of all threads", told)[1])
    assert steps(out)[-1] <= last <= steps(out)[-1] + 1
    assert "trainer/loop.py" in told
    assert "aborting (trainer.watchdog_seconds)" in log.read_text()
