"""Memory for columns and batches that is used again and again."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .samples import Integers

_SMALL = 1 << 14
"""Numbers below which the allocator of the process does as well."""
_ROOMY = 3
"""Sizes above the one asked for whose free blocks are taken before a new one is made."""
_SPARE = 8
"""One part in so many of what was in use at once is kept beyond that, or row groups of new sizes would make the system
give and take memory all the time."""
_REGION_BYTES = 32 << 20
"""Asked of the system at once; what is never written takes no memory."""


class Memory:
    """Arrays whose memory returns here when nobody holds them, or a part of them, any longer.

    A loader needs megabytes per batch and row group, over and over. Allocators give those back to the system, whose
    fresh pages cost more than filling them: on a virtual machine, decoding into fresh memory took 88 ns of CPU per
    event, into memory in use 25.

    New blocks are cut out of large regions in huge pages, where the system has them: a page fault per 2 MiB instead of
    per 4 KiB. Free blocks of other sizes than those asked for go back to the system (on Linux), so that all of them
    together stay within an eighth of what was in use at once, however many row groups come by.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[_Block]] = defaultdict(list)
        self._region = _Region(0)
        self._cutting = threading.Lock()
        self._held = self._most_used = 0

    def empty(self, length: int) -> Integers:
        """[length] int64 of any content."""
        if length < _SMALL:
            return np.empty(length, np.int64)
        block = self._block(length)
        # Slices of an array that lies in another array keep only that one alive, but not its finalizer; slices of an
        # array that lies in a memoryview keep the array.
        array: Integers = np.frombuffer(block.numbers.data, np.int64, length)
        weakref.finalize(array, self._free[len(block.numbers)].append, block).atexit = False
        return array

    def _block(self, length: int) -> _Block:
        """A free block, or a new one where none of about this size is free."""
        size = wanted = _rounded(length)
        for _ in range(1 + _ROOMY):
            # Not asked before, as another thread may take the last one in between.
            with contextlib.suppress(IndexError):
                return self._free[size].pop()
            size = _rounded(size + 1)
        with self._cutting:
            self._make_room(wanted)
            if self._region.left < wanted:
                self._region = _Region(max(wanted * 8, _REGION_BYTES // 8))
            return self._region.cut(wanted)

    def _make_room(self, wanted: int) -> None:
        """Count a new block in, and give free ones back if there are too many for it."""
        # No running count: a finalizer, which frees a block, may interrupt whoever holds the lock.
        free = {size: len(blocks) for size, blocks in list(self._free.items()) if blocks}
        used = self._held - sum(size * number for size, number in free.items()) + wanted
        self._most_used = max(self._most_used, used)
        self._held += wanted
        while free and self._held > self._most_used + self._most_used // _SPARE:
            size = max(free, key=lambda size: size * free[size])
            free[size] -= 1
            if not free[size]:
                del free[size]
            with contextlib.suppress(IndexError):
                self._free[size].pop().give_back()
                self._held -= size

    def copy(self, values: Integers) -> Integers:
        """These values, here."""
        array = self.empty(len(values))
        np.copyto(array, values)
        return array


def _rounded(length: int) -> int:
    """The next of 8 sizes per doubling: blocks of similar lengths serve each other, and stay at most an eighth empty.

    With one size per doubling, row groups of half a million events each took memory for 2**19 or for 2**20.
    """
    step = 1 << max((length - 1).bit_length() - 4, 0)
    return -(-length // step) * step


@dataclass(frozen=True)
class _Block:
    """A part of a region."""

    numbers: Integers
    pages: mmap.mmap | None
    begin: int
    """Byte in the pages."""

    def give_back(self) -> None:
        """Let the system have the memory; the region keeps the addresses."""
        if self.pages is not None:
            self.pages.madvise(mmap.MADV_DONTNEED, self.begin, self.numbers.nbytes)


class _Region:
    """Numbers that take no memory before they are written, and then by the huge page."""

    def __init__(self, length: int) -> None:
        self._pages: mmap.mmap | None = None
        self._done = 0
        if sys.platform != "linux" or not length:
            self._numbers: Integers = np.zeros(length, np.int64)
            return
        self._pages = mmap.mmap(-1, length * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self._numbers = np.frombuffer(self._pages, np.int64)

    @property
    def left(self) -> int:
        """Numbers that have not been cut off."""
        return len(self._numbers) - self._done

    def cut(self, length: int) -> _Block:
        """The next so many, of which there must be enough."""
        begin, self._done = self._done, self._done + length
        return _Block(self._numbers[begin : self._done], self._pages, begin * 8)
