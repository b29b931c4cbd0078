"""Jagged tokens as a padded batch, for the baselines and ablations whose attention is torch's own."""

# S = tokens of all sequences, B = sequences, n = longest sequence of the batch, H = heads, D = head width

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import AttentionMask, RelativeBias
from ..kernels.hstu_attention.bias import bucket_thresholds, time_buckets
from .sequences import Sequences


@dataclass(frozen=True, slots=True)
class Padded:
    """Where the tokens of jagged sequences lie in a batch [B, n], whose rows are filled up with zeros."""

    places: Tensor
    """[S], numbers of the B * n places."""
    history_ends: Tensor
    """[B], tokens of each sequence before its targets."""
    length: int
    """n, at least 1."""

    @classmethod
    def of(cls, sequences: Sequences) -> Padded:
        """Pad to the longest sequence of the batch; a GPU makes the host wait for that number."""
        lengths = sequences.offsets.diff()
        length = max(1, int(lengths.max()))
        return cls(sequences.sequence_of_token * length + sequences.indices, sequences.history_ends, length)

    def pad(self, x_S: Tensor) -> Tensor:
        """Values [S, ...] as [B, n, ...]."""
        batch_size = self.history_ends.numel()
        places = x_S.new_zeros(batch_size * self.length, *x_S.shape[1:])
        return places.index_copy(0, self.places, x_S).view(batch_size, self.length, *x_S.shape[1:])

    def unpad(self, x_Bn: Tensor) -> Tensor:
        """Values [B, n, ...] as [S, ...]."""
        return x_Bn.flatten(0, 1).index_select(0, self.places)

    def is_history(self) -> Tensor:
        """Whether a place holds a contextual token or an event before the targets, [B, n] bool."""
        return torch.arange(self.length, device=self.places.device) < self.history_ends[:, None]

    def visible(self, mask: AttentionMask) -> Tensor:
        """Which keys each query sees, [B, n, n] bool; a query sees itself, also where it is padding."""
        position = torch.arange(self.length, device=self.places.device)
        ends = self.history_ends + mask.history_end(0, 0)  # the ids of targets, shifted by the contextual tokens
        return mask.visible(position[:, None], position, ends[:, None, None])

    def position_bias(self, weight: Tensor) -> Tensor:
        """`weight[i - j + N - 1]` [n, n] of a position_weight [2 N - 1]."""
        position = torch.arange(self.length, device=self.places.device)
        return weight[position[:, None] - position + weight.numel() // 2]

    def time_bias(self, weight: Tensor, *, timestamps: Tensor, query_timestamps: Tensor) -> Tensor:
        """`weight[bucket(|query_timestamp_i - timestamp_j|)]` [B, n, n] of a time_weight [K + 1]; times [S]."""
        elapsed = (self.pad(query_timestamps)[:, :, None] - self.pad(timestamps)[:, None]).abs()
        buckets = time_buckets(elapsed, bucket_thresholds(weight.numel() - 1, elapsed.device))
        return weight[buckets.long()]

    def bias(self, bias: RelativeBias) -> Tensor:
        """A position and time bias as numbers [B or 1, n, n]."""
        terms = []
        if bias.position_weight is not None:
            terms.append(self.position_bias(bias.position_weight)[None])
        if bias.time_weight is not None and bias.timestamps is not None:
            queries = bias.timestamps if bias.query_timestamps is None else bias.query_timestamps
            terms.append(self.time_bias(bias.time_weight, timestamps=bias.timestamps, query_timestamps=queries))
        return sum(terms[1:], terms[0])


def softmax_attention(
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    padded: Padded,
    *,
    visible: Tensor,
    alpha: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`out_i = sum over visible j of softmax_j(alpha <q_i, k_j> + bias_ij) v_j`, in torch's own attention.

    Args:
        q_SHD, k_SHD: [S, H, Dqk].
        v_SHD: [S, H, Dv].
        visible: [B, n, n] bool.
        alpha: 1 / sqrt(Dqk) unless given.
        bias: [B or 1, n, n], shared by the heads.
        dropout: probability of dropping a weight.

    Returns:
        [S, H, Dv].
    """
    q, k, v = (padded.pad(x).transpose(1, 2) for x in (q_SHD, k_SHD, v_SHD))
    mask = visible if bias is None else bias.to(q.dtype).masked_fill(~visible, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, mask[:, None], dropout, scale=alpha)
    return padded.unpad(out.transpose(1, 2))
