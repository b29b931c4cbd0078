"""The definition of position_time_encoding in plain torch; gradients by autograd."""

# T = events of all sequences, E = model width, P = positions, K = time buckets

import torch.nn.functional as F
from torch import Tensor


def position_time_encoding(
    x_TE: Tensor,
    position_weight_PE: Tensor | None,
    positions_T: Tensor | None,
    time_weight_KE: Tensor | None,
    buckets_T: Tensor | None,
    scale: float,
) -> Tensor:
    """`scale * x + position_weight[positions] + time_weight[buckets]`; see position_time_encoding."""
    out_TE = scale * x_TE
    for weight, rows_T in ((position_weight_PE, positions_T), (time_weight_KE, buckets_T)):
        if weight is not None and rows_T is not None:
            out_TE = out_TE + F.embedding(rows_T, weight)
    return out_TE
