"""Tensors as the Triton kernels take them: heads as wide, and events as far apart, as loads of 16 bytes need.

Others are copied, with zeros behind each head, which change no score and no sum. That takes memory for the time of a
pass, and next to no time. Loaded as they are, an element at a time, wide heads spilled up to 560 bytes on sm_90.
"""

# T = events of all sequences, H = heads, D = head width

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .operator import Problem

ALIGNMENT = 16
"""Elements: what Triton asks of a stride before it loads 16 bytes at once."""
WIDEST_WITH_EMPTY_COLUMNS = 64
"""Tiles have a power of 2 columns. Wider heads fill all: leaving some out takes registers, and heads of 112 spilled."""
NARROWEST_BESIDE_WIDE_VALUES = 64
"""Columns of queries and keys where values have more than 128: beside 256, the gradients of keys and values spilled 112
bytes with 16 and 208 with 32 on sm_90."""
LARGEST_EVENT_STRIDE = (2**31 - 1) // 256
"""Kernels count in 64 bits up to a tile, and in 32 bits within it; no tile has more than 256 events."""


def padded_problem(problem: Problem) -> Problem:
    """The same problem, with q, k and v padded."""
    least = NARROWEST_BESIDE_WIDE_VALUES if problem.v.shape[2] > 128 else 0
    return problem._replace(q=padded(problem.q, least), k=padded(problem.k, least), v=padded(problem.v))


def padded(x_THD: Tensor, least: int = 0) -> Tensor:
    """x, or an aligned copy, by zeros behind each head: its width is a multiple of 16, above 64 a power of 2, and at
    least `least`.
    """
    num_missing = max(_padded_width(x_THD.shape[2]), least) - x_THD.shape[2]
    if num_missing:
        return F.pad(x_THD, (0, num_missing))
    event_stride, head_stride, column_stride = x_THD.stride()
    fits = column_stride == 1 and 0 < event_stride <= LARGEST_EVENT_STRIDE and head_stride > 0
    if fits and event_stride % ALIGNMENT == head_stride % ALIGNMENT == x_THD.data_ptr() % 16 == 0:
        return x_THD
    return x_THD.clone(memory_format=torch.contiguous_format)


def narrowed(x_THD: Tensor, width: int) -> Tensor:
    """The first columns of each head, contiguous."""
    return x_THD[..., :width].contiguous()


def _padded_width(width: int) -> int:
    if width > WIDEST_WITH_EMPTY_COLUMNS:
        return triton.next_power_of_2(width)
    return triton.cdiv(width, ALIGNMENT) * ALIGNMENT
