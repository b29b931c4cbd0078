"""The definition of jagged_concat and jagged_split in plain torch; gradients by autograd."""

from itertools import pairwise

import torch
from torch import Tensor

from .inputs import check_values


def concat(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, right_prefix: int) -> Tensor:
    """`[right_b[:P], left_b, right_b[P:]]` for each sequence b; see jagged_concat."""
    check_values(left_offsets, right_offsets, num_left=len(left), num_right=len(right))
    parts = [left[:0], right[:0]]
    for left_bounds, right_bounds in zip(
        pairwise(left_offsets.tolist()), pairwise(right_offsets.tolist()), strict=True
    ):
        left_b, right_b = left[slice(*left_bounds)], right[slice(*right_bounds)]
        parts += [right_b[:right_prefix], left_b, right_b[right_prefix:]]
    return torch.cat(parts)


def split(
    x: Tensor, left_offsets: Tensor, right_offsets: Tensor, num_left: int, right_prefix: int
) -> tuple[Tensor, Tensor]:
    """The parts that concat would make x of; see jagged_split."""
    check_values(left_offsets, right_offsets, num_left=num_left, num_right=len(x) - num_left)
    lefts, rights, start = [x[:0]], [x[:0]], 0
    for num_left_b, num_right_b in zip(left_offsets.diff().tolist(), right_offsets.diff().tolist(), strict=True):
        num_first = min(right_prefix, num_right_b)
        sizes = [num_first, num_left_b, num_right_b - num_first]
        first, left_b, rest = torch.split(x[start : start + sum(sizes)], sizes)
        lefts.append(left_b)
        rights += [first, rest]
        start += sum(sizes)
    return torch.cat(lefts), torch.cat(rights)
