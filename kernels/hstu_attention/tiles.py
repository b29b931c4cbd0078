"""Which tiles of scores a mask hides entirely, in part, or not at all, decided without looking inside them."""

from collections.abc import Iterator
from enum import Enum

from .mask import AttentionMask


class Visibility(Enum):
    """How much of a tile is visible; PART is also the answer where the truth is not worth working out."""

    NONE = "none"
    PART = "part"
    ALL = "all"


def tile_visibility(mask: AttentionMask, rows: slice, keys: slice, history_end: int) -> Visibility:
    """How much of the tile of these queries and keys is visible in one sequence.

    NONE and ALL are certain for every query of the sequence. Ids never fall with the position, so corners bound a tile.
    """
    first_row, last_row = _id(mask, rows.start, history_end), _id(mask, rows.stop - 1, history_end)
    first_key, last_key = _id(mask, keys.start, history_end), _id(mask, keys.stop - 1, history_end)
    tail_start = history_end - mask.full_tail if mask.full_tail else history_end + 1
    prefix = max(mask.prefix, mask.num_contextual) if mask.prefix else 0
    exempt_id = history_end if mask.prefix else history_end + 1

    all_near = mask.window == 0 or last_row - first_key <= mask.window
    all_exempt = first_row >= min(tail_start, exempt_id) or keys.stop <= prefix
    all_contextual = mask.num_contextual > 0 and first_row == last_row == 0 and last_key < history_end
    if (first_row > last_key and (all_near or all_exempt)) or all_contextual:
        return Visibility.ALL

    any_near = mask.window == 0 or first_row - last_key <= mask.window
    any_exempt = last_row >= min(tail_start, exempt_id) or keys.start < prefix
    any_contextual = mask.num_contextual > 0 and first_row == 0 and first_key < history_end
    any_same = rows.start < keys.stop and keys.start < rows.stop
    if (last_row > first_key and (any_near or any_exempt)) or any_contextual or any_same:
        return Visibility.PART
    return Visibility.NONE


def visible_tiles(
    mask: AttentionMask, length: int, history_ends: list[int], tile: int
) -> Iterator[tuple[slice, slice, bool]]:
    """The tiles of length x length scores that any of the sequences sees, and whether all of them see them entirely."""
    blocks = list(_blocks(length, tile))
    if len(blocks) == 1:
        yield blocks[0], blocks[0], False
        return
    for rows in blocks:
        for keys in blocks:
            seen = {tile_visibility(mask, rows, keys, end) for end in history_ends}
            if seen != {Visibility.NONE}:
                yield rows, keys, seen == {Visibility.ALL}


def _blocks(length: int, tile: int) -> Iterator[slice]:
    """Cut 0..length into the fewest blocks of at most tile, as equal as can be."""
    num_blocks = -(-length // tile)
    for n in range(num_blocks):
        yield slice(n * length // num_blocks, (n + 1) * length // num_blocks)


def _id(mask: AttentionMask, position: int, history_end: int) -> int:
    if mask.num_contextual:
        position = max(position - mask.num_contextual + 1, 0)
    return min(position, history_end)
