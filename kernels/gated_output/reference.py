"""The definition of gated_output in plain torch; gradients by autograd."""

# T = events of all sequences, H = heads, D = head width, V = H * D, E = model width, Y = columns that are projected

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import kept
from ..fp8 import linear_for_autograd


def gated_output(
    u_TV: Tensor,
    a_THD: Tensor,
    x_TE: Tensor,
    weight_EY: Tensor,
    bias_E: Tensor | None,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Tensor | None,
    *,
    per_head: bool,
    concat: bool,
    dropout: float,
    eps: float,
    fp8: bool,
) -> Tensor:
    """`out = x + dropout(norm(a) * u) W^T + b`, or [u, a, norm(a) * u] in place of the product; see gated_output."""
    wide = a_THD.to(torch.promote_types(a_THD.dtype, torch.float32))
    normed_TV = F.layer_norm(wide, wide.shape[2:] if per_head else wide.shape[1:], eps=eps).flatten(1)
    if norm_weight_V is not None and norm_bias_V is not None:
        normed_TV = normed_TV * norm_weight_V + norm_bias_V
    y_TY = u_TV * normed_TV
    if concat:
        y_TY = torch.cat([u_TV, a_THD.flatten(1), y_TY], dim=1)
    if seed is not None:
        y_TY = y_TY * kept(seed, len(y_TY), y_TY.shape[1], dropout) / (1 - dropout)
    multiply = linear_for_autograd if fp8 else F.linear
    out_TE = x_TE + multiply(y_TY.to(weight_EY.dtype), weight_EY)
    return (out_TE if bias_E is None else out_TE + bias_E).to(x_TE.dtype)
