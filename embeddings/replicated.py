"""Small tables that every rank holds whole: no exchange of ids and vectors, but one sum of gradients over all ranks.

TorchRec's own data_parallel lookup of sequences fails on the CPU, where fbgemm's dense kernel pools although pooling is
off; this one is plain torch, and learns as the sharded tables do: row-wise Adagrad inside the backward pass, once per
backward, with gradients averaged over ranks. Its updates are the same bits on every rank, since the sum is.
"""

# R = rows of a table, D = stored columns, E = ids looked up

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .config import EmbeddingOptimizerConfig


class ReplicatedTables(nn.Module):
    """Tables whose every row lies on every rank.

    Args:
        tables: their names, sizes and keys.
        optimizer: row-wise Adagrad's settings.
    """

    def __init__(self, tables: Sequence[EmbeddingConfig], optimizer: EmbeddingOptimizerConfig) -> None:
        super().__init__()
        self.config = optimizer
        self.table_of = {key: table.name for table in tables for key in table.feature_names}
        self.param_groups = [{"lr": optimizer.lr}]
        """The learning rate, where schedules of torch's optimizers look for it."""
        # Buffers, not parameters: neither the dense optimizer nor the averaging of dense gradients may touch them.
        for table in tables:
            self.register_buffer(f"{table.name}_weight", torch.zeros(table.num_embeddings, table.embedding_dim))
            self.register_buffer(f"{table.name}_squares", torch.zeros(table.num_embeddings))

    def weights(self) -> dict[str, Tensor]:
        """[R, D] of every table, by name."""
        return {name: self.get_buffer(f"{name}_weight") for name in dict.fromkeys(self.table_of.values())}

    def squares(self, table: str) -> Tensor:
        """[R]: sum over updates of the mean over columns of the squared gradient."""
        return self.get_buffer(f"{table}_squares")

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Vectors per key, [E of the key, D], in the order of the ids."""
        ids_E = [ids[key].values() for key in self.table_of]
        # Autograd calls back for what depends on a tensor with a gradient; the weights, which have none, are not it.
        anchor = torch.empty(0, requires_grad=True)
        return dict(zip(self.table_of, _look_up(anchor, self, *ids_E), strict=True))

    @torch.no_grad()
    def update(self, ids_E: Sequence[Tensor], gradients_ED: Sequence[Tensor]) -> None:
        """One step of row-wise Adagrad on the rows that any rank looked up."""
        sums = {name: torch.zeros(len(w), w.size(1) + 1, device=w.device) for name, w in self.weights().items()}
        for table, ids, gradients in zip(self.table_of.values(), ids_E, gradients_ED, strict=True):
            # The last column tells which rows were looked up: one whose gradients cancel still decays.
            rows = torch.cat([gradients.float(), torch.ones_like(ids, dtype=torch.float32)[:, None]], dim=1)
            _add_rows(sums[table], ids, rows)
        flat = torch.cat([each.flatten() for each in sums.values()])
        dist.all_reduce(flat)
        parts = torch.split(flat, [each.numel() for each in sums.values()])
        for (table, each), part in zip(sums.items(), parts, strict=True):
            self._step(table, part.view_as(each))

    def _step(self, table: str, summed: Tensor) -> None:
        weight_RD, squares_R, lr = self.weights()[table], self.squares(table), self.param_groups[0]["lr"]
        gradient_RD = summed[:, :-1] / dist.get_world_size()
        squares_R += gradient_RD.square().mean(1)
        if self.config.weight_decay:
            weight_RD[summed[:, -1] > 0] *= 1 - lr * self.config.weight_decay
        weight_RD -= gradient_RD * (lr / (squares_R.sqrt() + self.config.eps))[:, None]


class _LookUp(torch.autograd.Function):
    """Indexing, whose backward pass updates what was indexed."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, module: ReplicatedTables, *ids_E: Tensor) -> tuple[Tensor, ...]:
        ctx.module = module
        ctx.save_for_backward(*ids_E)
        weights = module.weights()
        return tuple(weights[table][ids] for table, ids in zip(module.table_of.values(), ids_E, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients_ED: Tensor) -> tuple[None, ...]:
        ctx.module.update(ctx.saved_tensors, gradients_ED)
        return (None,) * (2 + len(gradients_ED))


_look_up: Callable[..., tuple[Tensor, ...]] = _LookUp.apply


def _add_rows(sums: Tensor, ids_E: Tensor, rows: Tensor) -> None:
    """sums[ids] += rows in an order that never varies: index_add_ has one on the CPU, index_put_ on CUDA."""
    if sums.device.type == "cuda":
        sums.index_put_((ids_E,), rows, accumulate=True)
    else:
        sums.index_add_(0, ids_E, rows)
