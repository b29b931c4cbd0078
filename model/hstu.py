"""The HSTU layer and stack: pointwise attention gated by the token itself (arXiv 2402.17152, section 3).

    u, v, q, k = split(act(norm(x) W_uvqk + b))
    a_i        = sum over visible j of silu(alpha <q_i, k_j> + bias_ij) v_j / N
    out        = x + W_o dropout(norm(a) * u) + b_o

The research variant is the default of `ModelConfig`. The industrial one (the authors' DLRM-v3 `STULayer`) activates
u only, learns the norms' scales, scales by 1/sqrt(D_qk), and projects [u, a, norm(a) * u].

ULTRA-HSTU (arXiv 2602.16986) is a setting of the same layers: a semi-local mask (`window` and `full_tail` or
`prefix`), and attention truncation (`tail`), whose layers read the newest events only.
"""

# S = tokens of all sequences, M = targets of all, E = model width, H = heads, D = head width (of q and k, or of u and
# v), N = longest sequence possible

import torch
from torch import Tensor, nn

from ..kernels import AttentionMask, RelativeBias, gated_output, hstu_attention, new_seed, norm_uvqk
from .config import ModelConfig
from .layers import NORM_EPS, LayerNorm, full_precision, linear
from .padded import Padded, softmax_attention
from .rematerialize import rematerialized
from .rotary import rotate
from .sequences import Limits, Sequences

BIAS_STD = 0.02
NUM_TIME_BUCKETS = 128
UVQK_STD = 0.02
ALPHA_EXPONENTS = {"one": 0.0, "rsqrt": 0.5, "reciprocal": 1.0}
"""The power of 1/qk_dim that multiplies <q, k>."""


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
    """The parameters of the norm of the attention output, over all heads together or over each alone.

    The affine form has a scale and shift per column over all heads, or per head alone, as published.
    """

    def __init__(self, *, num_heads: int, value_dim: int, per_head: bool, affine: bool) -> None:
        super().__init__()
        self.value_dim = value_dim
        self.norm = LayerNorm(num_heads * value_dim, affine=affine and not per_head)
        self.head_weight = nn.Parameter(torch.ones(num_heads, 1)) if affine and per_head else None
        self.head_bias = nn.Parameter(torch.zeros(num_heads, 1)) if affine and per_head else None

    def by_column(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift [H * D], if there are any."""
        if self.head_weight is None or self.head_bias is None:
            return self.norm.weight, self.norm.bias
        return (
            self.head_weight.expand(-1, self.value_dim).flatten(),
            self.head_bias.expand(-1, self.value_dim).flatten(),
        )


class HSTULayer(nn.Module):
    """One layer; `max_seq_len` (N) divides the attention and sizes the position bias."""

    def __init__(self, config: ModelConfig, *, max_seq_len: int, mask: AttentionMask) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.mask = mask
        self.num_heads = config.num_heads
        self.gating = config.gating
        self.is_softmax = config.attention == "softmax"
        self.rope = config.rope
        self.norm_per_head = config.norm == "group_norm"
        self.dropout = config.dropout
        self.rematerialize = config.rematerialize
        self.fp8 = config.fp8_projections
        self.alpha = float(config.qk_dim ** -ALPHA_EXPONENTS[config.attention_alpha])
        value_width = config.num_heads * config.value_dim
        gate_width = 0 if config.gating == "none" else value_width
        self.widths = [gate_width, value_width, config.num_heads * config.qk_dim, config.num_heads * config.qk_dim]
        self.num_activated = sum(self.widths) if config.activation == "uvqk" else gate_width

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
            per_head=self.norm_per_head,
            affine=config.norm_affine,
        )
        # As published: the concatenating form has no output bias.
        concat = config.gating == "concat"
        self.output = linear(value_width * (3 if concat else 1), config.width, bias=not concat)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E]."""
        seed = new_seed(x_SE.device) if self.training and self.dropout else None
        if self.rematerialize and torch.is_grad_enabled():
            return rematerialized(self.attend, x_SE, sequences, seed)
        return self.attend(x_SE, sequences, seed)

    def attend(self, x_SE: Tensor, sequences: Sequences, seed: Tensor | None) -> Tensor:
        """The layer's equations, without any state; `seed` says what dropout drops, None that it drops nothing."""
        u_SV, v_SHD, q_SHD, k_SHD = self.project(x_SE)
        if self.rope:
            positions_S = sequences.positions
            q_SHD, k_SHD = rotate(q_SHD, positions_S), rotate(k_SHD, positions_S)
        attention = self.softmax if self.is_softmax else self.silu
        return self.gate(u_SV, attention(q_SHD, k_SHD, v_SHD, sequences), x_SE, seed)

    def silu(self, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, sequences: Sequences) -> Tensor:
        """a [S, H, D] of the module's equations."""
        return hstu_attention(
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

    def softmax(self, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, sequences: Sequences) -> Tensor:
        """a [S, H, D] with weights softmax_j(alpha <q_i, k_j> + bias_ij)."""
        padded = Padded.of(sequences)
        bias = None if self.bias is None else padded.bias(self.bias(sequences))
        visible = padded.visible(self.mask)
        return softmax_attention(q_SHD, k_SHD, v_SHD, padded, visible=visible, alpha=self.alpha, bias=bias)

    def project(self, x_SE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate u [S, H * D], of ones where there is none, and v, q, k [S, H, D], activated as configured."""
        uvqk = norm_uvqk(
            x_SE,
            self.uvqk.weight,
            bias_N=self.uvqk.bias,
            norm_weight_E=self.norm_input.weight,
            norm_bias_E=self.norm_input.bias,
            num_activated=self.num_activated,
            eps=NORM_EPS,
            fp8=self.fp8,
        )
        u_SV, v_SV, q_SK, k_SK = torch.split(uvqk, self.widths, dim=-1)
        if self.gating == "none":
            u_SV = torch.ones_like(v_SV)
        v_SHD, q_SHD, k_SHD = (x.view(len(x), self.num_heads, x.shape[1] // self.num_heads) for x in (v_SV, q_SK, k_SK))
        return u_SV, v_SHD, q_SHD, k_SHD

    def gate(self, u_SV: Tensor, a_SHD: Tensor, x_SE: Tensor, seed: Tensor | None) -> Tensor:
        """Gate the attention, project it, and add it to the tokens."""
        norm_weight_V, norm_bias_V = self.norm_attention.by_column()
        return gated_output(
            u_SV,
            a_SHD,
            x_SE,
            self.output.weight,
            bias_E=self.output.bias,
            norm_weight_V=norm_weight_V,
            norm_bias_V=norm_bias_V,
            per_head=self.norm_per_head,
            concat=self.gating == "concat",
            dropout=self.dropout,
            seed=seed,
            eps=NORM_EPS,
            fp8=self.fp8,
        )


class HSTUStack(nn.Module):
    """`num_layers` layers over whole sequences, then those of `tail` over their newest events."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        mask = limits.mask(window=config.window, full_tail=config.full_tail, prefix=config.prefix)
        self.layers = _layers(config, config.num_layers, max_seq_len=limits.max_seq_len, mask=mask)
        self.limits = limits
        self.tail = None if config.tail is None else Tail(config, limits)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E], or targets [M, E]; the residual stream stays float32 under autocast."""
        x_SE = full_precision(x_SE)
        for layer in self.layers:
            x_SE = layer(x_SE, sequences)
        return self.limits.read_by_head(x_SE, sequences) if self.tail is None else self.tail(x_SE, sequences)


class Tail(nn.Module):
    """Attention truncation: layers over contextual tokens, the newest events and targets.

    Older tokens pass by and are put back, or, where the head reads targets alone, end here.
    """

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        assert config.tail is not None
        tail = config.tail
        self.num_events = tail.num_events
        self.limits = limits
        mask = limits.mask(window=tail.window, full_tail=tail.full_tail, prefix=tail.prefix)
        max_seq_len = limits.newest(tail.num_events).max_seq_len
        self.layers = _layers(config, tail.num_layers, max_seq_len=max_seq_len, mask=mask)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E], or targets [M, E]."""
        truncation = sequences.truncate(self.num_events, self.limits)
        older_SE, kept_SE = truncation.split(x_SE)
        kept = truncation.kept
        for layer in self.layers:
            kept_SE = layer(kept_SE, kept)
        if self.limits.only_targets:
            return self.limits.read_by_head(kept_SE, kept)
        return truncation.join(older_SE, kept_SE)


def _layers(config: ModelConfig, count: int, *, max_seq_len: int, mask: AttentionMask) -> nn.ModuleList:
    return nn.ModuleList(HSTULayer(config, max_seq_len=max_seq_len, mask=mask) for _ in range(count))
