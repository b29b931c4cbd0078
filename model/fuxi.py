"""FuXi-alpha (arXiv 2502.03036, section 3): attention in three channels that do not mix, and a two-stage FFN.

    u, v, q, k = split(silu(rms(x) W_uvqk))
    a_i        = [sum_j beta(i - j) v_j,  sum_j gamma(t_i - t_j) v_j,  sum_j silu(<q_i, k_j>) / N v_j]   for each head
    y          = x + W_0 (u * rms(a)) + b_0
    out        = y + W_2 (silu(W_1 rms(y)) * W_3 rms(y))

Sums go over the visible j. The positional and temporal channels weigh values by learned numbers alone; they run over
the padded batch. The semantic one is the attention of HSTU without bias.
"""

# S = tokens of all sequences, B = sequences, n = longest sequence of the batch, E = model width, H = heads, D = head
# width, V = H * D, N = longest sequence possible

import torch
from torch import Tensor, nn

from ..kernels import hstu_attention
from .config import ModelConfig
from .hstu import UVQK_STD, RelativeBiasWeights
from .layers import RMSNorm, SwiGLU, full_precision, linear
from .padded import Padded
from .sequences import Limits, Sequences

CHANNELS = 3


class FuXiLayer(nn.Module):
    """One block: adaptive multi-channel self-attention, then the multi-stage FFN."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        self.max_seq_len = limits.max_seq_len
        self.mask = limits.mask()
        self.num_heads = config.num_heads
        value_width, qk_width = config.num_heads * config.value_dim, config.num_heads * config.qk_dim
        self.widths = [CHANNELS * value_width, value_width, qk_width, qk_width]
        self.norm_input = RMSNorm(config.width, affine=False)
        self.uvqk = linear(config.width, sum(self.widths), bias=False)
        nn.init.normal_(self.uvqk.weight, std=UVQK_STD)
        self.bias = RelativeBiasWeights(max_seq_len=limits.max_seq_len, time=True)
        self.norm_attention = RMSNorm(CHANNELS * value_width, affine=False)
        self.output = linear(CHANNELS * value_width, config.width)
        self.norm_ffn = RMSNorm(config.width, affine=False)
        self.ffn = SwiGLU(config.width, hidden=config.ffn_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_SE: Tensor, sequences: Sequences, padded: Padded, visible: Tensor) -> Tensor:
        """Tokens [S, E] to tokens [S, E]; `visible` [B, n, n] says which keys a query sees."""
        uvqk = nn.functional.silu(self.uvqk(self.norm_input(x_SE)))
        u, v, q, k = torch.split(uvqk, self.widths, dim=1)
        v, q, k = (x.view(len(x), self.num_heads, x.shape[1] // self.num_heads) for x in (v, q, k))
        semantic_SHD = hstu_attention(
            q,
            k,
            v,
            sequences.offsets,
            max_seq_len=self.max_seq_len,
            alpha=1.0,
            num_targets=sequences.num_targets,
            mask=self.mask,
        )
        channels = [*self.by_position_and_time(v, sequences, padded, visible), semantic_SHD]
        a_SV = self.norm_attention(torch.cat(channels, dim=2).flatten(1))
        y_SE = x_SE + full_precision(self.output(self.dropout(u * a_SV)))
        return y_SE + full_precision(self.ffn(self.dropout(self.norm_ffn(y_SE))))

    def by_position_and_time(
        self, v_SHD: Tensor, sequences: Sequences, padded: Padded, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The positional and the temporal channel, [S, H, D] each."""
        v_BnV = padded.pad(v_SHD.flatten(1))
        assert self.bias.time_weight is not None
        by_position = padded.position_bias(self.bias.position_weight) * visible
        by_time = visible * padded.time_bias(
            self.bias.time_weight, timestamps=sequences.timestamps, query_timestamps=sequences.query_timestamps
        )
        position, time = (
            padded.unpad(weights.to(v_BnV.dtype) @ v_BnV).view_as(v_SHD) for weights in (by_position, by_time)
        )
        return position, time


class FuXiAlpha(nn.Module):
    """`num_layers` FuXi blocks."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.mask = limits.mask()
        self.layers = nn.ModuleList(FuXiLayer(config, limits) for _ in range(config.num_layers))

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E], or targets [M, E]; the residual stream stays float32 under autocast."""
        padded = Padded.of(sequences)
        visible = padded.visible(self.mask)
        x_SE = full_precision(x_SE)
        for layer in self.layers:
            x_SE = layer(x_SE, sequences, padded, visible)
        return self.limits.read_by_head(x_SE, sequences)
