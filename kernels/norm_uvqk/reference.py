"""The definition of norm_uvqk in plain torch; gradients by autograd."""

# T = events of all sequences, E = model width, N = columns of u, v, q and k together

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fp8 import linear_for_autograd


def norm_uvqk(
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    *,
    num_activated: int,
    eps: float,
    fp8: bool,
) -> Tensor:
    """`uvqk = norm(x) W^T + b`, the first `num_activated` columns through SiLU; see norm_uvqk."""
    wide = x_TE.to(torch.promote_types(x_TE.dtype, torch.float32))
    normed = F.layer_norm(wide, wide.shape[1:], norm_weight_E, norm_bias_E, eps)
    multiply = linear_for_autograd if fp8 else F.linear
    uvqk = multiply(normed.to(weight_NE.dtype), weight_NE, bias_N)
    return torch.cat([F.silu(uvqk[:, :num_activated]), uvqk[:, num_activated:]], dim=1)
