"""Baselines in which only targets read, and only from the history: DIN, and stacked cross attention (STCA).

The history is not encoded: what targets become is all that comes out, and feeds the head.
"""

# S = tokens of all sequences, M = targets of all, B = sequences, n = longest sequence of the batch, m = most targets of
# a sequence, E = model width, H = heads, D = head width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import LayerNorm, SwiGLU, full_precision, linear
from .padded import Padded
from .sequences import Limits, Sequences


class DIN(nn.Module):
    """Deep interest network (arXiv 1706.06978, section 4.3): weights of a small net, not normalised over the history.

    w_j = MLP([h_j, t, h_j - t, h_j * t]);  out = MLP([sum_j w_j h_j, t])
    """

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        del limits  # the weights know neither lengths nor positions
        self.activation_unit = nn.Sequential(
            linear(4 * config.width, config.ffn_width), nn.PReLU(), linear(config.ffn_width, 1)
        )
        self.output = nn.Sequential(
            linear(2 * config.width, config.ffn_width),
            nn.PReLU(),
            nn.Dropout(config.dropout),
            linear(config.ffn_width, config.width),
        )

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to targets [M, E]."""
        x_SE = full_precision(x_SE)
        rows, _ = sequences.keep(sequences.is_target)
        sequence_of_target = sequences.sequence_of_token[rows]
        padded = Padded.of(sequences)
        history_MnE = padded.pad(x_SE)[sequence_of_target]
        target_ME = x_SE[rows]
        target_MnE = target_ME[:, None].expand_as(history_MnE)
        pairs = [history_MnE, target_MnE, history_MnE - target_MnE, history_MnE * target_MnE]
        weights_Mn = self.activation_unit(torch.cat(pairs, dim=2))[:, :, 0]
        weights_Mn = weights_Mn.masked_fill(~padded.is_history()[sequence_of_target], 0)
        interest_ME = torch.einsum("mn,mne->me", full_precision(weights_Mn), history_MnE)
        return full_precision(self.output(torch.cat([interest_ME, target_ME], dim=1)))


class STCALayer(nn.Module):
    """The queries of all targets read the history, which the layer sees through a transform of its own.

    o = W_o attention(W_q q, W_k X', W_v X') with X' = norm(swiglu(X))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.history = nn.Sequential(SwiGLU(config.width, hidden=config.ffn_width), LayerNorm(config.width))
        self.query = linear(config.width, config.num_heads * config.qk_dim, bias=False)
        self.key = linear(config.width, config.num_heads * config.qk_dim, bias=False)
        self.value = linear(config.width, config.num_heads * config.value_dim, bias=False)
        self.output = linear(config.num_heads * config.value_dim, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query_ME: Tensor, x_SE: Tensor, targets: Padded, history: Padded) -> Tensor:
        """What the queries [M, E] read of the tokens [S, E]: [M, E]."""
        keys_SE = self.history(x_SE)
        q, k, v = (
            padded.pad(x.unflatten(1, (self.num_heads, -1))).transpose(1, 2)
            for padded, x in (
                (targets, self.query(query_ME)),
                (history, self.key(keys_SE)),
                (history, self.value(keys_SE)),
            )
        )
        is_history = history.is_history()
        has_none = ~is_history.any(dim=1)
        # A softmax over nothing is not a number: such samples read everything, of which nothing is kept.
        out = F.scaled_dot_product_attention(q, k, v, (is_history | has_none[:, None])[:, None, None])
        out = out.masked_fill(has_none[:, None, None, None], 0)
        read_ME: Tensor = self.output(targets.unpad(out.transpose(1, 2).flatten(2)))
        return self.dropout(full_precision(read_ME))


class STCA(nn.Module):
    """Stacked target-to-history cross attention (arXiv 2511.06077), with the equations as its summaries give them.

    q_1 = norm(swiglu(t));  o_i = layer_i(q_i, X);  q_{i+1} = W_i [o_1 ... o_i, t]
    """

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        del limits  # softmax weights know neither lengths nor positions
        self.target = nn.Sequential(SwiGLU(config.width, hidden=config.ffn_width), LayerNorm(config.width))
        self.layers = nn.ModuleList(STCALayer(config) for _ in range(config.num_layers))
        self.fuse = nn.ModuleList(linear((i + 2) * config.width, config.width) for i in range(config.num_layers))

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to targets [M, E]."""
        x_SE = full_precision(x_SE)
        rows, of_targets = sequences.keep(sequences.is_target)
        history, targets = Padded.of(sequences), Padded.of(of_targets)
        target_ME = x_SE[rows]
        query_ME, read = self.target(target_ME), []
        for layer, fuse in zip(self.layers, self.fuse, strict=True):
            read.append(layer(query_ME, x_SE, targets, history))
            query_ME = fuse(torch.cat([*read, target_ME], dim=1))
        return full_precision(query_ME)
