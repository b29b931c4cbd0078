"""The definition of HSTU attention: one sequence at a time, the full matrix of weights, gradients by autograd.

Every other implementation is tested against this one, run in float64. It is the only place where n x n is allocated.
"""

# T = events of all sequences, B = sequences, H = heads, D = head width, n = events of one sequence (t queries, s keys)

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import RelativeBias, bucket_thresholds, time_buckets
from .inputs import check_values
from .mask import AttentionMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seq_len: int,
    alpha: float,
    scale: Tensor,
    num_targets: Tensor | None,
    mask: AttentionMask,
    bias: RelativeBias | None,
) -> Tensor:
    """`out_i = sum over visible j of scale_i * silu(alpha * <q_i, k_j> + bias_ij) v_j`; see hstu_attention."""
    bounds, targets = check_values(offsets, num_targets, num_events=q.shape[0], max_seq_len=max_seq_len)
    outs = [v[:0]]
    for (start, end), num in zip(pairwise(bounds), targets, strict=True):
        scores = alpha * torch.einsum("thd,shd->hts", q[start:end], k[start:end])
        if bias is not None:
            scores = scores + _bias(bias, start, end, max_seq_len)
        position = torch.arange(end - start, device=q.device)
        history_end = torch.tensor(mask.history_end(end - start, num), device=q.device)
        visible = mask.visible(position[:, None], position[None, :], history_end)
        weights = scale[start:end, None] * F.silu(scores) * visible
        outs.append(torch.einsum("hts,shd->thd", weights.to(v.dtype), v[start:end]))
    return torch.cat(outs)


def _bias(bias: RelativeBias, start: int, end: int, max_seq_len: int) -> Tensor:
    """The bias `[n, n]` of the sequence that is events start to end."""
    terms = []
    if bias.position_weight is not None:
        position = torch.arange(end - start, device=bias.position_weight.device)
        terms.append(bias.position_weight[position[:, None] - position[None, :] + max_seq_len - 1])
    if bias.time_weight is not None and bias.timestamps is not None:
        queries = bias.timestamps if bias.query_timestamps is None else bias.query_timestamps
        elapsed = (queries[start:end, None] - bias.timestamps[None, start:end]).abs()
        thresholds = bucket_thresholds(bias.time_weight.shape[0] - 1, elapsed.device)
        terms.append(bias.time_weight[time_buckets(elapsed, thresholds).long()])
    return torch.stack(terms).sum(0)
