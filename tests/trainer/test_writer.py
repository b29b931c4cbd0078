"""The process that writes checkpoint files: every byte as it was, and no longer alive than its rank."""

import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pytest

from ultrarec.trainer.writer import ALIGNMENT, STRIDE, WriteError, Writer, write_file

SIZES = [1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, STRIDE - 1, STRIDE, 3 * STRIDE + 5]


def content_of(size: int) -> tuple[memoryview, bytes]:
    """Padded memory as a writer has it, and the bytes that a file must hold."""
    wanted = random.Random(size).randbytes(size)
    memory = mmap.mmap(-1, -(-size // ALIGNMENT) * ALIGNMENT)
    memory[:size] = wanted
    return memoryview(memory), wanted


def ends_of(size: int) -> list[int]:
    """Ends of blocks at random, beside and far from the places where writing is cut."""
    dice = random.Random(size)
    some = {dice.randint(1, size) for _ in range(6)} | {STRIDE - 1, STRIDE, 2 * STRIDE + 1}
    return sorted({end for end in some if end < size} | {size})


def checksums_of(wanted: bytes, ends: list[int]) -> list[int]:
    return [zlib.crc32(wanted[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", [None, "/dev/shm"], ids=["disk", "memory, which takes no direct writes"])
def test_a_file_holds_the_bytes_and_its_blocks_have_their_checksums(size, where):
    with tempfile.TemporaryDirectory(dir=where) as folder:
        content, wanted = content_of(size)
        path = Path(folder) / "file"
        path.write_bytes(b"what an earlier save left" * 10**6)
        ends = ends_of(size)
        assert write_file(path, content, ends) == checksums_of(wanted, ends)
        assert path.read_bytes() == wanted


def test_the_process_writes_what_the_memory_holds_at_that_time(tmp_path):
    writer = Writer(100)
    try:
        for value in (b"a", b"b"):
            writer.memory[:100] = value * 100
            assert writer.write(tmp_path / "file", [60, 100]) == [zlib.crc32(value * 60), zlib.crc32(value * 40)]
            assert (tmp_path / "file").read_bytes() == value * 100
    finally:
        writer.close()


def test_storage_that_fails_is_told_and_the_next_write_succeeds(tmp_path):
    writer = Writer(100)
    try:
        with pytest.raises(WriteError, match="No such file or directory"):
            writer.write(tmp_path / "missing" / "file", [100])
        writer.write(tmp_path / "file", [100])
    finally:
        writer.close()


def test_a_process_that_dies_costs_one_write_and_is_replaced(tmp_path):
    writer = Writer(100)
    try:
        os.kill(writer.pid, signal.SIGKILL)
        with pytest.raises(WriteError, match="the process that writes its file died"):
            writer.write(tmp_path / "file", [100])
        writer.revive()
        writer.write(tmp_path / "file", [100])
    finally:
        writer.close()


def test_a_signal_to_the_whole_job_does_not_end_the_process(tmp_path):
    writer = Writer(100)
    try:
        writer.write(tmp_path / "file", [100])
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(writer.pid, number)
        writer.write(tmp_path / "file", [100])
    finally:
        writer.close()


def target_of(link: Path) -> str:
    """Empty for a descriptor that the starting process has closed meanwhile."""
    try:
        return str(link.readlink())
    except FileNotFoundError:
        return ""


def test_memory_is_there_from_the_start():
    size = 3 * STRIDE
    writer = Writer(size)
    try:
        memory = next(path for path in Path(f"/proc/{writer.pid}/fd").iterdir() if "memfd" in target_of(path))
        assert memory.stat().st_blocks * 512 >= size
    finally:
        writer.close()


def test_files_in_the_working_folder_are_not_taken_for_modules(tmp_path, monkeypatch):
    for name in ("tempfile", "random", "mmap", "subprocess", "contextlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    writer = Writer(100)
    try:
        writer.write(tmp_path / "file", [100])
    finally:
        writer.close()


def test_the_process_is_small(tmp_path):
    writer = Writer(100)
    try:
        writer.write(tmp_path / "file", [100])
        assert "libtorch" not in Path(f"/proc/{writer.pid}/maps").read_text()
    finally:
        writer.close()


RANK = """
import sys, threading, time
from pathlib import Path
from ultrarec.trainer.writer import Writer
writer = Writer(1 << 28)
threading.Thread(target=writer.write, args=(Path(sys.argv[1]), [1 << 28]), daemon=True).start()
print(writer.pid, flush=True)
time.sleep(60)
"""


def test_a_rank_that_is_killed_takes_its_process_with_it_in_the_middle_of_a_file(tmp_path):
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True)
    pid = int(rank.stdout.readline())
    while not (tmp_path / "file").exists():
        time.sleep(0.005)
    rank.kill()
    rank.communicate()
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(pid)
    assert (tmp_path / "file").stat().st_size < 1 << 28


def is_running(pid: int) -> bool:
    """Whether a process does anything; one that has ended may wait for whoever inherited it to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
