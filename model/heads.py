"""What turns encoded tokens into predictions: logits of several tasks, or a vector comparable with items."""

# M = predictions, E = model width, D = embedding width, K = tasks, X = experts, H = hidden width

import torch
from torch import Tensor, nn

from .layers import LayerNorm, SwishLayerNorm, full_precision, linear, mlp
from .losses import normalize


class RankingHead(nn.Module):
    """A logit per task from a target's encoded token and the target's own content.

    norm(token) * MLP(content) -> linear -> SwishLayerNorm -> linear, as in the authors' DLRM-v3 multitask module.
    """

    def __init__(self, *, width: int, hidden: int, num_tasks: int, norm_affine: bool, num_experts: int = 0) -> None:
        super().__init__()
        self.norm = LayerNorm(width, affine=norm_affine)
        self.item = mlp(width, hidden, width)
        if num_experts:
            self.predict: nn.Module = Experts(width=width, hidden=hidden, num_tasks=num_tasks, num_experts=num_experts)
        else:
            self.predict = nn.Sequential(linear(width, hidden), SwishLayerNorm(hidden), linear(hidden, num_tasks))

    def forward(self, token_ME: Tensor, content_ME: Tensor) -> Tensor:
        """Logits [M, K], float32."""
        return full_precision(self.predict(self.norm(token_ME) * self.item(content_ME)))


class Experts(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018, section 4.2): hidden layers that each task weighs alone.

    h_x = SwishLayerNorm(W_x z);  g_k = softmax(G_k z);  logit_k = <w_k, sum_x g_kx h_x> + b_k
    """

    def __init__(self, *, width: int, hidden: int, num_tasks: int, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(linear(width, hidden), SwishLayerNorm(hidden)) for _ in range(num_experts)
        )
        self.gates = nn.ModuleList(linear(width, num_experts, bias=False) for _ in range(num_tasks))
        self.outputs = nn.ModuleList(linear(hidden, 1) for _ in range(num_tasks))

    def forward(self, z_ME: Tensor) -> Tensor:
        """Logits [M, K]."""
        hidden_MXH = torch.stack([expert(z_ME) for expert in self.experts], dim=1)
        logits = []
        for gate, output in zip(self.gates, self.outputs, strict=True):
            weights_MX = full_precision(gate(z_ME)).softmax(dim=1)
            logits.append(output((weights_MX[:, :, None] * hidden_MXH).sum(dim=1)))
        return torch.cat(logits, dim=1)


class UserVectorHead(nn.Module):
    """A user vector of length 1 from an encoded token; a projection only where widths differ."""

    def __init__(self, *, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.project = nn.Identity() if width == embedding_dim else linear(width, embedding_dim)

    def forward(self, token_ME: Tensor) -> Tensor:
        """[M, D], float32."""
        return normalize(self.project(token_ME))
