"""The visibility rule inside Triton kernels: the mask itself, and which tiles of scores need it.

Ids and positions are those of AttentionMask. Ids never fall with the position, so the first and the last query or key
of a tile bound it. Of the tiles that a kernel visits, full ones are visible in every element, edge ones maybe in part.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class TileList(NamedTuple):
    """Ascending tiles of keys for a tile of queries, or the reverse: two runs of full tiles, and edge tiles between.

    What is visited starts at tile `first`, has two holes, and ends after all full and `num_edge` edge tiles.
    Ascending by start are hole_0, full_0, hole_1, full_1, save that empty ones may start anywhere.
    """

    full_0: Any
    num_full_0: Any
    full_1: Any
    num_full_1: Any
    first: Any
    hole_0: Any
    num_hole_0: Any
    hole_1: Any
    num_hole_1: Any
    num_edge: Any


@triton.jit
def num_full_tiles(tiles):
    """How many tiles are visible in every element."""
    return tiles.num_full_0 + tiles.num_full_1


@triton.jit
def full_tile(tiles, number):
    """The full tile with this number, from 0."""
    return tl.where(number < tiles.num_full_0, tiles.full_0 + number, tiles.full_1 + number - tiles.num_full_0)


@triton.jit
def edge_tile(tiles, number):
    """The edge tile with this number, from 0."""
    tile = tiles.first + number
    tile += tl.where(tile >= tiles.hole_0, tiles.num_hole_0, 0)
    tile += tl.where(tile >= tiles.full_0, tiles.num_full_0, 0)
    tile += tl.where(tile >= tiles.hole_1, tiles.num_hole_1, 0)
    tile += tl.where(tile >= tiles.full_1, tiles.num_full_1, 0)
    return tile


@triton.constexpr_function
def id_shift(mask):
    """How far ids are behind positions, once past the contextual tokens."""
    return max(mask.num_contextual - 1, 0)


@triton.constexpr_function
def prefix_end_of(mask):
    """Keys in front of this position are exempt from the window."""
    return max(mask.prefix, mask.num_contextual) if mask.window and mask.prefix else 0


@triton.constexpr_function
def has_exempt_queries(mask):
    """Whether queries from exempt_id_of on are exempt from the window."""
    return mask.window > 0 and (mask.full_tail > 0 or mask.prefix > 0)


@triton.jit
def exempt_id_of(history_end, MASK: tl.constexpr):
    """Queries of this id and above are exempt from the window, if has_exempt_queries."""
    return history_end - MASK.full_tail


@triton.jit
def id_of(position, history_end, MASK: tl.constexpr):
    """The id of a position within the sequence."""
    return tl.minimum(tl.maximum(position - id_shift(MASK), 0), history_end)


@triton.jit
def position_of(token_id, MASK: tl.constexpr):
    """The first position with this id or above; 0 for ids of 0 and below."""
    return tl.where(token_id > 0, token_id + id_shift(MASK), 0)


@triton.jit
def is_visible(rows, keys, history_end, MASK: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """AttentionMask.visible for positions of queries and of keys, which broadcast; queries are events."""
    if HAS_TARGETS or MASK.num_contextual > 0:
        row_ids, key_ids = id_of(rows, history_end, MASK), id_of(keys, history_end, MASK)
        seen = (row_ids > key_ids) | (rows == keys)
    else:
        row_ids, key_ids = rows, keys
        seen = rows >= keys
    if MASK.window > 0:
        exempt = row_ids - key_ids <= MASK.window
        if has_exempt_queries(MASK):
            exempt = exempt | (row_ids >= exempt_id_of(history_end, MASK))
        if MASK.prefix > 0:
            exempt = exempt | (keys < prefix_end_of(MASK))
        seen = seen & exempt
    if MASK.num_contextual > 0:
        seen = seen | ((row_ids == 0) & (key_ids < history_end))
    return seen


@triton.jit
def is_hidden(row, row_end, key, key_end, history_end, MASK: tl.constexpr):
    """Whether no query of row..row_end sees any key of key..key_end; True is certain, False is not."""
    first_row, last_row = id_of(row, history_end, MASK), id_of(row_end - 1, history_end, MASK)
    first_key, last_key = id_of(key, history_end, MASK), id_of(key_end - 1, history_end, MASK)
    seen = last_row > first_key
    if MASK.window > 0:
        exempt = (first_row - last_key <= MASK.window) | (key < prefix_end_of(MASK))
        if has_exempt_queries(MASK):
            exempt = exempt | (last_row >= exempt_id_of(history_end, MASK))
        seen = seen & exempt
    if MASK.num_contextual > 0:
        seen = seen | ((first_row == 0) & (first_key < history_end))
    seen = seen | ((row < key_end) & (key < row_end))
    return seen == 0


@triton.jit
def key_tiles(row, row_end, history_end, MASK: tl.constexpr, TILE: tl.constexpr):
    """The tiles of TILE keys that the queries row..row_end, at least one, see."""
    first_row, last_row = id_of(row, history_end, MASK), id_of(row_end - 1, history_end, MASK)
    history_len = history_end + id_shift(MASK)
    only_targets = row >= history_len

    # All queries see the keys from all_near up to all_free, and a prefix up to all_free.
    all_free = position_of(first_row, MASK)
    any_free = row_end
    all_near, any_near = 0, 0
    if MASK.window > 0:
        all_near = position_of(last_row - MASK.window, MASK)
        any_near = position_of(first_row - MASK.window, MASK)
        if has_exempt_queries(MASK):
            exempt_id = exempt_id_of(history_end, MASK)
            all_near = tl.where(first_row >= exempt_id, 0, all_near)
            any_near = tl.where(last_row >= exempt_id, 0, any_near)
    if MASK.num_contextual > 0:
        only_contextual = (row_end <= MASK.num_contextual) & (history_end > 0)
        all_free = tl.where(only_contextual, history_len, all_free)
        all_near = tl.where(only_contextual, 0, all_near)
        any_free = tl.where(row < MASK.num_contextual, tl.maximum(row_end, history_len), row_end)

    full_prefix = tl.where(only_targets, 0, tl.minimum(prefix_end_of(MASK), all_free) // TILE)
    full = tl.maximum(tl.cdiv(all_near, TILE), full_prefix)
    num_full = tl.maximum(all_free // TILE - full, 0)
    # Targets see what is near in the history, and themselves; others see the prefix, and what is near.
    a = tl.where(only_targets, any_near // TILE, 0)
    a_end = tl.cdiv(tl.where(only_targets, history_len, tl.minimum(prefix_end_of(MASK), any_free)), TILE)
    b = tl.maximum(tl.where(only_targets, row, any_near) // TILE, a_end)
    b_end = tl.maximum(tl.cdiv(any_free, TILE), b)
    num_edge = a_end - a + b_end - b - full_prefix - num_full
    return TileList(
        tl.where(only_targets, full, 0),
        tl.where(only_targets, num_full, full_prefix),
        full,
        tl.where(only_targets, 0, num_full),
        a,
        a,
        0,
        a_end,
        b - a_end,
        num_edge,
    )


@triton.jit
def query_tiles(key, key_end, length, history_end, MASK: tl.constexpr, TILE: tl.constexpr):
    """The tiles of TILE queries that see any of the keys key..key_end, at least one, of a sequence."""
    first_key, last_key = id_of(key, history_end, MASK), id_of(key_end - 1, history_end, MASK)
    only_targets = key >= history_end + id_shift(MASK)

    # Queries from all_free on see all keys if they are no further than all_near, or behind exempt.
    all_free = tl.where(last_key < history_end, position_of(last_key + 1, MASK), length)
    all_near, any_near, exempt = length, length, length
    if MASK.window > 0:
        all_near = tl.where(
            first_key + MASK.window < history_end, position_of(first_key + MASK.window + 1, MASK), length
        )
        any_near = tl.where(last_key + MASK.window < history_end, position_of(last_key + MASK.window + 1, MASK), length)
        all_near = tl.where(key_end <= prefix_end_of(MASK), length, all_near)
        any_near = tl.where(key < prefix_end_of(MASK), length, any_near)
        if has_exempt_queries(MASK):
            exempt = tl.maximum(position_of(exempt_id_of(history_end, MASK), MASK), key)
    any_near = tl.where(only_targets, key_end, tl.maximum(tl.minimum(any_near, length), key_end))
    exempt = tl.where(only_targets, length, exempt)

    full_0 = tl.cdiv(all_free, TILE)
    full_0_end = tl.maximum(tl.minimum(all_near, length) // TILE, full_0)
    full_1 = tl.maximum(tl.cdiv(exempt, TILE), full_0_end)
    num_full_1 = tl.maximum(length // TILE - full_1, 0)
    contextual_end = 0
    if MASK.num_contextual > 0:
        contextual_end = tl.where(only_targets, 0, tl.cdiv(tl.minimum(MASK.num_contextual, length), TILE))
    near = tl.maximum(key // TILE, contextual_end)
    near_end = tl.maximum(tl.cdiv(any_near, TILE), near)
    # `exempt` is the length where no query is exempt: then its tile, of which only the near part counts, is none.
    tail_end = tl.where(exempt < length, tl.cdiv(length, TILE), near_end)
    tail = tl.minimum(tl.maximum(exempt // TILE, near_end), tl.maximum(tail_end, near_end))
    tail_end = tl.maximum(tail_end, tail)
    num_visited = contextual_end + near_end - near + tail_end - tail
    num_full_0 = full_0_end - full_0
    return TileList(
        full_0,
        num_full_0,
        full_1,
        num_full_1,
        0,
        contextual_end,
        near - contextual_end,
        near_end,
        tail - near_end,
        num_visited - num_full_0 - num_full_1,
    )
