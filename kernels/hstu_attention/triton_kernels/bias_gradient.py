"""The gradients of the position and time weights, in a pass of their own.

A program takes a band, the tiles whose queries are a fixed number of tiles behind their keys. In all of them, of every
sequence and head, an element belongs to the same position weight: they are summed up element by element, in a fixed
order. Time weights are summed up in integers, which give the same bits in any order.
"""

# R = queries and C = keys of a tile, D = head width

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .mask import is_hidden, is_visible
from .scores import (
    dot,
    half_scores,
    load_rows,
    load_scale,
    load_sequence_of,
    silu_and_excess_slope,
    tanh,
    time_bucket_of,
    zeros,
)


class Buckets(NamedTuple):
    """Sums `[num_copies, num_buckets]` int64; the copies are there so that fewer programs wait for each other."""

    sums: Any
    units_per_one: Any
    """One float32, a power of 2: how many units of the sums make 1."""
    num_copies: Any
    num_buckets: Any
    not_finite: Any
    """`[num_buckets]` float32: NaN for a bucket with a gradient that is none or infinite, which integers cannot say."""


@triton.jit
def bias_kernel(
    q, k, v, dout, bands, buckets, scale, sequences, num_sequences, num_chunks, num_bands, bias, half_alpha,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """One band of every num_chunks-th sequence.

    bands: `[num_bands, num_chunks, R, C]` float32, written: sums over the tiles of a band; None without such weights.
    buckets: sums over the scores of a time bucket; None without such weights.
    """
    program = tl.program_id(0)
    chunk = program % num_chunks
    # Bands next to the diagonal have the most tiles: they come first. Bands above it, if there are any, come last.
    band = program // num_chunks
    band = tl.where(band < sequences.num_tiles, band, sequences.num_tiles - 1 - band)
    band_RC = zeros(VARIANT.rows, VARIANT.keys)
    for rank in range(chunk, num_sequences, num_chunks):
        sequence = load_sequence_of(sequences, rank, 0, 0, VARIANT.mask)
        num_tiles = tl.cdiv(sequence.length, VARIANT.rows)
        for tile in range(tl.maximum(band, 0), tl.minimum(num_tiles + band, num_tiles)):
            first_row, first_key = tile * VARIANT.rows, (tile - band) * VARIANT.keys
            row_end = tl.minimum(first_row + VARIANT.rows, sequence.length)
            key_end = tl.minimum(first_key + VARIANT.keys, sequence.length)
            if not is_hidden(first_row, row_end, first_key, key_end, sequence.history_end, VARIANT.mask):
                dscores_RC = sum_over_heads(
                    q, k, v, dout, scale, first_row, first_key, sequences, rank, bias, half_alpha, VARIANT
                )
                band_RC += dscores_RC
                if buckets is not None:
                    add_to_buckets(buckets, dscores_RC, first_row, first_key, sequence, bias, VARIANT)
    if bands is not None:
        index = (band + num_bands - sequences.num_tiles) * num_chunks + chunk
        within = tl.arange(0, VARIANT.rows)[:, None] * VARIANT.keys + tl.arange(0, VARIANT.keys)[None, :]
        tl.store(bands + index.to(tl.int64) * (VARIANT.rows * VARIANT.keys) + within, band_RC)


@triton.jit
def sum_over_heads(
    q, k, v, dout, scale, first_row, first_key, sequences, rank, bias, half_alpha, VARIANT: tl.constexpr
):
    """`[R, C]`: the gradient of a tile of scores, of all heads together."""
    dscores_RC = zeros(VARIANT.rows, VARIANT.keys)
    rows = first_row + tl.arange(0, VARIANT.rows)[:, None]
    keys = first_key + tl.arange(0, VARIANT.keys)[None, :]
    for head in range(sequences.num_heads):
        sequence = load_sequence_of(sequences, rank, head, 0, VARIANT.mask)
        q_RD = load_rows(q, sequence, first_row, VARIANT.dqk, VARIANT.rows, VARIANT.block_dqk, True)
        k_CD = load_rows(k, sequence, first_key, VARIANT.dqk, VARIANT.keys, VARIANT.block_dqk, True)
        v_CD = load_rows(v, sequence, first_key, VARIANT.dv, VARIANT.keys, VARIANT.block_dv, True)
        dout_RD = load_rows(dout, sequence, first_row, VARIANT.dv, VARIANT.rows, VARIANT.block_dv, True)
        products_RC = dot(q_RD, tl.trans(k_CD), None, VARIANT)
        h_RC = half_scores(products_RC, rows, keys, sequence, bias, half_alpha)
        _, excess_RC = silu_and_excess_slope(h_RC, tanh(h_RC, VARIANT.tanh))
        dweights_RC = dot(dout_RD, tl.trans(v_CD), None, VARIANT)
        dscores_RC += dweights_RC + dweights_RC * excess_RC
    sequence = load_sequence_of(sequences, rank, 0, 0, VARIANT.mask)
    half_scale_R = 0.5 * load_scale(scale, sequence, first_row, VARIANT.rows)
    visible = is_visible(rows, keys, sequence.history_end, VARIANT.mask, VARIANT.has_targets)
    # Rows behind the sequence see keys, too, and one of NaN makes NaN of their zeros.
    visible = visible & (rows < sequence.length)
    return tl.where(visible, dscores_RC * half_scale_R[:, None], 0.0)


@triton.jit
def add_to_buckets(buckets, dscores_RC, first_row, first_key, sequence, bias, VARIANT: tl.constexpr):
    """Add a tile to the sums of its time buckets, as integers: those have no rounding that depends on the order."""
    last = sequence.length - 1
    rows = tl.minimum(first_row + tl.arange(0, VARIANT.rows)[:, None], last)
    keys = tl.minimum(first_key + tl.arange(0, VARIANT.keys)[None, :], last)
    bucket_RC = time_bucket_of(rows, keys, sequence, bias)
    is_finite = tl.abs(dscores_RC) < float("inf")
    tl.store(buckets.not_finite + bucket_RC, float("nan"), mask=is_finite == 0)
    units = tl.where(is_finite, dscores_RC * tl.load(buckets.units_per_one), 0.0)
    # To nearest: cut off, as the conversion does, all sums would come out too small.
    units = (units + tl.where(units < 0, -0.5, 0.5)).to(tl.int64)
    copy = tl.program_id(0) % buckets.num_copies
    pointers = buckets.sums + copy * buckets.num_buckets + bucket_RC
    tl.atomic_add(pointers, units, mask=units != 0, sem="relaxed")
