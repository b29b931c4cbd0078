"""The HSTU layer and stack: pointwise attention gated by the token itself (arXiv 2402.17152, section 3).

    u, v, q, k = split(act(norm(x) W_uvqk + b))
    a_i        = sum over visible j of silu(alpha <q_i, k_j> + bias_ij) v_j / N
    out        = x + W_o dropout(norm(a) * u) + b_o

The research variant is the default of `ModelConfig`. The industrial one (the authors' DLRM-v3 `STULayer`) activates
u only, learns the norms' scales, scales by 1/sqrt(D_qk), and projects [u, a, norm(a) * u].
"""

# S = tokens of all sequences, B = sequences, E = model width, H = heads, D = head width (of q and k, or of u and v),
# N = longest sequence possible

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import AttentionMask, RelativeBias, hstu_attention
from .config import ModelConfig
from .layers import LayerNorm, full_precision, linear

BIAS_STD = 0.02
NUM_TIME_BUCKETS = 128
UVQK_STD = 0.02


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which tokens form a sequence, and when they happened; every tensor is int64."""

    offsets: Tensor
    """[B+1], where each sequence begins and ends among the S tokens."""
    num_targets: Tensor
    """[B], trailing tokens that see the tokens before them and themselves, but not each other."""
    timestamps: Tensor
    """[S]"""
    query_timestamps: Tensor
    """[S], the time a token counts from when it looks at others."""


class RelativeBiasWeights(nn.Module):
    """A layer's learned bias by distance in positions and, if `time`, in time (section 3.1's rab, public code)."""

    def __init__(self, *, max_seq_len: int, time: bool) -> None:
        super().__init__()
        self.position_weight = nn.Parameter(torch.empty(2 * max_seq_len - 1).normal_(std=BIAS_STD))
        self.time_weight = nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1).normal_(std=BIAS_STD)) if time else None

    def forward(self, sequences: Sequences) -> RelativeBias:
        """The bias between the tokens of these sequences."""
        if self.time_weight is None:
            return RelativeBias(position_weight=self.position_weight)
        return RelativeBias(
            position_weight=self.position_weight,
            time_weight=self.time_weight,
            timestamps=sequences.timestamps,
            query_timestamps=sequences.query_timestamps,
        )


class AttentionNorm(nn.Module):
    """Norm of the attention output, over all heads together or over each alone.

    The affine form has a scale and shift per column over all heads, or per head alone, as published.
    """

    def __init__(self, *, num_heads: int, value_dim: int, per_head: bool, affine: bool) -> None:
        super().__init__()
        self.per_head = per_head
        self.norm = LayerNorm(value_dim if per_head else num_heads * value_dim, affine=affine and not per_head)
        self.head_weight = nn.Parameter(torch.ones(num_heads, 1)) if affine and per_head else None
        self.head_bias = nn.Parameter(torch.zeros(num_heads, 1)) if affine and per_head else None

    def forward(self, a_SHD: Tensor) -> Tensor:
        """Normalise [S, H, D]; returns [S, H * D]."""
        if not self.per_head:
            return self.norm(a_SHD.flatten(1))
        normed_SHD = self.norm(a_SHD)
        if self.head_weight is not None and self.head_bias is not None:
            normed_SHD = normed_SHD * self.head_weight + self.head_bias
        return normed_SHD.flatten(1)


class HSTULayer(nn.Module):
    """One layer; `max_seq_len` (N) divides the attention and sizes the position bias."""

    def __init__(self, config: ModelConfig, *, max_seq_len: int, mask: AttentionMask) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.mask = mask
        self.num_heads = config.num_heads
        self.activate_all = config.activation == "uvqk"
        self.concat = config.gating == "concat"
        self.alpha = 1.0 if config.attention_alpha == "one" else config.qk_dim**-0.5
        value_width = config.num_heads * config.value_dim
        self.widths = [value_width, value_width, config.num_heads * config.qk_dim, config.num_heads * config.qk_dim]

        self.norm_input = LayerNorm(config.width, affine=config.norm_affine)
        self.uvqk = linear(config.width, sum(self.widths), bias=config.projection_bias)
        if not config.projection_bias:
            nn.init.normal_(self.uvqk.weight, std=UVQK_STD)
        self.bias = None
        if config.relative_bias != "none":
            self.bias = RelativeBiasWeights(max_seq_len=max_seq_len, time=config.relative_bias == "position_time")
        self.norm_attention = AttentionNorm(
            num_heads=config.num_heads,
            value_dim=config.value_dim,
            per_head=config.norm == "group_norm",
            affine=config.norm_affine,
        )
        self.dropout = nn.Dropout(config.dropout)
        # As published: the concatenating form has no output bias.
        self.output = linear(value_width * (3 if self.concat else 1), config.width, bias=not self.concat)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E]."""
        u_SV, v_SHD, q_SHD, k_SHD = self.project(x_SE)
        a_SHD = hstu_attention(
            q_SHD,
            k_SHD,
            v_SHD,
            sequences.offsets,
            max_seq_len=self.max_seq_len,
            alpha=self.alpha,
            num_targets=sequences.num_targets,
            mask=self.mask,
            bias=None if self.bias is None else self.bias(sequences),
        )
        return x_SE + self.output(self.dropout(self.gate(u_SV, a_SHD)))

    def project(self, x_SE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate u [S, H * D], and v, q, k [S, H, D], activated as configured."""
        uvqk = self.uvqk(self.norm_input(x_SE))
        if self.activate_all:
            uvqk = F.silu(uvqk)
        u_SV, v_SV, q_SK, k_SK = uvqk.split(self.widths, dim=-1)
        if not self.activate_all:
            u_SV = F.silu(u_SV)
        v_SHD, q_SHD, k_SHD = (
            x.unflatten(1, (self.num_heads, x.shape[1] // self.num_heads)) for x in (v_SV, q_SK, k_SK)
        )
        return u_SV, v_SHD, q_SHD, k_SHD

    def gate(self, u_SV: Tensor, a_SHD: Tensor) -> Tensor:
        """What the output projection reads."""
        gated_SV = u_SV * self.norm_attention(a_SHD)
        if not self.concat:
            return gated_SV
        return torch.cat([u_SV, a_SHD.flatten(1), gated_SV], dim=-1)


class HSTUStack(nn.Module):
    """`num_layers` HSTU layers under one mask."""

    def __init__(self, config: ModelConfig, *, max_seq_len: int, mask: AttentionMask) -> None:
        super().__init__()
        layers = (HSTULayer(config, max_seq_len=max_seq_len, mask=mask) for _ in range(config.num_layers))
        self.layers = nn.ModuleList(layers)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E]; the residual stream stays float32 under autocast."""
        x_SE = full_precision(x_SE)
        for layer in self.layers:
            x_SE = layer(x_SE, sequences)
        return x_SE
