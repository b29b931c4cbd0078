"""Tensors as the Triton kernels take them: heads as wide, and events as far apart, as loads of 16 bytes need.

Others are copied, with zeros behind each head, which change no score and no sum. That takes a little memory for the
time of a pass and next to no time; loaded as they are, an element at a time, heads wider than 64 left no registers.
"""

# T = events of all sequences, H = heads, D = head width

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Problem

ALIGNMENT = 16
"""Elements: what Triton asks of a stride before it loads 16 bytes at once."""
LARGEST_EVENT_STRIDE = (2**31 - 1) // 256
"""Kernels count in 64 bits up to a tile, and in 32 bits within it; no tile has more than 256 events."""


def padded_problem(problem: Problem) -> Problem:
    """The same problem, with heads that are multiples of 16 wide and aligned; see padded."""
    return problem._replace(q=padded(problem.q), k=padded(problem.k), v=padded(problem.v))


def padded(x_THD: Tensor) -> Tensor:
    """x, or an aligned copy of it whose heads are up to 15 columns of zeros wider."""
    num_missing = -x_THD.shape[2] % ALIGNMENT
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
