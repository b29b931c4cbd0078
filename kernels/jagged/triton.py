"""jagged_concat and jagged_split on GPUs: one kernel moves rows in either direction, each row read and written once."""

# L = rows of left, R = rows of right, S = L + R, B = sequences, C = elements of a row

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from ..launching import Launch

TILE = 4096
"""Elements of a program's tile: 32 per thread of four warps."""


@triton.jit
def jagged_kernel(
    joined_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    left_offsets_ptr: tl.tensor,
    right_offsets_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    right_prefix: tl.tensor,
    joins: tl.constexpr,
    tile_S: tl.constexpr,
    tile_C: tl.constexpr,
) -> None:
    """Move some rows from left and right to where they stand in the joined sequences, or back unless `joins`."""
    rows_S = tl.program_id(0).to(tl.int64) * tile_S + tl.arange(0, tile_S)
    columns_C = tl.program_id(1) * tile_C + tl.arange(0, tile_C)
    # The last sequence that starts at the row or before it is the one that holds it: empty ones come earlier.
    sequence_S, end_S = tl.zeros((tile_S,), tl.int64), tl.zeros((tile_S,), tl.int64) + num_sequences
    for _ in range(num_halvings):
        middle_S = (sequence_S + end_S) // 2
        starts_S = tl.load(left_offsets_ptr + middle_S) + tl.load(right_offsets_ptr + middle_S)
        sequence_S = tl.where(starts_S <= rows_S, middle_S, sequence_S)
        end_S = tl.where(starts_S <= rows_S, end_S, middle_S)

    left_start_S, right_start_S = tl.load(left_offsets_ptr + sequence_S), tl.load(right_offsets_ptr + sequence_S)
    num_left_S = tl.load(left_offsets_ptr + sequence_S + 1) - left_start_S
    num_right_S = tl.load(right_offsets_ptr + sequence_S + 1) - right_start_S
    index_S = rows_S - left_start_S - right_start_S
    left_index_S = index_S - tl.minimum(num_right_S, right_prefix)
    is_left_S = (left_index_S >= 0) & (left_index_S < num_left_S)
    left_row_S = left_start_S + left_index_S
    right_row_S = right_start_S + tl.where(left_index_S < 0, index_S, index_S - num_left_S)

    mask_SC = (rows_S < num_rows)[:, None] & (columns_C < width)[None, :]
    left_mask_SC, right_mask_SC = mask_SC & is_left_S[:, None], mask_SC & (is_left_S == 0)[:, None]
    joined_SC = joined_ptr + rows_S[:, None] * width + columns_C[None, :]
    left_SC = left_ptr + left_row_S[:, None] * width + columns_C[None, :]
    right_SC = right_ptr + right_row_S[:, None] * width + columns_C[None, :]
    if joins:
        tl.store(joined_SC, tl.load(left_SC, mask=left_mask_SC), mask=left_mask_SC)
        tl.store(joined_SC, tl.load(right_SC, mask=right_mask_SC), mask=right_mask_SC)
    else:
        row_SC = tl.load(joined_SC, mask=mask_SC)
        tl.store(left_SC, row_SC, mask=left_mask_SC)
        tl.store(right_SC, row_SC, mask=right_mask_SC)


def concat(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, right_prefix: int) -> Tensor:
    """`[L + R, ...]`; see jagged_concat."""
    joined = left.new_empty(len(left) + len(right), *left.shape[1:])
    tensors = (joined, left.contiguous(), right.contiguous(), left_offsets, right_offsets)
    jagged_launch(*tensors, right_prefix=right_prefix, joins=True).start()
    return joined


def split(
    x: Tensor, left_offsets: Tensor, right_offsets: Tensor, num_left: int, right_prefix: int
) -> tuple[Tensor, Tensor]:
    """left `[num_left, ...]` and right `[S - num_left, ...]`; see jagged_split."""
    left, right = (x.new_empty(num, *x.shape[1:]) for num in (num_left, len(x) - num_left))
    tensors = (x.contiguous(), left, right, left_offsets, right_offsets)
    jagged_launch(*tensors, right_prefix=right_prefix, joins=False).start()
    return left, right


def jagged_launch(
    joined: Tensor,
    left: Tensor,
    right: Tensor,
    left_offsets: Tensor,
    right_offsets: Tensor,
    *,
    right_prefix: int,
    joins: bool,
) -> Launch:
    """Write joined from left and right, or these from joined; all contiguous."""
    num_rows, width, num_sequences = len(joined), prod(joined.shape[1:]), len(left_offsets) - 1
    tile_C = min(1024, triton.next_power_of_2(max(1, width)))
    tile_S = min(256, TILE // tile_C)
    arguments = {
        "joined_ptr": joined,
        "left_ptr": left,
        "right_ptr": right,
        "left_offsets_ptr": left_offsets.contiguous(),
        "right_offsets_ptr": right_offsets.contiguous(),
        "num_rows": num_rows,
        "width": width,
        "num_sequences": num_sequences,
        "num_halvings": max(0, num_sequences - 1).bit_length(),
        "right_prefix": right_prefix,
        "joins": joins,
        "tile_S": tile_S,
        "tile_C": tile_C,
    }
    return Launch(jagged_kernel, (triton.cdiv(num_rows, tile_S), triton.cdiv(width, tile_C)), arguments)
