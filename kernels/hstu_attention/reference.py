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
        events = slice(start, end)
        position = torch.arange(end - start, device=q.device)
        history_end = torch.tensor(mask.history_end(end - start, num), device=q.device)
        visible = mask.visible(position[:, None], position[None, :], history_end)
        bias_ts = None if bias is None else _bias(bias, start, end, max_seq_len)
        outs.append(_attend(q[events], k[events], v[events], visible, alpha=alpha, scale=scale[events], bias=bias_ts))
    return torch.cat(outs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, alpha: float, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The output of t queries over s keys of one sequence; bias and visible are `[t, s]`."""
    if len(q) > 1 and not all(x.isfinite().all() for x in (q, k, v, scale)):
        # A product with a weight of zero would carry NaN to queries that do not see it, its gradient to hidden keys.
        return torch.cat(
            [
                _attend(
                    q[t, None], k[seen], v[seen], seen[None, seen], alpha=alpha, scale=scale[t, None],
                    bias=None if bias is None else bias[t, None, seen],
                )
                for t, seen in enumerate(visible)
            ]
        )  # fmt: skip
    scores = alpha * torch.einsum("thd,shd->hts", q, k)
    if bias is not None:
        scores = scores + bias
    weights = scale[:, None] * F.silu(scores) * visible
    return torch.einsum("hts,shd->thd", weights.to(v.dtype), v)


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
