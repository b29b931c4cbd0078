"""`ultrarec bench checkpoint` at a small size: does it measure, and does it say what it measured."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultrarec.launch.cli import main


def test_the_bench_reports_stall_and_rates_of_the_bytes_it_wrote(tmp_path, capsys):
    assert main(["bench", "checkpoint", "--gib", "0.002", "--where", str(tmp_path), "--out", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o" / "checkpoint.json").read_text())
    rows = int(0.002 * 2**30) // 256
    assert 0 <= report["bytes"] - rows * 65 * 4 < 100_000
    assert report["ranks"] == 2
    assert min(report["seconds"].values()) > 0
    assert report["stall_share"] == pytest.approx(report["seconds"]["stall"] / report["seconds"]["save"])
    ratios = [each["step_while_saving"] / each["step"] for each in report["rounds"]]
    assert report["step_ratio_while_saving"] == pytest.approx(sorted(ratios)[len(ratios) // 2])
    assert "of the copy's rate (goal: 70%)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_the_bench_refuses_more_than_the_disk_holds(tmp_path, capsys):
    assert main(["bench", "checkpoint", "--gib", "1e9", "--where", str(tmp_path)]) == 2
    assert "error: --gib 1e+09 needs" in capsys.readouterr().err


def test_what_cannot_be_measured_or_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    for option, said in {
        "--where": f"--where {tmp_path / 'file'} is no folder; name one on the disk to measure",
        "--out": f"--out {tmp_path / 'file'} cannot be written to: File exists; give a folder of yours with room",
    }.items():
        assert main(["bench", "checkpoint", option, str(tmp_path / "file")]) == 2
        assert f"error: {said}" in capsys.readouterr().err
    for option, value in (("--ranks", "0"), ("--gib", "1e-7")):
        with pytest.raises(SystemExit):
            main(["bench", "checkpoint", option, value])
        assert f"'{value}' is not a number from " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_bench_leaves_nothing_behind_when_it_is_ended(tmp_path, number):
    command = [sys.executable, "-m", "ultrarec.launch.cli", "bench", "checkpoint", "--gib", "0.002", "--where"]
    bench = subprocess.Popen([*command, str(tmp_path)], start_new_session=True)
    while not list(tmp_path.glob("bench-checkpoint-*")):
        time.sleep(0.01)
    time.sleep(0.5)  # its ranks have begun
    bench.send_signal(number)
    assert bench.wait(20) == 128 + number
    assert list(tmp_path.iterdir()) == []
    end = time.monotonic() + 10
    while running(group=bench.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert running(group=bench.pid) == []


def running(*, group: int) -> list[str]:
    """What a process group still does; a process that has ended may wait for whoever inherited it to take notice."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.with_name("cmdline").read_text())
    return found
