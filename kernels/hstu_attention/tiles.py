"""Which scores a mask hides and which it shows, decided without looking at each; and the strips in which visible ones
are computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .mask import AttentionMask

Range = tuple[int, int]
"""Positions from the first number up to, without, the second."""
ALIGNED = 16
"""Strips start at whole vectors of this many floats."""
LEAST_GAP = 64
"""Fewer hidden keys than this are computed and masked: another strip would take longer."""


@dataclass(frozen=True)
class Strip:
    """Some queries by some keys, side by side."""

    rows: slice
    """Queries, by position in the sequence."""
    keys: slice
    masked: tuple[slice, ...]
    """Which of the keys, by position in the sequence, some of the queries may not see."""


def strips_of(
    mask: AttentionMask, length: int, history_ends: Sequence[int], *, tile: int, most_keys: int, first_row: int = 0
) -> Iterator[Strip]:
    """The strips of length x length scores that any of the sequences sees: up to `tile` queries by `most_keys` keys, or
    fewer queries by more keys.

    Where all sequences share one history end, strips begin and end where what a query sees does, and those of queries
    before `first_row` may be left out; otherwise they are of whole tiles, `tile` queries by `tile` keys.
    """
    if length <= tile:
        whole = slice(0, length)
        yield Strip(whole, whole, (whole,))
    elif len(history_ends) == 1 and history_ends[0] > 0:
        yield from _exact_strips(mask, length, history_ends[0], tile=tile, most_keys=most_keys, first_row=first_row)
    else:
        yield from _tiled_strips(mask, length, history_ends, tile=tile, most_keys=most_keys)


def _exact_strips(
    mask: AttentionMask, length: int, end: int, *, tile: int, most_keys: int, first_row: int
) -> Iterator[Strip]:
    for rows in _row_blocks(mask, length, end, tile, first_row):
        some, every = _keys_seen(mask, rows, end)
        longest = most_keys * tile // (rows.stop - rows.start)
        for start, stop in _merged(some):
            # One mask over a whole strip is faster than two, on both sides of a few keys that all queries see.
            unmasked = [(a, b) for a, b in every if a <= start or b - a >= rows.stop - rows.start]
            width = -(-(stop - start) // -(-(stop - start) // longest) // ALIGNED) * ALIGNED
            for first in range(start, stop, width):
                keys = slice(first, min(first + width, stop))
                yield Strip(rows, keys, tuple(_outside(unmasked, keys)))


def _row_blocks(mask: AttentionMask, length: int, end: int, tile: int, first_row: int) -> Iterator[slice]:
    """Queries from first_row on that are all contextual, all bound to the window, or all exempt from it."""
    borders = {first_row, mask.num_contextual, length}
    if mask.window and (mask.full_tail or mask.prefix):
        borders.add(mask.first_position(end - mask.full_tail))
    for start, stop in pairwise(sorted(border for border in borders if first_row <= border <= length)):
        num_blocks = -(-(stop - start) // tile)
        size = -(-(stop - start) // num_blocks // ALIGNED) * ALIGNED
        yield from (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _keys_seen(mask: AttentionMask, rows: slice, end: int) -> tuple[list[Range], list[Range]]:
    """The keys that some, and that all queries of a block of `_row_blocks` see."""
    lowest, highest = mask.id_of(rows.start, end), mask.id_of(rows.stop - 1, end)
    itself = (rows.start, rows.stop)
    if rows.start < mask.num_contextual:
        history = (0, mask.first_position(end))
        return [history, itself], [history]
    before_lowest, before_highest = mask.first_position(lowest), mask.first_position(highest)
    if not mask.window or (mask.full_tail and lowest >= end - mask.full_tail) or (mask.prefix and lowest == end):
        return [(0, before_highest), itself], [(0, before_lowest)]
    some = [(mask.first_position(lowest - mask.window), before_highest), itself]
    every = [(mask.first_position(highest - mask.window), before_lowest)]
    if mask.prefix:
        prefix = max(mask.prefix, mask.num_contextual)
        some.append((0, min(prefix, before_highest)))
        every.append((0, min(prefix, before_lowest)))
    return some, every


def _merged(ranges: list[Range]) -> list[Range]:
    """The union, with starts at whole vectors and without gaps too small to pay for another strip."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start - merged[-1][1] < LEAST_GAP:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start // ALIGNED * ALIGNED, stop))
    return merged


def _outside(ranges: list[Range], keys: slice) -> Iterator[slice]:
    """The keys that are in none of the ranges."""
    position = keys.start
    for start, stop in sorted(ranges):
        if position < min(start, keys.stop):
            yield slice(position, min(start, keys.stop))
        position = max(position, stop)
    if position < keys.stop:
        yield slice(position, keys.stop)


def _tiled_strips(
    mask: AttentionMask, length: int, history_ends: Sequence[int], *, tile: int, most_keys: int
) -> Iterator[Strip]:
    blocks = [slice(start, min(start + tile, length)) for start in range(0, length, tile)]
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
