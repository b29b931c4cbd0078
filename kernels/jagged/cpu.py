"""jagged_concat and jagged_split in plain torch, without a loop over sequences."""

# L = rows of left, R = rows of right, S = L + R, B = sequences

import torch
from torch import Tensor


def concat(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, right_prefix: int) -> Tensor:
    """`[L + R, ...]`; see jagged_concat."""
    is_left_S = _is_left(left_offsets, right_offsets, right_prefix, num_rows=len(left) + len(right))
    num_left_S = is_left_S.cumsum(0)
    right_row_S = torch.arange(len(left), len(left) + len(is_left_S), device=left.device) - num_left_S
    row_S = torch.where(is_left_S, num_left_S - 1, right_row_S)
    # On one core of an EPYC 16,000 x 64 floats took 0.25 ms so, and 0.6 by index_copy_ of either part.
    return torch.cat([left, right]).index_select(0, row_S)


def split(
    x: Tensor, left_offsets: Tensor, right_offsets: Tensor, num_left: int, right_prefix: int
) -> tuple[Tensor, Tensor]:
    """left `[num_left, ...]` and right `[S - num_left, ...]`; see jagged_split."""
    is_left_S = _is_left(left_offsets, right_offsets, right_prefix, num_rows=len(x))
    left_rows, right_rows = is_left_S.nonzero().flatten(), is_left_S.logical_not_().nonzero().flatten()
    return x.index_select(0, left_rows), x.index_select(0, right_rows)


def _is_left(left_offsets: Tensor, right_offsets: Tensor, right_prefix: int, *, num_rows: int) -> Tensor:
    """Bool `[S]`: which rows of the joined sequences are left's. On either side the rows keep their order."""
    starts_B = (left_offsets + right_offsets)[:-1] + right_offsets.diff().clamp(max=right_prefix)
    # One more at the first of left's rows, one less behind the last; where both meet they cancel.
    change = torch.zeros(num_rows + 1, dtype=torch.int32, device=left_offsets.device)
    change.index_add_(0, starts_B, torch.ones_like(starts_B, dtype=torch.int32))
    change.index_add_(0, starts_B + left_offsets.diff(), torch.full_like(starts_B, -1, dtype=torch.int32))
    return change[:-1].cumsum(0) > 0
