"""How a user vector and an item vector become a score: their dot product, or a small network that reads both.

    dot:  <q, i> / temperature
    mlp:  (<w, q * i> + <v, relu(W [q; i] + b)>) / temperature

The network is NeuMF (He et al., arXiv 1708.05031, section 3.4) with one hidden layer, and with the same q and i in both
of its parts. w begins as ones and v as zeros: training starts from the dot product, which such networks are slow to
learn (Rendle et al., arXiv 2005.09683). W [q; i] is W_q q + W_i i: each is made once of a user or an item, and only
sum, relu and the product with v once of a pair.
"""

# M = user vectors, C = items, D = their width, H = hidden width; queries and items may have a leading dimension B

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layers import linear

LOGITS_PER_CHUNK = {"cpu": 2**19, "cuda": 2**26}
"""Logits of the softmax that exist at once. Two MiB stay in a CPU's cache: 8192 x 3706 logits of width 50 took one
thread 0.21 s, 0.34 s in chunks four times as large, 0.91 s whole through `cross_entropy`. A GPU wants few launches."""


class Similarity(Protocol):
    """Scores of queries against items; what is made of one of them alone is made before they meet."""

    def queries(self, users_MD: Tensor) -> Tensor:
        """What scoring reads of user vectors of length 1; to be divided by the temperature."""
        ...

    def items(self, items_CD: Tensor) -> Tensor:
        """What scoring reads of item vectors of length 1."""
        ...

    def scores(self, queries_M: Tensor, items_C: Tensor) -> Tensor:
        """Of every query [..., M, X] with every item [..., C, X], [..., M, C]."""
        ...

    def pairs(self, queries_M: Tensor, items_M: Tensor) -> Tensor:
        """Of every query [..., M, X] with the item beside it [..., M, X], [..., M]."""
        ...


class DotProduct:
    """The cosine, as vectors are of length 1."""

    def queries(self, users_MD: Tensor) -> Tensor:
        """The vectors themselves, as for items."""
        return users_MD

    def items(self, items_CD: Tensor) -> Tensor:
        """As queries."""
        return items_CD

    def scores(self, queries_M: Tensor, items_C: Tensor) -> Tensor:
        """As `Similarity` says."""
        return queries_M @ items_C.transpose(-1, -2)

    def pairs(self, queries_M: Tensor, items_M: Tensor) -> Tensor:
        """As `Similarity` says."""
        return (queries_M * items_M).sum(dim=-1)


DOT = DotProduct()


class MLP(nn.Module):
    """The network above. A query is [w * q; W_q q + b] and an item [i; W_i i], both [..., D + H].

    relu(x) / temperature is relu(x / temperature), so queries are divided as a whole and items in their hidden part.
    """

    def __init__(self, *, width: int, hidden: int, temperature: float) -> None:
        super().__init__()
        self.width = width
        self.temperature = temperature
        self.product = nn.Parameter(torch.ones(width))
        self.hidden = linear(2 * width, hidden)
        self.output = linear(hidden, 1, bias=False)
        nn.init.zeros_(self.output.weight)

    def queries(self, users_MD: Tensor) -> Tensor:
        """[..., D] to [..., D + H], also under autocast in full precision, as in evaluation."""
        with torch.autocast(users_MD.device.type, enabled=False):
            hidden_MH = F.linear(users_MD, self.hidden.weight[:, : self.width], self.hidden.bias)
            return torch.cat([users_MD * self.product, hidden_MH], dim=-1)

    def items(self, items_CD: Tensor) -> Tensor:
        """As queries."""
        with torch.autocast(items_CD.device.type, enabled=False):
            hidden_CH = F.linear(items_CD, self.hidden.weight[:, self.width :]) / self.temperature
            return torch.cat([items_CD, hidden_CH], dim=-1)

    def scores(self, queries_M: Tensor, items_C: Tensor) -> Tensor:
        """As `Similarity` says; the hidden layer of all pairs never exists."""
        (queries_MD, queries_MH), (items_CD, items_CH) = self._parts(queries_M), self._parts(items_C)
        hidden = cast(Tensor, _HiddenLayer.apply(queries_MH, items_CH, self.output.weight[0]))  # type: ignore[no-untyped-call]
        return hidden.add_(queries_MD @ items_CD.transpose(-1, -2))

    def pairs(self, queries_M: Tensor, items_M: Tensor) -> Tensor:
        """As `Similarity` says."""
        (queries_MD, queries_MH), (items_MD, items_MH) = self._parts(queries_M), self._parts(items_M)
        # As sums: under autocast a matrix product would be in half precision.
        return (queries_MD * items_MD).sum(dim=-1) + (F.relu(queries_MH + items_MH) * self.output.weight[0]).sum(dim=-1)

    def _parts(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return vectors[..., : self.width], vectors[..., self.width :]


class _HiddenLayer(torch.autograd.Function):
    """sum over h of v_h relu(x_mh + y_ch): queries x [..., M, H], items y [..., C, H], weights v [H] to [..., M, C].

    One hidden unit at a time, and the backward pass asks again which sums are positive: what exists at once is as large
    as the scores, not H times that. With p_mc = dscore_mc where unit h is on, and 0 elsewhere,
    dx_mh = v_h sum_c p_mc, dy_ch = v_h sum_m p_mc and dv_h = sum_mc p_mc (x_mh + y_ch).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, weights_H: Tensor) -> Tensor:
        queries, items = (x.movedim(-1, 0).contiguous() for x in (queries, items))  # [H, ...]: a unit's are neighbours
        ctx.save_for_backward(queries, items, weights_H)
        num_queries = queries.size(-1)
        scores = queries.new_zeros(*queries.shape[1:], items.size(-1))
        # Evaluation asks for more at once than stays in a cache; losses ask for one such chunk.
        rows = max(1, LOGITS_PER_CHUNK[queries.device.type] * num_queries // max(scores.numel(), 1))
        for begin in range(0, num_queries, rows):
            chunk = slice(begin, begin + rows)
            for query, item, weight in zip(queries, items, weights_H, strict=True):
                scores[..., chunk, :].addcmul_((query[..., chunk, None] + item[..., None, :]).relu_(), weight)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, items, weights_H = ctx.saved_tensors
        over_items, over_queries = torch.empty_like(queries), torch.empty_like(items)
        passed = torch.empty_like(dscores)
        for h in range(len(weights_H)):
            # Written as 0.0 and 1.0: the product of floats and booleans took 40 times as long.
            torch.gt(queries[h, ..., None], -items[h, ..., None, :], out=passed).mul_(dscores)
            over_items[h], over_queries[h] = passed.sum(dim=-1), passed.sum(dim=-2)
        dweights_H = (queries * over_items).flatten(1).sum(dim=1) + (items * over_queries).flatten(1).sum(dim=1)
        return over_items.movedim(0, -1) * weights_H, over_queries.movedim(0, -1) * weights_H, dweights_H
