"""position_time_encoding on GPUs: a kernel for the tokens, and one for sums over the tokens of a table's row."""

# T = tokens, E = model width, P = positions, K = time buckets, M = parts of the sums, R = rows of a table

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Launch, contiguous

TILE = 4096
"""Elements of a program's tile: 32 per thread of four warps."""
PART = 128
"""Tokens that one program sums. All targets share a position: one program per row of the table would sum them alone."""


@triton.jit
def encode_kernel(
    x_ptr: tl.tensor,
    position_weight_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    time_weight_ptr: tl.tensor,
    buckets_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    num_positions: tl.tensor,
    num_buckets: tl.tensor,
    scale: tl.tensor,
    tile_T: tl.constexpr,
    tile_E: tl.constexpr,
) -> None:
    """Scale some columns of some tokens, and add the rows of the tables."""
    tokens_T = tl.program_id(0).to(tl.int64) * tile_T + tl.arange(0, tile_T)
    columns_E = tl.program_id(1) * tile_E + tl.arange(0, tile_E)
    has_token, has_column = tokens_T < num_tokens, columns_E < width
    place_TE, mask_TE = tokens_T[:, None] * width + columns_E[None, :], has_token[:, None] & has_column[None, :]
    out_TE = tl.load(x_ptr + place_TE, mask=mask_TE, other=0.0).to(tl.float32) * scale
    if position_weight_ptr is not None:
        out_TE += _table_rows(
            position_weight_ptr, positions_ptr, tokens_T, columns_E, has_token, has_column, num_positions, width
        )
    if time_weight_ptr is not None:
        out_TE += _table_rows(
            time_weight_ptr, buckets_ptr, tokens_T, columns_E, has_token, has_column, num_buckets, width
        )
    tl.store(out_ptr + place_TE, out_TE.to(out_ptr.dtype.element_ty), mask=mask_TE)


@triton.jit
def _table_rows(
    weight_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    tokens_T: tl.tensor,
    columns_E: tl.tensor,
    has_token: tl.tensor,
    has_column: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """The tokens' rows of a table, NaN where it has no such row."""
    rows_T = tl.load(rows_ptr + tokens_T, mask=has_token, other=-1)
    has_row = (rows_T >= 0) & (rows_T < num_rows)
    place_TE, mask_TE = rows_T[:, None] * width + columns_E[None, :], has_row[:, None] & has_column[None, :]
    return tl.load(weight_ptr + place_TE, mask=mask_TE, other=float("nan")).to(tl.float32)


@triton.jit
def sums_kernel(
    x_ptr: tl.tensor,
    order_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    tile_T: tl.constexpr,
    tile_E: tl.constexpr,
) -> None:
    """Sum the rows of x from a start to an end, in `order` if there is one."""
    columns_E = tl.program_id(1) * tile_E + tl.arange(0, tile_E)
    has_column = columns_E < width
    start, end = tl.load(starts_ptr + tl.program_id(0)), tl.load(ends_ptr + tl.program_id(0))
    sum_TE = tl.zeros((tile_T, tile_E), tl.float32)
    for first in range(start, end, tile_T):
        rows_T = first + tl.arange(0, tile_T)
        has_row = rows_T < end
        if order_ptr is not None:
            rows_T = tl.load(order_ptr + rows_T, mask=has_row, other=0)
        place_TE, mask_TE = rows_T[:, None] * width + columns_E[None, :], has_row[:, None] & has_column[None, :]
        sum_TE += tl.load(x_ptr + place_TE, mask=mask_TE, other=0.0).to(tl.float32)
    place_E = tl.program_id(0).to(tl.int64) * width + columns_E
    tl.store(out_ptr + place_E, tl.sum(sum_TE, 0), mask=has_column)


def forward(
    x_TE: Tensor,
    position_weight_PE: Tensor | None,
    positions_T: Tensor | None,
    time_weight_KE: Tensor | None,
    buckets_T: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """`[T, E]` in dtype."""
    out_TE = x_TE.new_empty(x_TE.shape, dtype=dtype)
    tables = (position_weight_PE, positions_T, time_weight_KE, buckets_T)
    encode_launch(x_TE.contiguous(), *tables, out_TE, scale=scale).start()
    return out_TE


def row_sums(x_TE: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
    """For each of num_rows the sum of the rows of x that name it, `[num_rows, E]` in float32.

    In two steps, of which the first sums PART tokens at most, and in the order of the tokens: without atomics.
    """
    sorted_T, order_T = rows_T.sort(stable=True)
    bounds = torch.searchsorted(sorted_T, torch.arange(num_rows + 1, device=rows_T.device))
    starts_R, ends_R = bounds[:-1], bounds[1:]
    last_part_R = ((ends_R - starts_R + PART - 1) // PART).cumsum(0)
    first_part_R = torch.cat([last_part_R.new_zeros(1), last_part_R[:-1]])
    # As many as there can be, because the host would have to wait for their number: the others are empty.
    parts_M = torch.arange(num_rows + len(rows_T) // PART, device=rows_T.device)
    row_M = torch.searchsorted(last_part_R, parts_M, right=True).clamp_(max=num_rows - 1)
    starts_M = torch.minimum(starts_R[row_M] + (parts_M - first_part_R[row_M]) * PART, ends_R[row_M])
    ends_M = torch.minimum(starts_M + PART, ends_R[row_M])
    sums_ME = x_TE.new_empty(len(parts_M), x_TE.shape[1], dtype=torch.float32)
    sums_launch(x_TE.contiguous(), order_T, starts_M, ends_M, sums_ME).start()
    sums_RE = sums_ME.new_empty(num_rows, x_TE.shape[1])
    sums_launch(sums_ME, None, first_part_R, last_part_R, sums_RE).start()
    return sums_RE


def encode_launch(
    x_TE: Tensor,
    position_weight_PE: Tensor | None,
    positions_T: Tensor | None,
    time_weight_KE: Tensor | None,
    buckets_T: Tensor | None,
    out_TE: Tensor,
    *,
    scale: float,
) -> Launch:
    """Write the encoded tokens; x and out are contiguous."""
    arguments = {
        "x_ptr": x_TE,
        "position_weight_ptr": contiguous(position_weight_PE),
        "positions_ptr": contiguous(positions_T),
        "time_weight_ptr": contiguous(time_weight_KE),
        "buckets_ptr": contiguous(buckets_T),
        "out_ptr": out_TE,
        "num_tokens": len(x_TE),
        "width": x_TE.shape[1],
        "num_positions": 0 if position_weight_PE is None else len(position_weight_PE),
        "num_buckets": 0 if time_weight_KE is None else len(time_weight_KE),
        "scale": scale,
    } | _tiles(x_TE.shape[1])
    grid = (triton.cdiv(len(x_TE), arguments["tile_T"]), triton.cdiv(x_TE.shape[1], arguments["tile_E"]))
    return Launch(encode_kernel, grid, arguments)


def sums_launch(x_TE: Tensor, order_T: Tensor | None, starts_M: Tensor, ends_M: Tensor, out_ME: Tensor) -> Launch:
    """Write the sum of the rows from each start to its end."""
    arguments = {
        "x_ptr": x_TE,
        "order_ptr": order_T,
        "starts_ptr": starts_M.contiguous(),
        "ends_ptr": ends_M.contiguous(),
        "out_ptr": out_ME,
        "width": x_TE.shape[1],
    } | _tiles(x_TE.shape[1])
    return Launch(sums_kernel, (len(out_ME), triton.cdiv(x_TE.shape[1], arguments["tile_E"])), arguments)


def _tiles(width: int) -> dict[str, int]:
    tile_E = min(256, triton.next_power_of_2(max(1, width)))
    return {"tile_T": min(64, TILE // tile_E), "tile_E": tile_E}
