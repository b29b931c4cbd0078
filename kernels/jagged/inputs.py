"""What jagged_concat and jagged_split accept."""

import torch
from torch import Tensor

from ..checks import check_device


def check_pair(left: Tensor, right: Tensor) -> None:
    """Raise ValueError unless left and right hold rows of one shape and dtype."""
    if left.dim() == 0 or right.dim() == 0 or left.shape[1:] != right.shape[1:] or left.dtype != right.dtype:
        raise ValueError(
            f"left is {left.dtype} of shape {tuple(left.shape)} but right {right.dtype} of shape {tuple(right.shape)}; "
            "they take rows of one shape and dtype"
        )
    check_device(left, {"right": right})


def check_offsets(left_offsets: Tensor, right_offsets: Tensor) -> None:
    """Raise ValueError unless both are vectors of integers, with an entry more than there are sequences."""
    for name, offsets in (("left_offsets", left_offsets), ("right_offsets", right_offsets)):
        if offsets.dim() != 1 or offsets.shape[0] == 0 or offsets.dtype not in (torch.int32, torch.int64):
            shape = tuple(offsets.shape)
            raise ValueError(f"{name} is {offsets.dtype} of shape {shape}; it takes B + 1 int32 or int64 numbers")
    if left_offsets.shape != right_offsets.shape:
        raise ValueError(
            f"left_offsets has {len(left_offsets)} entries but right_offsets {len(right_offsets)}; both describe the "
            "same sequences"
        )


def check_values(left_offsets: Tensor, right_offsets: Tensor, *, num_left: int, num_right: int) -> None:
    """Raise ValueError unless offsets on a CPU ascend from 0 to the number of rows."""
    for name, offsets, num_rows in (("left", left_offsets, num_left), ("right", right_offsets, num_right)):
        if offsets.device.type != "cpu":
            return
        if offsets[0] != 0 or offsets[-1] != num_rows or (offsets.diff() < 0).any():
            raise ValueError(
                f"{name}_offsets go from {int(offsets[0])} to {int(offsets[-1])}; they ascend from 0 to {num_rows}, "
                f"the rows of {name}"
            )
