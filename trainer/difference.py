"""How two checkpoints differ, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pieces import TORCH_DTYPES, Source

ROWS = 65_536
"""Rows of a table compared at a time."""


def differences(left: Source, right: Source) -> Iterator[str]:
    """One line for each tensor that is not bit for bit the same, or that only one side has."""
    for name in sorted(left.entries.keys() | right.entries.keys()):
        if name not in left.entries or name not in right.entries:
            yield f"{name}: only in {(left if name in left.entries else right).folder}"
            continue
        a, b = left.entries[name], right.entries[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        elif line := _difference(left, right, name):
            yield f"{name}: {line}"


def _difference(left: Source, right: Source, name: str) -> str | None:
    """How many values differ, and the largest difference; None if none does."""
    count, largest, total = 0, 0.0, 0
    for a, b in zip(_parts(left, name), _parts(right, name), strict=True):
        # NaN differs from itself as a number, but is the same in both checkpoints.
        unequal = (a != b) & ~(a.isnan() & b.isnan())
        count, total = count + int(unequal.sum()), total + a.numel()
        if unequal.any():
            largest = max(largest, float((a.double() - b.double())[unequal].abs().max()))
    return f"{count} of {total} values differ, by at most {largest:.3g}" if count else None


def _parts(source: Source, name: str) -> Iterator[Tensor]:
    entry = source.entries[name]
    if not entry.shape:
        yield source.tensor(name)
        return
    for row in range(0, entry.shape[0], ROWS):
        shape = (min(ROWS, entry.shape[0] - row), *entry.shape[1:])
        part = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype])
        source.read(name, part, origin=(row, *(0 for _ in entry.shape[1:])))
        yield part
