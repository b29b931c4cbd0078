"""Norms and small MLPs shared by the encoders, the stack and the heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
EMBEDDING_STD = 0.02
"""Standard deviation of a fresh row of the small tables, the same as the default of the sharded ones."""


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if autocast made it a half, else as it is: norms and losses are not computed in halves."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, never in half precision."""

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]; float32 unless it is float64."""
        return F.layer_norm(full_precision(x), (self.width,), self.weight, self.bias, NORM_EPS)


class RMSNorm(nn.Module):
    """x over its root mean square (arXiv 1910.07467), times a learned scale if `affine`; never in half precision."""

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]; float32 unless it is float64."""
        return F.rms_norm(full_precision(x), (self.width,), self.weight, NORM_EPS)


class SwiGLU(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x), without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, *, hidden: int) -> None:
        super().__init__()
        self.gate = linear(width, hidden, bias=False)
        self.up = linear(width, hidden, bias=False)
        self.down = linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class SwishLayerNorm(nn.Module):
    """x * sigmoid(LayerNorm(x)), the activation between linear layers in the industrial variant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Activate `x` [..., width]; float32 unless it is float64."""
        return full_precision(x) * torch.sigmoid(self.norm(x))


def linear(num_inputs: int, num_outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and a zero bias."""
    layer = nn.Linear(num_inputs, num_outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(num_inputs: int, hidden: int, num_outputs: int) -> nn.Sequential:
    """Linear, SwishLayerNorm, Linear, LayerNorm: how features become vectors of one scale."""
    return nn.Sequential(
        linear(num_inputs, hidden), SwishLayerNorm(hidden), linear(hidden, num_outputs), LayerNorm(num_outputs)
    )


def table(num_rows: int, width: int, *, std: float = EMBEDDING_STD) -> nn.Embedding:
    """A dense embedding table of N(0, std) rows."""
    embedding = nn.Embedding(num_rows, width)
    nn.init.normal_(embedding.weight, std=std)
    return embedding
