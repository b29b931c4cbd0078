"""norm_uvqk in plain torch: forward and hand-written backward, which normalises x again instead of keeping it."""

# T = events of all sequences, E = model width, N = columns of u, v, q and k together, A = activated columns

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fp8 import multiply
from ..layer_norm import affine, normalize, normalize_again, normalize_backward
from ..pages import in_huge_pages
from ..products import linear_pieces, product, weight_gradient

silu_backward = torch.ops.aten.silu_backward


def forward(
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    num_activated: int,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uvqk `[T, N]`; for the backward its activated columns before SiLU `[T, A]`, mean and 1 / deviation of x."""
    wide = x_TE.to(torch.promote_types(x_TE.dtype, torch.float32))
    normed_TE, mean, rstd = normalize(wide, eps)
    normed_TE = affine(normed_TE, norm_weight_E, norm_bias_E)
    normed_TE = normed_TE.to(weight_NE.dtype)
    uvqk_TN = in_huge_pages(normed_TE.new_empty(len(x_TE), len(weight_NE)))
    before_TA = in_huge_pages(normed_TE.new_empty(len(x_TE), num_activated))
    pieces = _fp8_pieces(normed_TE, weight_NE, bias_N) if fp8 else linear_pieces(normed_TE, weight_NE, bias_N)
    for rows, piece_RN in pieces:
        before_TA[rows] = piece_RN[:, :num_activated]
        F.silu(piece_RN[:, :num_activated], inplace=True)
        uvqk_TN[rows] = piece_RN
    return uvqk_TN, before_TA, mean, rstd


def backward(
    duvqk_TN: Tensor,
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    before_TA: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the norm's weight and bias; empty where there is none."""
    num_activated = before_TA.shape[1]
    if num_activated == len(weight_NE):
        dlinear_TN = silu_backward(duvqk_TN, before_TA)
    else:
        # Each element written once: 1,500 x 2,048 floats took 1.1 ms on one core of an EPYC, as a corrected copy 1.5.
        dlinear_TN = torch.empty_like(duvqk_TN)
        activated = duvqk_TN[:, :num_activated], before_TA
        silu_backward.grad_input(*activated, grad_input=dlinear_TN[:, :num_activated])
        dlinear_TN[:, num_activated:] = duvqk_TN[:, num_activated:]
    wide = x_TE.to(mean.dtype)
    normed_TE = normalize_again(wide, mean, rstd)
    affine_TE = affine(normed_TE, norm_weight_E, norm_bias_E)
    dweight_NE = weight_gradient(dlinear_TN, affine_TE.to(weight_NE.dtype))
    dbias_N = weight_NE.new_empty(0) if bias_N is None else dlinear_TN.sum(0)
    dnormed_TE = product(dlinear_TN, weight_NE).to(mean.dtype)
    dnorm_weight_E, dnorm_bias_E = mean.new_empty(0), mean.new_empty(0)
    if norm_weight_E is not None:
        dnorm_weight_E, dnorm_bias_E = (dnormed_TE * normed_TE).sum(0), dnormed_TE.sum(0)
        dnormed_TE.mul_(norm_weight_E)
    dx_TE = normalize_backward(dnormed_TE, wide, mean, rstd).to(x_TE.dtype)
    return dx_TE, dweight_NE, dbias_N, dnorm_weight_E, dnorm_bias_E


def _fp8_pieces(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """x W^T + b of x and W in e4m3, rounded once, in one piece."""
    product_TN = multiply(x_TE, weight_NE)
    yield slice(None), (product_TN if bias_N is None else product_TN.add_(bias_N)).to(weight_NE.dtype)
