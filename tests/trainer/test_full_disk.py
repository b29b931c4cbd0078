"""A full disk under the run folder: training goes on, says so, and writes what waited as soon as there is room."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from process_group import run_ranks
from small_runs import audited_steps, config_of, differing, final_tensors, lines, losses, train_on_ranks

from ultrarec.trainer import journal as journal_module
from ultrarec.trainer.journal import Journal


class Disk:
    """A file system of its own, and a file that fills it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as file:
            for size in (4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=False).returncode == 0
    if not mounted:
        pytest.skip("may not mount a file system here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_without_room_wait_in_order_and_none_is_cut(disk, capsys):
    journal = Journal(disk.folder / "a" / "lines.jsonl")
    journal.append({"step": 0, "text": "x" * 100})
    disk.fill()
    for step in range(1, 100):
        journal.append({"step": step, "text": "x" * 100})
    # The rest of the last page held some; those are whole.
    there = numbers(journal.path)
    assert there == list(range(len(there)))
    assert 0 < len(there) < 50
    assert journal.missing == 100 - len(there)
    disk.free()
    journal.append({"step": 100})
    journal.close()
    assert numbers(journal.path) == list(range(101))
    assert journal.missing == 0
    first, last = capsys.readouterr().err.splitlines()
    said = f"ATTENTION: cannot write {journal.path}: No space left on device; 1 line(s) wait in memory, "
    assert first == f"{said}and training goes on"
    assert last == f"{journal.path} can be written again; {100 - len(there)} line(s) that waited are in it"


def test_half_a_line_that_could_not_be_cut_off_at_once_is_cut_off_before_the_next(disk, monkeypatch):
    """Storage that fails may refuse both, the rest of a line and the cut."""
    refused = []

    def refuse(descriptor, size):
        refused.append(os.fstat(descriptor).st_size - size)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal = Journal(disk.folder / "lines.jsonl")
    journal.append({"step": 0})
    disk.fill()
    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", refuse)
        for step in (1, 2):
            journal.append({"step": step, "text": "x" * 5000})
        assert refused[0] > 0, "no half line was written"
        assert journal.path.stat().st_size == 4096
    disk.free()
    journal.append({"step": 3})
    journal.close()
    assert numbers(journal.path) == [0, 1, 2, 3]


def test_of_lines_that_wait_too_long_the_oldest_are_given_up_and_counted(disk, capsys, monkeypatch):
    monkeypatch.setattr(journal_module, "WAITING_BYTES", 1000)
    disk.fill()
    journal = Journal(disk.folder / "lines.jsonl")
    for step in range(100):
        journal.append({"step": step, "text": "x" * 84})
    assert journal.missing == 100
    disk.free()
    journal.close()
    assert numbers(journal.path) == list(range(91, 100))
    assert journal.missing == 91
    assert capsys.readouterr().err.splitlines()[-1].endswith("that waited are in it, 91 older one(s) are lost")


def train_on_a_disk_that_fills(runs, disk, full_from, full_to, log):
    """The disk is full while the lines of some steps are written; what is said goes to a file."""
    from ultrarec.trainer import loop

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    record = loop.record

    def record_and_fill(run, step):
        number = run.state.step + 1
        if dist.get_rank() == 0 and number in (full_from, full_to):
            disk.fill() if number == full_from else disk.free()
        dist.barrier()
        record(run, step)

    loop.record = record_and_fill
    train_on_ranks(runs)


def test_a_run_whose_folder_had_no_room_for_some_steps_has_all_its_lines(trained, dataset, disk, tmp_path):
    """Checkpoints lie elsewhere; they count as complete although lines wait."""
    out, settings = disk.folder / "out", ("checkpoint.every=5", f"checkpoint.path={tmp_path / 'checkpoints'}")
    config = config_of(dataset, "ranking", *settings)
    run_ranks(train_on_a_disk_that_fills, [(config, out)], disk, 1, 19, tmp_path / "log", world_size=2)
    whole = trained(2)["ranking"]
    assert losses(out) == losses(whole)
    assert lines(out, "test") == lines(whole, "test")
    for rank in (0, 1):
        assert audited_steps(out, rank) == audited_steps(whole, rank)
    assert not differing(final_tensors(tmp_path / "checkpoints"), final_tensors(whole))
    told = (tmp_path / "log").read_text()
    for name in ("metrics.jsonl", "audit/rank-0.jsonl", "audit/rank-1.jsonl"):
        assert told.count(f"ATTENTION: cannot write {out / name}: No space left on device; ") == 1
        assert told.count(f"{out / name} can be written again; ") == 1
    assert max(line.get("unwritten_lines", 0) for line in lines(out)) > 20
    assert "unwritten_lines" not in lines(out)[-1]
    assert " lacks " not in told
    assert "Traceback" not in told


def test_a_run_that_never_finds_room_again_ends_well_says_what_is_missing_and_can_be_continued(
    trained, dataset, disk, tmp_path
):
    out, settings = disk.folder / "out", ("checkpoint.every=5", f"checkpoint.path={tmp_path / 'checkpoints'}")
    shorter = config_of(dataset, "ranking", *settings, "trainer.max_steps=12")
    run_ranks(train_on_a_disk_that_fills, [(shorter, out)], disk, 5, None, tmp_path / "log", world_size=2)
    told = (tmp_path / "log").read_text()
    there = [line["step"] for line in lines(out)]
    assert there == list(range(1, len(there) + 1))
    missing = 12 - len(there) + 2  # validation and test
    assert f"ATTENTION: {out / 'metrics.jsonl'} lacks {missing} line(s): there was no room for them" in told
    # Still without room: what stands is cut and kept, nothing has to be written.
    before = (out / "config.toml").read_bytes()
    run_ranks(train_on_ranks, [(shorter, out)], world_size=2)
    assert (out / "config.toml").read_bytes() == before
    disk.free()
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *settings), out)], world_size=2)
    assert [line["step"] for line in lines(out)] == [*there, *range(13, 25)]
    assert losses(out)[-12:] == losses(trained(2)["ranking"])[-12:]


def test_the_watchdog_tells_where_a_step_hangs_although_its_file_has_no_room(disk):
    disk.fill()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom ultrarec.trainer.watchdog import Watchdog\n"
        "Watchdog(Path(sys.argv[1]), rank=3, seconds=0.2).start(7)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(disk.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 75
    assert "error: rank 3: no step has finished for 0.2 s, the last was 7" in done.stderr
    assert 'File "<string>", line 5 in <module>' in done.stderr
