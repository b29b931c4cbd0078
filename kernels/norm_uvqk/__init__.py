"""Layer norm, the projection to u, v, q and k, and SiLU: the public function and its registration as one operator."""

# T = events of all sequences, E = model width, N = columns of u, v, q and k together, A = activated columns

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for, compute_dtype, implementation, outside_autocast
from ..checks import check_columns, check_matrices
from . import reference

__all__ = ["norm_uvqk"]


def norm_uvqk(
    x_TE: Tensor,
    weight_NE: Tensor,
    *,
    bias_N: Tensor | None = None,
    norm_weight_E: Tensor | None = None,
    norm_bias_E: Tensor | None = None,
    num_activated: int,
    eps: float = 1e-6,
    fp8: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Normalise the tokens and project them to u, v, q and k (HSTU, arXiv 2402.17152, section 3, equation 1).

    `uvqk = norm(x) W^T + b`, of which the first `num_activated` columns go through SiLU: all of them as published, or
    those of u only, as in the authors' industrial code. What the backward needs besides x and the weights is the
    activated columns before SiLU, and mean and deviation of each token; the normalised tokens are computed again.

    Args:
        x_TE: tokens, any floating point dtype; normalised in float32 (float64 for float64).
        weight_NE: rows of u, v, q and k. Its dtype is that of the product and of the result; under autocast, that of
            autocast.
        bias_N: added to the product.
        norm_weight_E: scale of the norm, in float32 or as wide as x.
        norm_bias_E: shift of the norm, likewise; both or neither.
        num_activated: A, from 0 to N.
        eps: added to the variance.
        fp8: multiply tokens and weight in e4m3, each row scaled to its range, and sum in float32; CPUs emulate it. The
            backward multiplies in the dtype of weight.
        backend: "cpu" is plain torch for any device, "triton" its kernels for GPUs, "reference" the definition, "auto"
            the fastest for the device.

    Returns:
        `[T, N]`, to be split into u, v, q, k.

    Raises:
        ValueError: a shape, dtype, device or value breaks these rules, the backend is unknown, or the GPU has no FP8.
    """
    check_matrices(x_TE, weight_NE, names=("x", "weight"))
    check_columns(x_TE, {"bias": bias_N}, len(weight_NE))
    check_columns(x_TE, {"norm_weight": norm_weight_E, "norm_bias": norm_bias_E}, x_TE.shape[1])
    if (norm_weight_E is None) != (norm_bias_E is None):
        raise ValueError("norm_weight and norm_bias go together; give both or neither")
    if not 0 <= num_activated <= len(weight_NE):
        raise ValueError(f"num_activated={num_activated}; it is from 0 to {len(weight_NE)}, the rows of weight")
    dtype = compute_dtype(weight_NE)
    weights = (weight_NE.to(dtype), None if bias_N is None else bias_N.to(dtype), norm_weight_E, norm_bias_E)
    with outside_autocast(x_TE):
        name = backend_for(x_TE, backend, norm_width=x_TE.shape[1])
        if name == "reference":
            return reference.norm_uvqk(x_TE, *weights, num_activated=num_activated, eps=eps, fp8=fp8)
        return _forward(x_TE, *weights, num_activated, eps, fp8, name)[0]


@torch.library.custom_op("ultrarec::norm_uvqk", mutates_args=())
def _forward(
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    num_activated: int,
    eps: float,
    fp8: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uvqk `[T, N]`, its activated columns before SiLU `[T, A]`, mean and 1 / deviation of each token `[T, 1]`."""
    run = implementation(__name__, backend).forward
    return run(x_TE, weight_NE, bias_N, norm_weight_E, norm_bias_E, num_activated, eps, fp8)


@torch.library.custom_op("ultrarec::norm_uvqk_backward", mutates_args=())
def _backward(
    duvqk_TN: Tensor,
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    before_TA: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the norm's weight and bias; empty where there is none."""
    run = implementation(__name__, backend).backward
    return run(duvqk_TN, x_TE, weight_NE, bias_N, norm_weight_E, norm_bias_E, before_TA, mean, rstd)


@_forward.register_fake
def _forward_shapes(
    x_TE: Tensor, weight_NE: Tensor, bias_N: Any, norm_weight_E: Any, norm_bias_E: Any, num_activated: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = x_TE.shape[0]
    stats_dtype = torch.promote_types(x_TE.dtype, torch.float32)
    mean, rstd = (x_TE.new_empty((num_rows, 1), dtype=stats_dtype) for _ in range(2))
    return weight_NE.new_empty(num_rows, len(weight_NE)), weight_NE.new_empty(num_rows, num_activated), mean, rstd


@_backward.register_fake
def _backward_shapes(
    duvqk_TN: Tensor,
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    before_TA: Tensor,
    mean: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias_N = weight_NE.new_empty(0 if bias_N is None else len(bias_N))
    dx_TE, dweight_NE = x_TE.new_empty(x_TE.shape), weight_NE.new_empty(weight_NE.shape)
    dnorm_weight_E, dnorm_bias_E = (mean.new_empty(0 if w is None else len(w)) for w in (norm_weight_E, norm_bias_E))
    return dx_TE, dweight_NE, dbias_N, dnorm_weight_E, dnorm_bias_E


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, _, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, duvqk_TN: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if duvqk_TN is None:
        return (None,) * 9
    grads = _backward(duvqk_TN.contiguous(), *ctx.saved_tensors, ctx.backend)
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:5], strict=True)]
    return (*wanted, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
