"""A launch of MIN:MAX nodes that loses one: real agents of torchrun, real ranks, a kill that leaves no time to act."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import audit, config_of, lines, make_dataset

SETTINGS = ("trainer.epochs=12", "checkpoint.every=5", "trainer.timeout_seconds=60")
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"
"""Torchrun would wait 15 seconds for the lost node, and 30 for others."""
PATIENCE_SECONDS = 150


def children(pid: int) -> list[int]:
    return [int(child) for each in Path(f"/proc/{pid}/task").glob("*/children") for child in each.read_text().split()]


def is_meeting_point(pid: int) -> bool:
    """Whether an agent listens at the address where all of them meet."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    port = int(words[words.index("--rdzv-endpoint") + 1].rpartition(":")[2])
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = {f"socket:[{s[9]}]" for s in sockets if s[3] == "0A" and int(s[1].rpartition(":")[2], 16) == port}
    return any(str(each.readlink()) in listening for each in Path(f"/proc/{pid}/fd").iterdir())


def wait_until(condition, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_launch_that_loses_a_node_goes_on_with_the_other_and_trains_each_row_once(tmp_path):
    dataset = make_dataset(tmp_path / "dataset")
    recipe, out, log = tmp_path / "recipe.toml", tmp_path / "out", tmp_path / "log"
    recipe.write_text(config_of(dataset, "ranking", *SETTINGS).to_toml())
    command = [sys.executable, "-m", "ultrarec.launch.cli", "launch", str(recipe), "--scheduler", "local_cwd"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PET_RDZV_CONF": QUICK}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "-j", "1:2x1", "--out", str(out)], stdout=output, stderr=output, env=environment
        ) as job,
    ):
        try:
            wait_until((out / "checkpoints/step-00000010/manifest.json").exists, job, log)
            (lost,) = [agent for agent in children(job.pid) if not is_meeting_point(agent)]
            for pid in (*children(lost), lost):
                os.kill(pid, signal.SIGKILL)
            assert job.wait(PATIENCE_SECONDS) == 0, log.read_text()[-3000:]
        finally:
            job.send_signal(signal.SIGTERM)
    told = log.read_text()
    assert "starting: 2 rank(s)" in told
    assert "1 rank(s) on cpu" in told.partition("continuing from ")[2]
    assert "note: the job came to its end on 1 of 2 nodes; the others were lost" in told
    steps = [line["step"] for line in lines(out)]
    assert steps == list(range(1, 145))
    consumed = audit(out)
    assert len(consumed) == 12
    whole = sorted(consumed[0])
    assert len(set(whole)) == len(whole)
    assert all(sorted(rows) == whole for rows in consumed.values()), "rows were lost or repeated"
