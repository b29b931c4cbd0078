"""Norm of the attention, gate, dropout, output projection and residual: the public function and its registration."""

# T = events of all sequences, H = heads, D = head width, V = H * D, E = model width, Y = columns that are projected,
# G = groups of columns that are normalised together

from typing import Any

import torch
from torch import Tensor

from ..backends import backend_for, compute_dtype, implementation, outside_autocast
from ..checks import check_columns, check_device, check_matrices
from . import reference

__all__ = ["gated_output"]


def gated_output(
    u_TV: Tensor,
    a_THD: Tensor,
    x_TE: Tensor,
    weight_EY: Tensor,
    *,
    bias_E: Tensor | None = None,
    norm_weight_V: Tensor | None = None,
    norm_bias_V: Tensor | None = None,
    per_head: bool = False,
    concat: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-6,
    fp8: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Gate the attention and project it back onto the tokens (HSTU, arXiv 2402.17152, section 3, equation 3).

    `out = x + dropout(norm(a) * u) W^T + b`; the authors' industrial code projects `[u, a, norm(a) * u]` instead.
    The backward needs u, a, mean and deviation of a, and the seed: what is projected is made again, and dropout drops
    the same elements again.

    Args:
        u_TV: the gate.
        a_THD: the attention, in the dtype of u; normalised in float32 (float64 for float64).
        x_TE: the residual, any floating point dtype.
        weight_EY: Y is V, or 3 V with `concat`. Its dtype is that of the product; under autocast, that of autocast.
        bias_E: added to the product.
        norm_weight_V: scale of the norm by column, in float32 or as wide as a.
        norm_bias_V: shift of the norm by column, likewise; both or neither.
        per_head: normalise each head alone; else all together.
        concat: project u and a too.
        dropout: probability of dropping a column of a token, which scales the others by 1 / (1 - dropout).
        seed: `[1]` int64, says which are dropped; without one, none are.
        eps: added to the variance.
        fp8: multiply tokens and weight in e4m3, each row scaled to its range, and sum in float32; CPUs emulate it. The
            backward multiplies in the dtype of weight.
        backend: "cpu" is plain torch for any device, "triton" its kernels for GPUs, "reference" the definition, "auto"
            the fastest for the device.

    Returns:
        `[T, E]` in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or value breaks these rules, the backend is unknown, or the GPU has no FP8.
    """
    _check(u_TV, a_THD, x_TE, weight_EY, concat=concat)
    check_columns(x_TE, {"bias": bias_E}, len(weight_EY))
    _check_norm(u_TV, norm_weight_V, norm_bias_V)
    seed = _checked_seed(x_TE, dropout, seed)
    dtype = compute_dtype(weight_EY)
    weights = (weight_EY.to(dtype), None if bias_E is None else bias_E.to(x_TE.dtype), norm_weight_V, norm_bias_V)
    with outside_autocast(x_TE):
        name = backend_for(x_TE, backend, norm_width=a_THD.shape[2] if per_head else u_TV.shape[1])
        if name == "reference":
            return reference.gated_output(
                u_TV, a_THD, x_TE, *weights, seed, per_head=per_head, concat=concat, dropout=dropout, eps=eps, fp8=fp8
            )
        return _forward(u_TV, a_THD, x_TE, *weights, seed, per_head, concat, dropout, eps, fp8, name)[0]


def _check(u_TV: Tensor, a_THD: Tensor, x_TE: Tensor, weight_EY: Tensor, *, concat: bool) -> None:
    if a_THD.dim() != 3 or a_THD.dtype != u_TV.dtype:
        raise ValueError(
            f"a is {a_THD.dtype} of shape {tuple(a_THD.shape)}; it takes [T, H, D] in {u_TV.dtype}, like u"
        )
    if tuple(u_TV.shape) != (a_THD.shape[0], a_THD.shape[1] * a_THD.shape[2]):
        raise ValueError(f"u has shape {tuple(u_TV.shape)} but a {tuple(a_THD.shape)}; they take [T, H * D], [T, H, D]")
    num_columns = (3 if concat else 1) * u_TV.shape[1]
    if weight_EY.dim() != 2 or weight_EY.shape[1] != num_columns:
        shape, form = tuple(weight_EY.shape), "3 H D" if concat else "H D"
        raise ValueError(f"weight has shape {shape}; with concat={concat} it takes {num_columns} columns, {form}")
    if tuple(x_TE.shape) != (len(u_TV), len(weight_EY)):
        raise ValueError(f"x has shape {tuple(x_TE.shape)}; it takes a row per token and a column per row of weight")
    check_matrices(u_TV, weight_EY[:, : u_TV.shape[1]], names=("u", "weight"))
    check_device(x_TE, {"u": u_TV, "a": a_THD})


def _check_norm(u_TV: Tensor, weight_V: Tensor | None, bias_V: Tensor | None) -> None:
    check_columns(u_TV, {"norm_weight": weight_V, "norm_bias": bias_V}, u_TV.shape[1])
    if (weight_V is None) != (bias_V is None):
        raise ValueError("norm_weight and norm_bias go together; give both or neither")


def _checked_seed(x_TE: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    """The seed; None if nothing is dropped."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}; it is a probability, from 0 to below 1")
    if dropout == 0 or seed is None:
        return None
    if tuple(seed.shape) != (1,) or seed.dtype != torch.int64:
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}; it takes one int64, as dropout.new_seed")
    check_device(x_TE, {"seed": seed})
    return seed


@torch.library.custom_op("ultrarec::gated_output", mutates_args=())
def _forward(
    u_TV: Tensor,
    a_THD: Tensor,
    x_TE: Tensor,
    weight_EY: Tensor,
    bias_E: Tensor | None,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Tensor | None,
    per_head: bool,
    concat: bool,
    dropout: float,
    eps: float,
    fp8: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens `[T, E]`, and mean and 1 / deviation of each group of a, `[T, G, 1]`."""
    tensors = (u_TV, a_THD, x_TE, weight_EY, bias_E, norm_weight_V, norm_bias_V, seed)
    return implementation(__name__, backend).forward(*tensors, per_head, concat, dropout, eps, fp8)


@torch.library.custom_op("ultrarec::gated_output_backward", mutates_args=())
def _backward(
    dout_TE: Tensor,
    u_TV: Tensor,
    a_THD: Tensor,
    weight_EY: Tensor,
    bias_E: Tensor | None,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    concat: bool,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, a, weight, bias and the norm's weight and bias; empty where there is none."""
    tensors = (dout_TE, u_TV, a_THD, weight_EY, bias_E, norm_weight_V, norm_bias_V, seed, mean, rstd)
    return implementation(__name__, backend).backward(*tensors, concat, dropout)


@_forward.register_fake
def _forward_shapes(
    u_TV: Tensor,
    a_THD: Tensor,
    x_TE: Tensor,
    weight_EY: Tensor,
    bias_E: Any,
    norm_weight_V: Any,
    norm_bias_V: Any,
    seed: Any,
    per_head: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (a_THD.shape[0], a_THD.shape[1] if per_head else 1, 1)
    stats_dtype = torch.promote_types(a_THD.dtype, torch.float32)
    mean, rstd = (a_THD.new_empty(shape, dtype=stats_dtype) for _ in range(2))
    return x_TE.new_empty(x_TE.shape), mean, rstd


@_backward.register_fake
def _backward_shapes(
    dout_TE: Tensor,
    u_TV: Tensor,
    a_THD: Tensor,
    weight_EY: Tensor,
    bias_E: Tensor | None,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Any,
    mean: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du_TV, da_THD, dweight_EY = (x.new_empty(x.shape) for x in (u_TV, a_THD, weight_EY))
    dbias_E = dout_TE.new_empty(0 if bias_E is None else len(bias_E))
    dnorm_weight_V, dnorm_bias_V = (mean.new_empty(0 if w is None else len(w)) for w in (norm_weight_V, norm_bias_V))
    return du_TV, da_THD, dweight_EY, dbias_E, dnorm_weight_V, dnorm_bias_V


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u_TV, a_THD, _, *weights_and_seed = inputs[:8]
    _, ctx.concat, ctx.dropout, _, _, ctx.backend = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(u_TV, a_THD, *weights_and_seed, *output[1:])


def _gradients(ctx: Any, dout_TE: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout_TE is None:
        return (None,) * 14
    dout_TE = dout_TE.contiguous()
    du_TV, da_THD, *dweights = _backward(dout_TE, *ctx.saved_tensors, ctx.concat, ctx.dropout, ctx.backend)
    grads = (du_TV, da_THD, dout_TE, *dweights)
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:7], strict=True)]
    return (*wanted, None, None, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
