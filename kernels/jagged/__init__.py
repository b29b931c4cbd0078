"""Joining and parting jagged tensors sequence by sequence: the public functions and their registration as operators."""

# L = rows of left, R = rows of right, S = L + R, B = sequences; rows have any number of further dimensions

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for, implementation
from ..checks import check_device
from . import reference
from .inputs import check_offsets, check_pair, check_values

__all__ = ["jagged_concat", "jagged_split"]


def jagged_concat(
    left: Tensor,
    right: Tensor,
    left_offsets: Tensor,
    right_offsets: Tensor,
    *,
    right_prefix: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Put each sequence of `left` in front of its sequence of `right`, behind the first `right_prefix` rows of that.

    Sequence b of the result is `[right_b[:P], left_b, right_b[P:]]` with P = right_prefix, and lies between
    `left_offsets + right_offsets`. Undoes jagged_split; attention truncation (ULTRA-HSTU, arXiv 2602.16986) puts the
    events that its last layers leave alone back so, behind the contextual tokens. Keeps the offsets for its backward.

    Args:
        left: `[L, ...]`, any dtype.
        right: `[R, ...]`, rows of the same shape, and the same dtype.
        left_offsets: `[B + 1]`, int32 or int64, from 0 to L; sequences may be empty.
        right_offsets: `[B + 1]`, int32 or int64, from 0 to R.
        right_prefix: P; a right sequence with fewer rows stands in front as a whole.
        backend: "cpu" is plain torch for any device, "triton" a kernel for GPUs, "reference" the definition, "auto" the
            fastest for the device.

    Returns:
        `[L + R, ...]`.

    Raises:
        ValueError: a shape, dtype, device or value breaks these rules, or the backend is unknown. Values of offsets
            are read on CPUs only, where nothing must wait for it; on a GPU wrong ones leave rows unwritten, or read
            and write memory beside them.
    """
    check_pair(left, right)
    left_offsets, right_offsets = _checked(left, left_offsets, right_offsets, right_prefix)
    name = backend_for(left, backend)
    if name == "reference":
        return reference.concat(left, right, left_offsets, right_offsets, right_prefix)
    return _concat(left, right, left_offsets, right_offsets, right_prefix, name)


def jagged_split(
    x: Tensor,
    left_offsets: Tensor,
    right_offsets: Tensor,
    *,
    num_left: int | None = None,
    right_prefix: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Part each sequence of x into the rows of `left` and those of `right`; undoes jagged_concat.

    Sequence b of x is `[right_b[:P], left_b, right_b[P:]]` with P = right_prefix, and lies between
    `left_offsets + right_offsets`. Keeps the offsets for its backward.

    Args:
        x: `[S, ...]`, any dtype.
        left_offsets: `[B + 1]`, int32 or int64, from 0 to L; sequences may be empty.
        right_offsets: `[B + 1]`, int32 or int64, from 0 to S - L.
        num_left: L, where the host knows it; else it waits for the device to read the last of left_offsets.
        right_prefix: P; a right sequence with fewer rows stands in front as a whole.
        backend: as of jagged_concat.

    Returns:
        left `[L, ...]` and right `[S - L, ...]`.

    Raises:
        ValueError: as of jagged_concat.
    """
    left_offsets, right_offsets = _checked(x, left_offsets, right_offsets, right_prefix)
    num_left = int(left_offsets[-1]) if num_left is None else num_left
    if not 0 <= num_left <= len(x):
        raise ValueError(f"num_left={num_left}; it is from 0 to {len(x)}, the rows of x")
    name = backend_for(x, backend)
    if name == "reference":
        return reference.split(x, left_offsets, right_offsets, num_left, right_prefix)
    return _split(x, left_offsets, right_offsets, num_left, right_prefix, name)


def _checked(x: Tensor, left_offsets: Tensor, right_offsets: Tensor, right_prefix: int) -> tuple[Tensor, Tensor]:
    """Both offsets as int64."""
    check_offsets(left_offsets, right_offsets)
    check_device(x, {"left_offsets": left_offsets, "right_offsets": right_offsets})
    if right_prefix < 0:
        raise ValueError(f"right_prefix={right_prefix}; it is a number of rows, at least 0")
    return left_offsets.long(), right_offsets.long()


@torch.library.custom_op("ultrarec::jagged_concat", mutates_args=())
def _concat(
    left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor, right_prefix: int, backend: str
) -> Tensor:
    check_values(left_offsets, right_offsets, num_left=len(left), num_right=len(right))
    return implementation(__name__, backend).concat(left, right, left_offsets, right_offsets, right_prefix)


@torch.library.custom_op("ultrarec::jagged_split", mutates_args=())
def _split(
    x: Tensor, left_offsets: Tensor, right_offsets: Tensor, num_left: int, right_prefix: int, backend: str
) -> tuple[Tensor, Tensor]:
    check_values(left_offsets, right_offsets, num_left=num_left, num_right=len(x) - num_left)
    return implementation(__name__, backend).split(x, left_offsets, right_offsets, num_left, right_prefix)


@_concat.register_fake
def _concat_shape(left: Tensor, right: Tensor, *_: Any) -> Tensor:
    return left.new_empty(left.shape[0] + right.shape[0], *left.shape[1:])


@_split.register_fake
def _split_shapes(
    x: Tensor, left_offsets: Tensor, right_offsets: Tensor, num_left: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(num_left, *x.shape[1:]), x.new_empty(x.shape[0] - num_left, *x.shape[1:])


def _save_for_concat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, _, left_offsets, right_offsets, ctx.right_prefix, ctx.backend = inputs
    ctx.num_left = left.shape[0]
    ctx.save_for_backward(left_offsets, right_offsets)


def _concat_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dleft, dright = _split(dout, *ctx.saved_tensors, ctx.num_left, ctx.right_prefix, ctx.backend)
    return dleft, dright, None, None, None, None


def _save_for_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, left_offsets, right_offsets, _, ctx.right_prefix, ctx.backend = inputs
    ctx.save_for_backward(left_offsets, right_offsets)


def _split_gradients(ctx: Any, dleft: Tensor, dright: Tensor) -> tuple[Tensor | None, ...]:
    dx = _concat(dleft, dright, *ctx.saved_tensors, ctx.right_prefix, ctx.backend)
    return dx, None, None, None, None, None


_concat.register_autograd(_concat_gradients, setup_context=_save_for_concat)
_split.register_autograd(_split_gradients, setup_context=_save_for_split)
