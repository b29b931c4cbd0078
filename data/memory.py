"""Memory for columns and batches that is used again and again."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import weakref
from collections import defaultdict

import numpy as np

from .samples import Integers

_SMALL = 1 << 14
"""Numbers below which the allocator of the process does as well."""
_ROOMY = 3
"""Sizes above the one asked for whose free blocks are taken before a new one is made."""
_REGION_BYTES = 32 << 20
"""Asked of the system at once; what is never written takes no memory."""


class Memory:
    """Arrays whose memory returns here when nobody holds them, or a part of them, any longer.

    A loader needs megabytes per batch and row group, over and over. Allocators give those back to the system, whose
    fresh pages cost more than filling them: on a virtual machine, decoding into fresh memory took 88 ns of CPU per
    event, into memory in use 25.

    New blocks are cut out of large regions in huge pages, where the system has them: a page fault per 2 MiB instead of
    per 4 KiB.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Integers]] = defaultdict(list)
        self._region: Integers = np.zeros(0, np.int64)
        self._cutting = threading.Lock()

    def empty(self, length: int) -> Integers:
        """[length] int64 of any content."""
        if length < _SMALL:
            return np.empty(length, np.int64)
        block = self._block(length)
        # Slices of an array that lies in another array keep only that one alive, but not its finalizer; slices of an
        # array that lies in a memoryview keep the array.
        array: Integers = np.frombuffer(block.data, np.int64, length)
        weakref.finalize(array, self._free[len(block)].append, block).atexit = False
        return array

    def _block(self, length: int) -> Integers:
        """A free block, or a new one where none of about this size is free."""
        size = wanted = _rounded(length)
        for _ in range(1 + _ROOMY):
            # Not asked before, as another thread may take the last one in between.
            with contextlib.suppress(IndexError):
                return self._free[size].pop()
            size = _rounded(size + 1)
        with self._cutting:
            if len(self._region) < wanted:
                self._region = _fresh(max(wanted * 8, _REGION_BYTES))
            block, self._region = self._region[:wanted], self._region[wanted:]
        return block

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


def _fresh(num_bytes: int) -> Integers:
    """Zeros that take no memory before they are written, and then by the huge page."""
    if sys.platform != "linux":
        return np.zeros(num_bytes // 8, np.int64)
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, np.int64)
