"""The backward kernels of HSTU attention: one pass for the gradients of k and v, another for those of q and scale.

Each sum is that of one program in a fixed order, so repeated calls give the same bits. Scores are computed again.
"""

# R = queries and C = keys of a tile, D = head width

import triton
import triton.language as tl

from .mask import edge_tile, full_tile, is_visible, key_tiles, num_full_tiles, query_tiles
from .scores import (
    HIDDEN_TANH,
    dot,
    half_scores,
    load_rows,
    load_scale,
    load_sequence,
    load_tile,
    round_to,
    silu_and_excess_slope,
    store_rows,
    tanh,
    zeros,
)


@triton.jit
def keys_kernel(q, k, v, dout, dk, dv, q_tiles, dout_tiles, scale, sequences, bias, half_alpha, VARIANT: tl.constexpr):
    """Gradients of a tile of keys and values, summed over the queries that see it."""
    sequence = load_sequence(sequences, VARIANT.mask)
    # Early keys are seen by most queries: the reverse of the forward.
    first_key = (sequences.num_tiles - 1 - sequence.tile) * VARIANT.keys
    if first_key >= sequence.length:
        return
    key_end = tl.minimum(first_key + VARIANT.keys, sequence.length)
    tiles = query_tiles(first_key, key_end, sequence.length, sequence.history_end, VARIANT.mask, VARIANT.rows)
    k_CD = load_rows(k, sequence, first_key, VARIANT.dqk, VARIANT.keys, VARIANT.block_dqk, True)
    v_CD = load_rows(v, sequence, first_key, VARIANT.dv, VARIANT.keys, VARIANT.block_dv, True)
    dk_CD = zeros(VARIANT.keys, VARIANT.block_dqk)
    dv_CD = zeros(VARIANT.keys, VARIANT.block_dv)
    for number in tl.range(0, num_full_tiles(tiles)):
        first_row = full_tile(tiles, number) * VARIANT.rows
        dk_CD, dv_CD = add_queries(
            dk_CD, dv_CD, q, k_CD, v_CD, dout, q_tiles, dout_tiles, scale, first_row, first_key, sequence, bias,
            half_alpha, False, VARIANT.rows, VARIANT,
        )  # fmt: skip
    # Loads that check for the end of the sequence take registers: tiles at the edge go in parts.
    num_parts = VARIANT.rows // VARIANT.edge_rows
    for number in tl.range(0, tiles.num_edge * num_parts, num_stages=1):
        first_row = edge_tile(tiles, number // num_parts) * VARIANT.rows + number % num_parts * VARIANT.edge_rows
        dk_CD, dv_CD = add_queries(
            dk_CD, dv_CD, q, k_CD, v_CD, dout, q_tiles, dout_tiles, scale, first_row, first_key, sequence, bias,
            half_alpha, True, VARIANT.edge_rows, VARIANT,
        )  # fmt: skip
    dk_CD *= half_alpha
    if VARIANT.uniform_scale:
        one_scale = tl.load(scale.data).to(tl.float32)
        dk_CD *= one_scale
        dv_CD *= one_scale
    store_rows(dk, dk_CD, sequence, first_key, VARIANT.dqk, VARIANT.keys, VARIANT.block_dqk, VARIANT)
    store_rows(dv, dv_CD, sequence, first_key, VARIANT.dv, VARIANT.keys, VARIANT.block_dv, VARIANT)


@triton.jit
def add_queries(
    dk_CD, dv_CD, q, k_CD, v_CD, dout, q_tiles, dout_tiles, scale, first_row, first_key, sequence, bias, half_alpha,
    EDGE: tl.constexpr, ROWS: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Add what ROWS queries from first_row on contribute, without half_alpha and without a uniform scale.

    All scores are transposed: then they are the left operands of both sums, which may stay in registers.
    """
    q_RD = load_tile(q, q_tiles, sequence, first_row, VARIANT.dqk, ROWS, VARIANT.block_dqk, EDGE)
    dout_RD = load_tile(dout, dout_tiles, sequence, first_row, VARIANT.dv, ROWS, VARIANT.block_dv, EDGE)
    rows = first_row + tl.arange(0, ROWS)[None, :]
    keys = first_key + tl.arange(0, VARIANT.keys)[:, None]
    products_CR = dot(k_CD, tl.trans(q_RD), None, VARIANT)
    h_CR = half_scores(products_CR, rows, keys, sequence, bias, half_alpha)
    tanh_CR = tanh(h_CR, VARIANT.tanh)
    if EDGE:
        visible = is_visible(rows, keys, sequence.history_end, VARIANT.mask, VARIANT.has_targets)
        tanh_CR = tl.where(visible, tanh_CR, HIDDEN_TANH)
    weights_CR, excess_CR = silu_and_excess_slope(h_CR, tanh_CR)
    if VARIANT.uniform_scale:
        dweights_CR = dot(v_CD, tl.trans(dout_RD), None, VARIANT)
        dscores_CR = dweights_CR + dweights_CR * excess_CR
    else:
        # Before the product: while it runs the scale then takes no registers, which lets a tile have 64 queries.
        scale_R = load_scale(scale, sequence, first_row, ROWS)
        weights_CR *= scale_R[None, :]
        slopes_CR = scale_R[None, :] + scale_R[None, :] * excess_CR
        dscores_CR = dot(v_CD, tl.trans(dout_RD), None, VARIANT) * slopes_CR
    dv_CD = dot(round_to(weights_CR, dout_RD.dtype, VARIANT), dout_RD, dv_CD, VARIANT)
    dk_CD = dot(round_to(dscores_CR, q_RD.dtype, VARIANT), q_RD, dk_CD, VARIANT)
    return dk_CD, dv_CD


@triton.jit
def queries_kernel(
    q, k, v, dout, dq, dscale, k_tiles, v_tiles, scale, sequences, bias, half_alpha, VARIANT: tl.constexpr
):
    """Gradients of a tile of queries, summed over the keys they see; of their scale, too, unless dscale is None."""
    sequence = load_sequence(sequences, VARIANT.mask)
    first_row = sequence.tile * VARIANT.rows
    if first_row >= sequence.length:
        return
    row_end = tl.minimum(first_row + VARIANT.rows, sequence.length)
    tiles = key_tiles(first_row, row_end, sequence.history_end, VARIANT.mask, VARIANT.keys)
    q_RD = load_rows(q, sequence, first_row, VARIANT.dqk, VARIANT.rows, VARIANT.block_dqk, True)
    dout_RD = load_rows(dout, sequence, first_row, VARIANT.dv, VARIANT.rows, VARIANT.block_dv, True)
    dq_RD = zeros(VARIANT.rows, VARIANT.block_dqk)
    dscale_R1 = zeros(VARIANT.rows, 1)
    for number in tl.range(0, num_full_tiles(tiles)):
        first_key = full_tile(tiles, number) * VARIANT.keys
        dq_RD, dscale_R1 = add_keys(
            dq_RD, dscale_R1, q_RD, k, v, k_tiles, v_tiles, dout_RD, dscale, first_row, first_key, sequence, bias,
            half_alpha, False, VARIANT.keys, VARIANT,
        )  # fmt: skip
    num_parts = VARIANT.keys // VARIANT.edge_keys
    for number in tl.range(0, tiles.num_edge * num_parts, num_stages=1):
        first_key = edge_tile(tiles, number // num_parts) * VARIANT.keys + number % num_parts * VARIANT.edge_keys
        dq_RD, dscale_R1 = add_keys(
            dq_RD, dscale_R1, q_RD, k, v, k_tiles, v_tiles, dout_RD, dscale, first_row, first_key, sequence, bias,
            half_alpha, True, VARIANT.edge_keys, VARIANT,
        )  # fmt: skip
    scale_R = load_scale(scale, sequence, first_row, VARIANT.rows)
    dq_RD *= (half_alpha * scale_R)[:, None]
    store_rows(dq, dq_RD, sequence, first_row, VARIANT.dqk, VARIANT.rows, VARIANT.block_dqk, VARIANT)
    if dscale is not None:
        store_rows(dscale, dscale_R1, sequence, first_row, 1, VARIANT.rows, 1, VARIANT)


@triton.jit
def add_keys(
    dq_RD, dscale_R1, q_RD, k, v, k_tiles, v_tiles, dout_RD, dscale, first_row, first_key, sequence, bias, half_alpha,
    EDGE: tl.constexpr, KEYS: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Add what KEYS keys from first_key on contribute, without half_alpha and without the scale."""
    k_CD = load_tile(k, k_tiles, sequence, first_key, VARIANT.dqk, KEYS, VARIANT.block_dqk, EDGE)
    v_CD = load_tile(v, v_tiles, sequence, first_key, VARIANT.dv, KEYS, VARIANT.block_dv, EDGE)
    rows = first_row + tl.arange(0, VARIANT.rows)[:, None]
    keys = first_key + tl.arange(0, KEYS)[None, :]
    products_RC = dot(q_RD, tl.trans(k_CD), None, VARIANT)
    h_RC = half_scores(products_RC, rows, keys, sequence, bias, half_alpha)
    tanh_RC = tanh(h_RC, VARIANT.tanh)
    if EDGE:
        visible = is_visible(rows, keys, sequence.history_end, VARIANT.mask, VARIANT.has_targets)
        tanh_RC = tl.where(visible, tanh_RC, HIDDEN_TANH)
    weights_RC, excess_RC = silu_and_excess_slope(h_RC, tanh_RC)
    dweights_RC = dot(dout_RD, tl.trans(v_CD), None, VARIANT)
    if dscale is not None:
        dscale_R1 += tl.sum(weights_RC * dweights_RC, 1, keep_dims=True)
    dscores_RC = round_to(dweights_RC + dweights_RC * excess_RC, k_CD.dtype, VARIANT)
    return dot(dscores_RC, k_CD, dq_RD, VARIANT), dscale_R1
