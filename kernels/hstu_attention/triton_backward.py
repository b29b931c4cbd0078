"""The backward kernels of HSTU attention: one pass for the gradients of k and v, another for those of q and scale.

Each sum is that of one program in a fixed order, so repeated calls give the same bits. Scores are computed again.
"""

# R = queries and C = keys of a tile, D = head width

import triton
import triton.language as tl

from .triton_mask import edge_tile, full_tile, is_visible, key_tiles, num_full_tiles, query_tiles
from .triton_scores import (
    PRECISION,
    half_scores,
    load_rows,
    load_scale,
    load_sequence,
    silu_and_slope,
    store_rows,
    zeros,
)


@triton.jit
def keys_kernel(q, k, v, dout, dk, dv, scale, sequences, bias, half_alpha, VARIANT: tl.constexpr):
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
            dk_CD, dv_CD, q, k_CD, v_CD, dout, scale, first_row, first_key, sequence, bias, half_alpha, False, VARIANT
        )
    for number in tl.range(0, tiles.num_edge):
        first_row = edge_tile(tiles, number) * VARIANT.rows
        dk_CD, dv_CD = add_queries(
            dk_CD, dv_CD, q, k_CD, v_CD, dout, scale, first_row, first_key, sequence, bias, half_alpha, True, VARIANT
        )
    dk_CD *= half_alpha
    if VARIANT.uniform_scale:
        one_scale = tl.load(scale.data).to(tl.float32)
        dk_CD *= one_scale
        dv_CD *= one_scale
    store_rows(dk, dk_CD, sequence, first_key, VARIANT.dqk, VARIANT.keys, VARIANT.block_dqk)
    store_rows(dv, dv_CD, sequence, first_key, VARIANT.dv, VARIANT.keys, VARIANT.block_dv)


@triton.jit
def add_queries(
    dk_CD, dv_CD, q, k_CD, v_CD, dout, scale, first_row, first_key, sequence, bias, half_alpha,
    EDGE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Add what the queries from first_row on contribute, without half_alpha and without a uniform scale.

    All scores are transposed: then they are the left operands of both sums, which may stay in registers.
    """
    q_RD = load_rows(q, sequence, first_row, VARIANT.dqk, VARIANT.rows, VARIANT.block_dqk, EDGE)
    dout_RD = load_rows(dout, sequence, first_row, VARIANT.dv, VARIANT.rows, VARIANT.block_dv, EDGE)
    rows = first_row + tl.arange(0, VARIANT.rows)[None, :]
    keys = first_key + tl.arange(0, VARIANT.keys)[:, None]
    products_CR = tl.dot(k_CD, tl.trans(q_RD), input_precision=PRECISION)
    h_CR = half_scores(products_CR, rows, keys, sequence, bias, half_alpha)
    weights_CR, slopes_CR = silu_and_slope(h_CR, VARIANT.hardware_tanh)
    dscores_CR = slopes_CR * tl.dot(v_CD, tl.trans(dout_RD), input_precision=PRECISION)
    if not VARIANT.uniform_scale:
        scale_R = load_scale(scale, sequence, first_row, VARIANT.rows)
        weights_CR *= scale_R[None, :]
        dscores_CR *= scale_R[None, :]
    if EDGE:
        visible = is_visible(rows, keys, sequence.history_end, VARIANT.mask, VARIANT.has_targets)
        weights_CR = tl.where(visible, weights_CR, 0.0)
        dscores_CR = tl.where(visible, dscores_CR, 0.0)
    dv_CD = tl.dot(weights_CR.to(dout_RD.dtype), dout_RD, dv_CD, input_precision=PRECISION)
    dk_CD = tl.dot(dscores_CR.to(q_RD.dtype), q_RD, dk_CD, input_precision=PRECISION)
    return dk_CD, dv_CD


@triton.jit
def queries_kernel(q, k, v, dout, dq, dscale, scale, sequences, bias, half_alpha, VARIANT: tl.constexpr):
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
            dq_RD, dscale_R1, q_RD, k, v, dout_RD, dscale, first_row, first_key, sequence, bias, half_alpha,
            False, VARIANT,
        )  # fmt: skip
    for number in tl.range(0, tiles.num_edge):
        first_key = edge_tile(tiles, number) * VARIANT.keys
        dq_RD, dscale_R1 = add_keys(
            dq_RD, dscale_R1, q_RD, k, v, dout_RD, dscale, first_row, first_key, sequence, bias, half_alpha,
            True, VARIANT,
        )  # fmt: skip
    scale_R = load_scale(scale, sequence, first_row, VARIANT.rows).to(tl.float32)
    dq_RD *= (half_alpha * scale_R)[:, None]
    store_rows(dq, dq_RD, sequence, first_row, VARIANT.dqk, VARIANT.rows, VARIANT.block_dqk)
    if dscale is not None:
        store_rows(dscale, dscale_R1, sequence, first_row, 1, VARIANT.rows, 1)


@triton.jit
def add_keys(
    dq_RD, dscale_R1, q_RD, k, v, dout_RD, dscale, first_row, first_key, sequence, bias, half_alpha,
    EDGE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Add what the keys from first_key on contribute, without half_alpha and without the scale."""
    k_CD = load_rows(k, sequence, first_key, VARIANT.dqk, VARIANT.keys, VARIANT.block_dqk, EDGE)
    v_CD = load_rows(v, sequence, first_key, VARIANT.dv, VARIANT.keys, VARIANT.block_dv, EDGE)
    rows = first_row + tl.arange(0, VARIANT.rows)[:, None]
    keys = first_key + tl.arange(0, VARIANT.keys)[None, :]
    products_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION)
    h_RC = half_scores(products_RC, rows, keys, sequence, bias, half_alpha)
    weights_RC, slopes_RC = silu_and_slope(h_RC, VARIANT.hardware_tanh)
    dweights_RC = tl.dot(dout_RD, tl.trans(v_CD), input_precision=PRECISION)
    if EDGE:
        visible = is_visible(rows, keys, sequence.history_end, VARIANT.mask, VARIANT.has_targets)
        dweights_RC = tl.where(visible, dweights_RC, 0.0)
    if dscale is not None:
        dscale_R1 += tl.sum(weights_RC * dweights_RC, 1, keep_dims=True)
    dscores_RC = (slopes_RC * dweights_RC).to(k_CD.dtype)
    return tl.dot(dscores_RC, k_CD, dq_RD, input_precision=PRECISION), dscale_R1
