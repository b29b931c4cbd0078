"""Which tiles of scores a mask hides entirely, in part, or not at all, decided without looking inside them; and strips
of visible tiles side by side, the unit in which scores are computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .mask import AttentionMask


@dataclass(frozen=True)
class Strip:
    """Neighbouring tiles of one row of tiles, none of them hidden entirely."""

    rows: slice
    """Queries, by position in the sequence."""
    keys: slice
    masked: tuple[slice, ...]
    """Which of the keys, by position in the sequence, stand in tiles that are visible only in part."""


def strips_of(
    mask: AttentionMask, length: int, history_ends: Sequence[int], *, tile: int, most_keys: int
) -> Iterator[Strip]:
    """The strips of length x length scores that any of the sequences sees; tiles are `tile` queries by `tile` keys."""
    blocks = [slice(start, min(start + tile, length)) for start in range(0, length, tile)]
    if len(blocks) == 1:
        yield Strip(blocks[0], blocks[0], (blocks[0],))
        return
    some, every = tile_visibility(mask, blocks, history_ends)
    for rows, some_see, all_see in zip(blocks, some.tolist(), every.tolist(), strict=True):
        for start, stop in _runs(some_see, True):
            num_strips = -(-(stop - start) * tile // most_keys)
            cuts = [start + n * (stop - start) // num_strips for n in range(num_strips + 1)]
            for first, last in pairwise(cuts):
                masked = tuple(_cover(blocks[first:last], a, b) for a, b in _runs(all_see[first:last], False))
                yield Strip(rows, _cover(blocks, first, last), masked)


def tile_visibility(mask: AttentionMask, blocks: list[slice], history_ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Whether some, and whether all of the sequences' queries in a block see keys in a block: bool `[row, key]` twice.

    "None" and "all" are certain, "some" is also the answer where the truth is not worth working out. Ids never fall
    with the position, so corners bound a tile.
    """
    end = torch.tensor(history_ends)[:, None, None]
    first_position, last_position = (
        torch.tensor(x) for x in zip(*((b.start, b.stop - 1) for b in blocks), strict=True)
    )
    first, last = mask.ids(first_position, end), mask.ids(last_position, end)
    first_row, last_row = first.mT, last.mT
    same = torch.eye(len(blocks), dtype=torch.bool)
    some, every = last_row > first, first_row > last
    if mask.window:
        near, far = last_row - first <= mask.window, first_row - last <= mask.window
        exempt, any_exempt = torch.zeros_like(some), torch.zeros_like(some)
        if mask.full_tail:
            exempt |= first_row >= end - mask.full_tail
            any_exempt |= last_row >= end - mask.full_tail
        if mask.prefix:
            prefix = max(mask.prefix, mask.num_contextual)
            exempt |= (first_row == end) | (last_position < prefix)
            any_exempt |= (last_row == end) | (first_position < prefix)
        every, some = every & (near | exempt), some & (far | any_exempt)
    if mask.num_contextual:
        every = every | ((last_row == 0) & (last < end))
        some = some | ((first_row == 0) & (first < end))
    return (some | same).any(0), every.all(0)


def _runs(flags: list[bool], wanted: bool) -> Iterator[tuple[int, int]]:
    """Start and stop of each longest run of the wanted value."""
    start = 0
    for value, run in groupby(flags):
        stop = start + len(list(run))
        if value is wanted:
            yield start, stop
        start = stop


def _cover(blocks: list[slice], first: int, last: int) -> slice:
    return slice(blocks[first].start, blocks[last - 1].stop)
