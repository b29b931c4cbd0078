"""What turns encoded tokens into predictions: logits of several tasks, or a vector comparable with items."""

# M = predictions, E = model width, D = embedding width, K = tasks

from torch import Tensor, nn

from .layers import LayerNorm, SwishLayerNorm, full_precision, linear, mlp
from .losses import normalize


class RankingHead(nn.Module):
    """A logit per task from a target's encoded token and the target's own content.

    norm(token) * MLP(content) -> linear -> SwishLayerNorm -> linear, as in the authors' DLRM-v3 multitask module.
    """

    def __init__(self, *, width: int, hidden: int, num_tasks: int, norm_affine: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(width, affine=norm_affine)
        self.item = mlp(width, hidden, width)
        self.predict = nn.Sequential(linear(width, hidden), SwishLayerNorm(hidden), linear(hidden, num_tasks))

    def forward(self, token_ME: Tensor, content_ME: Tensor) -> Tensor:
        """Logits [M, K], float32."""
        return full_precision(self.predict(self.norm(token_ME) * self.item(content_ME)))


class UserVectorHead(nn.Module):
    """A user vector of length 1 from an encoded token; a projection only where widths differ."""

    def __init__(self, *, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.project = nn.Identity() if width == embedding_dim else linear(width, embedding_dim)

    def forward(self, token_ME: Tensor) -> Tensor:
        """[M, D], float32."""
        return normalize(self.project(token_ME))
