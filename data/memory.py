"""Memory for columns and batches that is used again and again."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np

from .samples import Integers

_SMALL = 1 << 14
"""Numbers below which the allocator of the process does as well."""


class Memory:
    """Arrays whose memory returns here when nobody holds them, or a part of them, any longer.

    A loader needs megabytes per batch and row group, over and over. Allocators give those back to the system, whose
    fresh pages cost more than filling them: on a virtual machine, decoding into fresh memory took 88 ns of CPU per
    event, into memory in use 25.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Integers]] = defaultdict(list)

    def empty(self, length: int) -> Integers:
        """[length] int64 of any content."""
        if length < _SMALL:
            return np.empty(length, np.int64)
        size = _rounded(length)
        free = self._free[size]
        try:
            block = free.pop()
        except IndexError:  # not asked before, as another thread may take the last one in between
            block = np.empty(size, np.int64)
        # Slices of an array that lies in another array keep only that one alive, but not its finalizer; slices of an
        # array that lies in a memoryview keep the array.
        array: Integers = np.frombuffer(block.data, np.int64, length)
        weakref.finalize(array, free.append, block).atexit = False
        return array

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
