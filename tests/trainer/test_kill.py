"""Kill -9 of everything, the same command again: as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from process_group import run_ranks
from small_runs import audited_steps, config_of, differing, final_tensors, lines, train_on_ranks

from ultrarec.trainer.manifest import MANIFEST, all_checkpoints, complete_checkpoints

SETTINGS = (
    "trainer.epochs=7",
    "model.dropout=0.3",
    "checkpoint.every=3",
    "trainer.evaluate_every=20",
    "checkpoint.keep_last=2",
)
PATIENCE_SECONDS = 90


@contextmanager
def launched(recipe: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks under torchrun; whatever is left of them at the end is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "ultrarec.trainer", str(recipe), "--out", str(out)]
    with (out.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        signal_all(process, signal.SIGKILL)
        process.wait()


def signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to torchrun and everything below it: torchrun puts its ranks into sessions of their own."""
    if process.poll() is not None:
        return
    pids = [process.pid]
    for pid in pids:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [int(child) for child in children.read_text().split()]
    for pid in pids:
        os.kill(pid, number)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], out: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, (out.parent / "log.txt").read_text()[-3000:]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def kill_while_training(process: subprocess.Popen[bytes], out: Path) -> None:
    """At a random moment after the first checkpoint."""
    wait_until(lambda: bool(complete_checkpoints(out)), process, out)
    time.sleep(random.Random(7).uniform(0.0, 0.3))
    signal_all(process, signal.SIGKILL)


def kill_while_saving(process: subprocess.Popen[bytes], out: Path) -> None:
    """Behind a further checkpoint, while the folder of the next one stands without its manifest."""
    before = complete_checkpoints(out)[-1]

    def is_saving() -> bool:
        return complete_checkpoints(out)[-1] != before and not (all_checkpoints(out)[-1] / MANIFEST).exists()

    while True:
        wait_until(is_saving, process, out)
        signal_all(process, signal.SIGSTOP)
        time.sleep(0.05)
        if is_saving():
            break
        signal_all(process, signal.SIGCONT)
    signal_all(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_killed_at_random_and_while_saving_continues_as_if_never_killed(dataset, tmp_path):
    config = config_of(dataset, "ranking", *SETTINGS)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config.to_toml())
    out, whole = tmp_path / "out", tmp_path / "whole"
    for kill in (kill_while_training, kill_while_saving):
        with launched(recipe, out) as process:
            kill(process, out)
        assert process.returncode == -signal.SIGKILL
    assert all_checkpoints(out) != complete_checkpoints(out)
    with launched(recipe, out) as process:
        assert process.wait(PATIENCE_SECONDS) == 0, (tmp_path / "log.txt").read_text()[-3000:]

    run_ranks(train_on_ranks, [(config, whole)], world_size=2)
    assert [line["step"] for line in lines(out)] == list(range(1, 7 * 12 + 1))
    for split in ("train", "validation", "test"):
        assert lines(out, split) == lines(whole, split)
    for rank in (0, 1):
        assert audited_steps(out, rank) == audited_steps(whole, rank)
    assert not differing(final_tensors(out), final_tensors(whole))
    assert all_checkpoints(out) == complete_checkpoints(out)
