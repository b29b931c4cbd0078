"""gated_output in plain torch: forward and hand-written backward, which makes what is projected again."""

# T = events of all sequences, H = heads, D = head width, V = H * D, E = model width, Y = columns that are projected,
# G = groups of W columns that are normalised together

import torch
from torch import Tensor

from ..dropout import drop_, scale_of_kept
from ..fp8 import multiply
from ..layer_norm import affine, normalize, normalize_again, normalize_backward
from ..pages import in_huge_pages
from ..products import linear_pieces, product, weight_gradient


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens `[T, E]`; for the backward mean and 1 / deviation of each group of a, `[T, G, 1]`."""
    wide_TGW = _groups(a_THD, a_THD.shape[1] if per_head else 1)
    normed_TGW, mean, rstd = normalize(wide_TGW, eps)
    y_TY = _gate(u_TV, a_THD, affine(normed_TGW.flatten(1), norm_weight_V, norm_bias_V), concat)
    if seed is not None:
        drop_(seed, dropout, y_TY)
    y_TY, scale = y_TY.to(weight_EY.dtype), scale_of_kept(seed, dropout)
    if fp8:
        out_TE = torch.add(x_TE, multiply(y_TY, weight_EY), alpha=scale).to(x_TE.dtype)
    else:
        out_TE = x_TE.new_empty(x_TE.shape)
        for rows, piece_RE in linear_pieces(y_TY, weight_EY):
            out_TE[rows] = torch.add(x_TE[rows], piece_RE, alpha=scale)
    return out_TE if bias_E is None else out_TE.add_(bias_E), mean, rstd


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, a, weight, bias and the norm's weight and bias; empty where there is none."""
    wide_TGW = _groups(a_THD, mean.shape[1])
    normed_TV = normalize_again(wide_TGW, mean, rstd).flatten(1)
    affine_TV = affine(normed_TV, norm_weight_V, norm_bias_V)
    y_TY = _gate(u_TV, a_THD, affine_TV, concat)
    dproduct_TE, scale = dout_TE.to(weight_EY.dtype), scale_of_kept(seed, dropout)
    dy_TY = product(dproduct_TE, weight_EY).to(affine_TV.dtype)
    if seed is not None:
        drop_(seed, dropout, y_TY, dy_TY.mul_(scale))
    dweight_EY = weight_gradient(dproduct_TE, y_TY.to(weight_EY.dtype)).mul_(scale)
    dbias_E = dout_TE.new_empty(0) if bias_E is None else dout_TE.sum(0).to(bias_E.dtype)

    num_values = u_TV.shape[1]
    dgated_TV = dy_TY[:, -num_values:]
    du_TV, dnormed_TV = dgated_TV * affine_TV, dgated_TV * u_TV
    dnorm_weight_V, dnorm_bias_V = mean.new_empty(0), mean.new_empty(0)
    if norm_weight_V is not None:
        dnorm_weight_V, dnorm_bias_V = (dnormed_TV * normed_TV).sum(0), dnormed_TV.sum(0)
        dnormed_TV.mul_(norm_weight_V)
    da_TV = normalize_backward(dnormed_TV.view_as(wide_TGW), wide_TGW, mean, rstd).flatten(1)
    if concat:
        du_TV += dy_TY[:, :num_values]
        da_TV += dy_TY[:, num_values : 2 * num_values]
    da_THD = da_TV.view(a_THD.shape).to(a_THD.dtype)
    return du_TV.to(u_TV.dtype), da_THD, dweight_EY, dbias_E, dnorm_weight_V, dnorm_bias_V


def _groups(a_THD: Tensor, num_groups: int) -> Tensor:
    """a in at least float32, `[T, G, W]`."""
    width = a_THD.shape[1] * a_THD.shape[2] // num_groups
    return a_THD.to(torch.promote_types(a_THD.dtype, torch.float32)).reshape(-1, num_groups, width)


def _gate(u_TV: Tensor, a_THD: Tensor, affine_TV: Tensor, concat: bool) -> Tensor:
    """What is projected `[T, Y]`, before dropout."""
    if not concat:
        return u_TV * affine_TV
    num_values, dtype = u_TV.shape[1], torch.promote_types(u_TV.dtype, affine_TV.dtype)
    y_TY = in_huge_pages(u_TV.new_empty(len(u_TV), 3 * num_values, dtype=dtype))
    y_TY[:, :num_values], y_TY[:, num_values : 2 * num_values] = u_TV, a_THD.flatten(1)
    torch.mul(u_TV, affine_TV, out=y_TY[:, 2 * num_values :])
    return y_TY
