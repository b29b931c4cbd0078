"""A rank's file of a checkpoint, written by a process of its own from memory that it shares with the rank.

What a save cost the steps of two ranks on two cores, 1 GiB in all: written by threads, as it was at first, steps took
2.8 times as long for two seconds. Each gigabyte was copied into the page cache on the cores that trained, and whatever
a thread does between two blocks waits for Python's lock, and training for it. A process has a lock of its own; files
opened with O_DIRECT are fetched from memory by the disk; what is left is the checksum, at low priority. The same steps
took 1.04 to 1.19 times as long. A thread that wrote so and at the lowest priority still cost 1.45.

The process imports the standard library alone, which takes 30 ms. It ends with its rank, whatever ended that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .storage import Location

ALIGNMENT = 4096
"""Bytes: O_DIRECT wants memory, place in the file and length to be multiples of a disk's block."""
STRIDE = 1 << 20
"""Bytes that are checksummed and written at a time; a multiple of ALIGNMENT."""
NICENESS = 10
"""A tenth of the share of a process that trains, where all cores are busy; a save must come to its end there too."""
END_SECONDS = 1.0
"""How long a killed process is waited for; one that hangs in a write of its storage ends when that returns."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
CODE = f"""
import sys
sys.path[:] = [place for place in sys.path if place]
from {__name__} import serve
serve(*map(int, sys.argv[1:]))
"""
"""What the process runs. With `-m` it would look for modules in the working folder first, where a random.py may be."""


class WriteError(Exception):
    """A file could not be written; the message says why, and the number too where the system gave one."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.errno = number


class Writer:
    """Memory of some bytes, and the process that writes it to files; for one thread at a time.

    Made, and revived, on a thread that lasts as long as the rank: Linux ends the process with that thread.

    Raises:
        OSError: there is no memory for so many bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        self._descriptor = os.memfd_create("ultrarec-checkpoint")
        try:
            # Every page now: where one is missing at the first copy, Linux ends the rank.
            os.posix_fallocate(self._descriptor, 0, padded)
            self.memory = mmap.mmap(self._descriptor, padded, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            """The bytes to write, and padding up to ALIGNMENT."""
        except OSError:
            os.close(self._descriptor)
            raise
        self._start()

    def _start(self) -> None:
        self._is_lost = False
        self._connection, theirs = Pipe()
        with theirs:
            numbers = [self._descriptor, theirs.fileno(), os.getpid()]
            command = [sys.executable, "-c", CODE, *map(str, numbers)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers[:2])

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, and the memory with it once nobody here holds it."""
        return self._process.poll() is not None

    def revive(self) -> None:
        """Start the process anew if it died."""
        if self._is_lost or self._process.poll() is not None:
            self._end()
            self._connection.close()
            self._start()

    def write(self, place: Location, ends: Sequence[int]) -> list[int]:
        """Write the memory to a file and bring that to disk; the CRC-32 of each block, of which `ends` are the ends.

        Raises:
            WriteError: the storage failed, or the process died.
        """
        try:
            self._connection.send((place, list(ends)))
            checksums, problem = self._connection.recv()
        except (EOFError, OSError):
            self._is_lost = True  # its end of the connection closes a moment before it has ended
            raise WriteError("the process that writes its file died") from None
        if problem is not None:
            raise WriteError(*problem)
        return list(checksums)

    def close(self) -> None:
        """End the process, in the middle of a file if need be; whoever waits in `write` is told that it died."""
        self._end()
        os.close(self._descriptor)

    def _end(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)


def reason_of(error: Exception) -> str:
    """What a disk, an object store or a network gives as its reason."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_file(place: Location, content: memoryview, ends: Sequence[int]) -> list[int]:
    """Write the bytes up to the last of `ends` and bring them to disk; the checksum of each block.

    Args:
        content: those bytes, and padding up to ALIGNMENT.
    """
    checksums: list[int] = []
    if not isinstance(place, Path):
        with place.open("wb") as stream:
            for part in _checked(content[: ends[-1]], ends, checksums):
                stream.write(part)
        return checksums
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _set_direct(descriptor, True)
        for part in _checked(content, ends, checksums):
            _write_all(descriptor, part)
        os.ftruncate(descriptor, ends[-1])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return checksums


def _checked(content: memoryview, ends: Sequence[int], checksums: list[int]) -> Iterator[memoryview]:
    """The content in strides; meanwhile `checksums` takes up those of the blocks."""
    block, crc, done = 0, 0, 0
    for start in range(0, len(content), STRIDE):
        last = min(start + STRIDE, len(content))
        while block < len(ends) and ends[block] <= last:
            checksums.append(zlib.crc32(content[done : ends[block]], crc))
            block, crc, done = block + 1, 0, ends[block]
        if block < len(ends):
            crc, done = zlib.crc32(content[done:last], crc), last
        yield content[start:last]


def _write_all(descriptor: int, part: memoryview) -> None:
    while part:
        part = part[_write_some(descriptor, part) :]


def _write_some(descriptor: int, part: memoryview) -> int:
    """Write as much as the file takes at once; how many bytes that were."""
    try:
        return os.write(descriptor, part)
    except OSError as error:
        # Some file systems take the flag but not the writes, and a disk that is nearly full takes part of a write.
        if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
            raise
    return os.write(descriptor, part)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Write past the page cache, or through it; whether that changed anything. Not every file system can."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    chosen = flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, chosen)
    except OSError:
        return False
    return chosen != flags


def serve(memory: int, connection: int, rank: int) -> None:
    """The process: writes what it is asked to, until the rank with this process id is gone."""
    # A signal to the whole job is a request to the ranks, which save because of it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        return  # it died before
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), NICENESS))
    content = memoryview(mmap.mmap(memory, 0, prot=mmap.PROT_READ))
    with Connection(connection) as requests:
        while True:
            try:
                place, ends = requests.recv()
            except EOFError:
                return
            try:
                requests.send((write_file(place, content, ends), None))
            except Exception as error:  # whatever a disk, an object store or a network may raise
                requests.send((None, (reason_of(error), getattr(error, "errno", None))))
