"""The forward kernel of HSTU attention: a program for each tile of queries loops over the keys that they see."""

import triton
import triton.language as tl

from .mask import edge_tile, full_tile, is_visible, key_tiles, num_full_tiles
from .scores import (
    dot,
    half_scores,
    load_rows,
    load_scale,
    load_sequence,
    load_tile,
    round_to,
    store_rows,
    tanh,
    zeros,
)


@triton.jit
def forward_kernel(q, k, v, out, k_tiles, v_tiles, scale, sequences, bias, half_alpha, VARIANT: tl.constexpr):
    """out_i = scale_i * sum over visible j of silu(s_ij) v_j."""
    sequence = load_sequence(sequences, VARIANT.mask)
    first_row = sequence.tile * VARIANT.rows
    if first_row >= sequence.length:
        return
    row_end = tl.minimum(first_row + VARIANT.rows, sequence.length)
    tiles = key_tiles(first_row, row_end, sequence.history_end, VARIANT.mask, VARIANT.keys)
    q_RD = load_rows(q, sequence, first_row, VARIANT.dqk, VARIANT.rows, VARIANT.block_dqk, True)
    total_RD = zeros(VARIANT.rows, VARIANT.block_dv)
    for number in tl.range(0, num_full_tiles(tiles)):
        first_key = full_tile(tiles, number) * VARIANT.keys
        total_RD = add_tile(
            total_RD, q_RD, k, v, k_tiles, v_tiles, first_row, first_key, sequence, bias, half_alpha,
            False, VARIANT.keys, VARIANT,
        )  # fmt: skip
    # Masks, and loads that check for the end of the sequence, take registers: tiles at the edge go in parts.
    num_parts = VARIANT.keys // VARIANT.edge_keys
    for number in tl.range(0, tiles.num_edge * num_parts, num_stages=1):
        first_key = edge_tile(tiles, number // num_parts) * VARIANT.keys + number % num_parts * VARIANT.edge_keys
        total_RD = add_tile(
            total_RD, q_RD, k, v, k_tiles, v_tiles, first_row, first_key, sequence, bias, half_alpha,
            True, VARIANT.edge_keys, VARIANT,
        )  # fmt: skip
    scale_R = load_scale(scale, sequence, first_row, VARIANT.rows)
    store_rows(
        out, total_RD * scale_R[:, None], sequence, first_row, VARIANT.dv, VARIANT.rows, VARIANT.block_dv, VARIANT
    )


@triton.jit
def add_tile(
    total_RD, q_RD, k, v, k_tiles, v_tiles, first_row, first_key, sequence, bias, half_alpha,
    EDGE: tl.constexpr, KEYS: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Add what KEYS keys from first_key on contribute; only a tile at the EDGE has hidden scores.

    With h = s / 2, silu(s) = h + h tanh(h): one special-function instruction.
    """
    k_CD = load_tile(k, k_tiles, sequence, first_key, VARIANT.dqk, KEYS, VARIANT.block_dqk, EDGE)
    v_CD = load_tile(v, v_tiles, sequence, first_key, VARIANT.dv, KEYS, VARIANT.block_dv, EDGE)
    rows = first_row + tl.arange(0, VARIANT.rows)[:, None]
    keys = first_key + tl.arange(0, KEYS)[None, :]
    products_RC = dot(q_RD, tl.trans(k_CD), None, VARIANT)
    h_RC = half_scores(products_RC, rows, keys, sequence, bias, half_alpha)
    weights_RC = h_RC + h_RC * tanh(h_RC, VARIANT.tanh)
    if EDGE:
        visible = is_visible(rows, keys, sequence.history_end, VARIANT.mask, VARIANT.has_targets)
        weights_RC = tl.where(visible, weights_RC, 0.0)
    return dot(round_to(weights_RC, v_CD.dtype, VARIANT), v_CD, total_RD, VARIANT)
