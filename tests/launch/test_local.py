"""Launches on this machine: real torchrun, real processes, and a worker in the place of the trainer."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import make_dataset

from ultrarec.data.errors import UserError
from ultrarec.launch.application import Size
from ultrarec.launch.local import _FirstRank, gpu_shares

DRIVER = """
import sys
from pathlib import Path
from torchx.runner import get_runner
from ultrarec.launch import application, launcher, local
from ultrarec.trainer.config import load_config

worker, out, size = sys.argv[1], Path(sys.argv[2]), application.Size.parse(sys.argv[3])
app = application.build(
    load_config("hstu_kuairand_sample"), recipe="job", overrides=[], out=str(out), size=size,
    torchrun=launcher._torchrun_here(), port=local.free_port(),
)
role = app.roles[0]
assert "-m ultrarec.trainer" in role.args[1]
role.args[1] = role.args[1].replace("-m ultrarec.trainer", worker)
local.prepare(app, size)
with get_runner() as runner:
    request = runner.dryrun(app, "local_cwd", local.options(out))
    sys.exit(local.run(runner, request, out=out, size=size, grace_seconds=30))
"""
PREAMBLE = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


def start(tmp_path: Path, worker: str, size: str) -> subprocess.Popen:
    (tmp_path / "worker.py").write_text(PREAMBLE + worker)
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "worker.py"), str(tmp_path / "out"), size]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def still_running(pids: list[int]) -> list[int]:
    return [
        pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    ]


def wait_for(paths: list[Path]) -> list[int]:
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize(
    ("gpus", "size", "shares"),
    [
        ([], "2x8", []),
        (["0"], "1x1", [["0"]]),
        (["0", "1", "2", "3"], "1x2", [["0", "1"]]),
        (["0", "1", "2", "3"], "2x2", [["0", "1"], ["2", "3"]]),
        (["6", "GPU-a", "1"], "3x1", [["6"], ["GPU-a"], ["1"]]),
    ],
)
def test_each_node_gets_a_gpu_per_process_and_none_twice(gpus, size, shares):
    assert gpu_shares(gpus, Size.parse(size)) == shares


@pytest.mark.parametrize("size", ["2x2", "1x4", "4x1"])
def test_more_processes_than_gpus_on_this_machine_are_refused(size):
    with pytest.raises(UserError, match=f"-j {size}, but 3 GPU.* use -j 1x3"):
        gpu_shares(["0", "1", "2"], Size.parse(size))


def test_what_a_rank_prints_last_on_stdout_is_shown_after_its_stderr(tmp_path, capfd, monkeypatch):
    folder = tmp_path / "none" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_text("the table\n")
    (folder / "stderr.log").write_text("a warning\n")
    monkeypatch.setattr("sys.stderr", sys.stdout)  # a terminal shows both
    _FirstRank(tmp_path).show()
    assert capfd.readouterr().out == "a warning\nthe table\n"


def test_a_rank_that_starts_again_in_the_same_attempt_is_heard_on(tmp_path, capfd):
    """Torchrun removes the folder of an attempt when it begins it anew, since another node has come."""
    folder = tmp_path / "none" / "attempt_0" / "0"
    first = _FirstRank(tmp_path)
    for said in ("before\n", "after\n"):
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(said)
        first.show()
        shutil.rmtree(folder)
        first.show()
    assert capfd.readouterr().out == "before\nafter\n"


def test_two_nodes_form_one_job_and_its_first_rank_is_heard(tmp_path):
    worker = (
        "print('world', os.environ['WORLD_SIZE'], 'rank', rank, 'threads', os.environ['OMP_NUM_THREADS'], flush=True)"
    )
    job = start(tmp_path, worker, "2x1")
    out, err = job.communicate(timeout=100)
    assert job.returncode == 0, err
    assert "world 2 rank 0 threads " in out


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [("sys.exit(3)", 3, "ended with exit code 3"), ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL")],
)
def test_a_failed_rank_is_named_with_its_last_words(tmp_path, end, code, how):
    worker = (
        "print('hello from', rank, flush=True)\n"
        "open(f'spoke-{rank}', 'w').close()\n"
        "while not os.path.exists('spoke-0'):\n    time.sleep(0.05)\n"
        f"if rank == 1:\n    print('my table burns', file=sys.stderr, flush=True)\n    {end}\n"
        "time.sleep(60)"
    )
    job = start(tmp_path, worker, "1x2")
    out, err = job.communicate(timeout=100)
    assert job.returncode == code, err
    assert "hello from 0" in out
    assert "hello from 1" not in out
    assert "last lines of rank 1:\n  my table burns\n" in err
    assert ("local rank 1 of node 0 (pid " in err) == (code == 137)
    assert f"error: rank 1 on node 0 {how}\nlogs of all ranks: {tmp_path / 'out' / 'logs'}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_ranks_and_leaves_no_process_behind(tmp_path, signum, code):
    worker = (
        "def last_words(signum, frame):\n    print('saved by', rank, flush=True)\n    sys.exit(0)\n"
        f"signal.signal({int(signum)}, last_words)\n"
        "open(f'pid-{rank}', 'w').write(str(os.getpid()))\n"
        "time.sleep(100)"
    )
    job = start(tmp_path, worker, "1x2")
    workers = wait_for([tmp_path / f"pid-{rank}" for rank in range(2)])
    os.kill(job.pid, signum)
    out, err = job.communicate(timeout=60)
    assert job.returncode == code, err
    assert "saved by 0" in out
    assert f"stopped by {signum.name}; the same command continues the run" in err
    assert still_running(workers) == []


def test_ranks_whose_launcher_was_killed_do_not_live_on(tmp_path):
    worker = (
        "open(f'pid-{rank}', 'w').write(str(os.getpid()))\n"
        "while not os.path.exists('pid-0') or not os.path.exists('pid-1'):\n    time.sleep(0.05)\n"
        "if rank == 1:\n    os.kill(os.getppid(), signal.SIGKILL)\n"
        "time.sleep(100)"
    )
    job = start(tmp_path, worker, "1x2")
    _, err = job.communicate(timeout=90)
    assert job.returncode == 137, err
    said = "error: torchrun on node 0 was killed by SIGKILL; the same command continues the run"
    assert err.splitlines()[-1] == said, "the cause is what a user reads last"
    assert still_running([int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]) == []


def test_an_error_of_the_user_found_by_the_trainer_is_one_message_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ultrarec.launch.cli",
        "launch",
        "hstu_kuairand_sample",
        "--scheduler",
        "local_cwd",
    ]
    command += ["-j", "1x1", "--out", str(tmp_path / "out"), "--set", f"data.path={tmp_path / 'nothing'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stderr
    assert f"error: {tmp_path / 'nothing'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_dataset_that_is_missing_and_logs_that_cannot_be_written_are_said_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("no folder")
    command = [
        sys.executable,
        "-m",
        "ultrarec.launch.cli",
        "launch",
        "hstu_kuairand_sample",
        "--scheduler",
        "local_cwd",
    ]
    missing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: datasets/kuairand-sample ")
    assert not (tmp_path / "runs").exists()
    dataset = make_dataset(tmp_path / "dataset")
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "file" / "out"), "--set", f"data.path={dataset}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write the logs below")
