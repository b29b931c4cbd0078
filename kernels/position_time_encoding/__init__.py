"""Tokens scaled, and a learned vector for position and time added: the public function and its registration."""

# T = events of all sequences, E = model width, P = positions, K = time buckets

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for, implementation
from ..checks import DTYPES, check_device
from . import reference
from .buckets import elapsed_buckets, elapsed_thresholds

__all__ = ["elapsed_buckets", "elapsed_thresholds", "position_time_encoding"]


def position_time_encoding(
    x_TE: Tensor,
    *,
    position_weight_PE: Tensor | None = None,
    positions_T: Tensor | None = None,
    time_weight_KE: Tensor | None = None,
    buckets_T: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Scale the tokens and add a learned vector for where each stands and one for when it happened.

    `out = scale * x + position_weight[positions] + time_weight[buckets]`, in one pass over the tokens: the
    HSTUPositionalEncoder of the released HSTU models (arXiv 2402.17152). Which position and which bucket (see
    elapsed_buckets) are integers, the same on every device. Keeps these for its backward, whose sums over the tokens
    of a row are made in a fixed order.

    Args:
        x_TE: tokens, any floating point dtype.
        position_weight_PE: a vector per position.
        positions_T: int64, from 0 to P - 1; goes with position_weight.
        time_weight_KE: a vector per bucket of time.
        buckets_T: int64, from 0 to K - 1; goes with time_weight.
        scale: of the tokens; the models take sqrt(E).
        backend: "cpu" is plain torch for any device, "triton" its kernels for GPUs, "reference" the definition, "auto"
            the fastest for the device.

    Returns:
        `[T, E]` in the dtype that x and the tables promote to.

    Raises:
        ValueError: a shape, dtype or device breaks these rules, or the backend is unknown.
        IndexError: a table lacks a row that is asked for; Triton gives NaN for it, so as not to wait for the device.
    """
    _check(x_TE, position_weight_PE, positions_T, names=("position_weight", "positions"))
    _check(x_TE, time_weight_KE, buckets_T, names=("time_weight", "buckets"))
    name = backend_for(x_TE, backend)
    arguments = (x_TE, position_weight_PE, positions_T, time_weight_KE, buckets_T, scale)
    return reference.position_time_encoding(*arguments) if name == "reference" else _forward(*arguments, name)


def _check(x_TE: Tensor, weight: Tensor | None, rows_T: Tensor | None, *, names: tuple[str, str]) -> None:
    if x_TE.dim() != 2 or x_TE.dtype not in DTYPES:
        raise ValueError(f"x is {x_TE.dtype} of shape {tuple(x_TE.shape)}; it takes a matrix of floats")
    if weight is None and rows_T is None:
        return
    if weight is None or rows_T is None:
        raise ValueError(f"{names[0]} and {names[1]} go together; give both or neither")
    if weight.dim() != 2 or weight.shape[1] != x_TE.shape[1] or weight.dtype not in DTYPES:
        shape = tuple(weight.shape)
        raise ValueError(f"{names[0]} is {weight.dtype} of shape {shape}; it takes rows of {x_TE.shape[1]} floats")
    if rows_T.shape != x_TE.shape[:1] or rows_T.dtype != torch.int64:
        shape = tuple(rows_T.shape)
        raise ValueError(f"{names[1]} is {rows_T.dtype} of shape {shape}; it takes an int64 per token, {len(x_TE)}")
    check_device(x_TE, {names[0]: weight, names[1]: rows_T})


@torch.library.custom_op("ultrarec::position_time_encoding", mutates_args=())
def _forward(
    x_TE: Tensor,
    position_weight_PE: Tensor | None,
    positions_T: Tensor | None,
    time_weight_KE: Tensor | None,
    buckets_T: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    tensors = (x_TE, position_weight_PE, positions_T, time_weight_KE, buckets_T)
    dtype = _result_dtype(x_TE, position_weight_PE, time_weight_KE)
    return implementation(__name__, backend).forward(*tensors, scale, dtype)


@torch.library.custom_op("ultrarec::row_sums", mutates_args=())
def _row_sums(x_TE: Tensor, rows_T: Tensor, num_rows: int, backend: str) -> Tensor:
    """For each of num_rows the sum of the rows of x that name it, `[num_rows, E]` in at least float32."""
    return implementation(__name__, backend).row_sums(x_TE, rows_T, num_rows)


@_forward.register_fake
def _forward_shape(
    x_TE: Tensor, position_weight_PE: Tensor | None, positions_T: Any, time_weight_KE: Tensor | None, *_: Any
) -> Tensor:
    return x_TE.new_empty(x_TE.shape, dtype=_result_dtype(x_TE, position_weight_PE, time_weight_KE))


@_row_sums.register_fake
def _row_sums_shape(x_TE: Tensor, rows_T: Tensor, num_rows: int, backend: str) -> Tensor:
    return x_TE.new_empty(num_rows, x_TE.shape[1], dtype=torch.promote_types(x_TE.dtype, torch.float32))


def _result_dtype(x_TE: Tensor, *weights: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, (w.dtype for w in weights if w is not None), x_TE.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TE, position_weight_PE, positions_T, time_weight_KE, buckets_T, ctx.scale, ctx.backend = inputs
    ctx.dtype = x_TE.dtype
    ctx.tables = [None if w is None else (w.shape[0], w.dtype) for w in (position_weight_PE, time_weight_KE)]
    ctx.save_for_backward(positions_T, buckets_T)


def _gradients(ctx: Any, dout_TE: Tensor) -> tuple[Tensor | None, ...]:
    dx_TE = (dout_TE * ctx.scale).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    dtables: list[Tensor | None] = [None, None]
    for i, (table, rows_T) in enumerate(zip(ctx.tables, ctx.saved_tensors, strict=True)):
        if table is not None and ctx.needs_input_grad[1 + 2 * i]:
            num_rows, dtype = table
            dtables[i] = _row_sums(dout_TE, rows_T, num_rows, ctx.backend).to(dtype)
    return dx_TE, dtables[0], None, dtables[1], None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
