"""Transformers to compare HSTU with: SASRec (arXiv 1808.09781), and the Llama-style one of arXiv 2412.00714.

Both run torch's scaled_dot_product_attention over the batch padded to its longest sequence, under HSTU's mask.
"""

# S = tokens of all sequences, B = sequences, n = longest sequence of the batch, E = model width, H = heads, D = head
# width

import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import LayerNorm, RMSNorm, SwiGLU, full_precision, linear
from .padded import Padded, softmax_attention
from .rotary import rotate
from .sequences import Limits, Sequences


class SASRecLayer(nn.Module):
    """Post-norm around queries normalised alone, as published and as in the HSTU paper's baseline.

    q = norm(x);  y = norm(q + W_o attention(W_q q, W_k x, W_v x));  out = y + W_2 relu(W_1 y)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm_query = LayerNorm(config.width)
        self.query = linear(config.width, config.num_heads * config.qk_dim)
        self.key = linear(config.width, config.num_heads * config.qk_dim)
        self.value = linear(config.width, config.num_heads * config.value_dim)
        self.output = linear(config.num_heads * config.value_dim, config.width)
        self.norm_ffn = LayerNorm(config.width)
        self.hidden = linear(config.width, config.ffn_width)
        self.ffn_output = linear(config.ffn_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_SE: Tensor, padded: Padded, visible: Tensor) -> Tensor:
        """Tokens [S, E] to tokens [S, E]; `visible` [B, n, n] says which keys a query sees."""
        query_SE = self.norm_query(x_SE)
        q, k, v = (
            x.unflatten(1, (self.num_heads, -1)) for x in (self.query(query_SE), self.key(x_SE), self.value(x_SE))
        )
        dropout = self.dropout.p if self.training else 0.0
        attended = softmax_attention(q, k, v, padded, visible=visible, dropout=dropout)
        y_SE = self.norm_ffn(query_SE + self.output(attended.flatten(1)))
        hidden = self.dropout(F.relu(self.hidden(y_SE)))
        return y_SE + self.dropout(full_precision(self.ffn_output(hidden)))


class SASRec(nn.Module):
    """`num_layers` layers of SASRec."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.mask = limits.mask()
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_layers))

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E], or targets [M, E]."""
        padded = Padded.of(sequences)
        visible = padded.visible(self.mask)
        for layer in self.layers:
            x_SE = layer(x_SE, padded, visible)
        return self.limits.read_by_head(x_SE, sequences)


class LlamaLayer(nn.Module):
    """Pre-norm with rotary positions and a gated feed-forward network, without biases.

    y = x + W_o attention(rope(W_q norm(x)), rope(W_k norm(x)), W_v norm(x));  out = y + swiglu(norm(y))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.widths = [config.num_heads * width for width in (config.qk_dim, config.qk_dim, config.value_dim)]
        self.norm_attention = RMSNorm(config.width)
        self.qkv = linear(config.width, sum(self.widths), bias=False)
        self.output = linear(self.widths[2], config.width, bias=False)
        self.norm_ffn = RMSNorm(config.width)
        self.ffn = SwiGLU(config.width, hidden=config.ffn_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_SE: Tensor, positions_S: Tensor, padded: Padded, visible: Tensor) -> Tensor:
        """Tokens [S, E] to tokens [S, E]; `visible` [B, n, n] says which keys a query sees."""
        qkv = self.qkv(self.norm_attention(x_SE)).split(self.widths, dim=1)
        q, k, v = (x.unflatten(1, (self.num_heads, -1)) for x in qkv)
        q, k = rotate(q, positions_S), rotate(k, positions_S)
        attended = softmax_attention(q, k, v, padded, visible=visible)
        y_SE = x_SE + self.dropout(full_precision(self.output(attended.flatten(1))))
        return y_SE + self.dropout(full_precision(self.ffn(self.norm_ffn(y_SE))))


class Llama(nn.Module):
    """`num_layers` Llama-style layers, and a norm behind the last."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.mask = limits.mask()
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to tokens [S, E], or targets [M, E]; the residual stream stays float32 under autocast."""
        padded, positions_S = Padded.of(sequences), sequences.positions
        visible = padded.visible(self.mask)
        x_SE = full_precision(x_SE)
        for layer in self.layers:
            x_SE = layer(x_SE, positions_S, padded, visible)
        return self.limits.read_by_head(self.norm(x_SE), sequences)
