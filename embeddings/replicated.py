"""Small tables that every rank holds whole: no exchange of ids and vectors, but one sum of gradients over all ranks.

TorchRec's own data_parallel lookup of sequences fails on the CPU, where fbgemm's dense kernel pools although pooling is
off; this one is plain torch, and learns as the sharded tables do: inside the backward pass, once per backward, with
gradients averaged over ranks. Its updates are the same bits on every rank, since the sum is.
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
from .updates import UPDATES, State


class ReplicatedTables(nn.Module):
    """Tables whose every row lies on every rank.

    Args:
        tables: their names, sizes and keys.
        optimizer: one of `UPDATES` and its settings.
    """

    def __init__(self, tables: Sequence[EmbeddingConfig], optimizer: EmbeddingOptimizerConfig) -> None:
        super().__init__()
        self.config = optimizer
        self.table_of = {key: table.name for table in tables for key in table.feature_names}
        self.param_groups = [{"lr": optimizer.lr}]
        """The learning rate, where schedules of torch's optimizers look for it."""
        new_state, self._update = UPDATES[optimizer.kind]
        # Buffers, not parameters: neither the dense optimizer nor the averaging of dense gradients may touch them.
        self._state_keys: dict[str, list[str]] = {}
        for table in tables:
            weight_RD = torch.zeros(table.num_embeddings, table.embedding_dim)
            state = new_state(weight_RD)
            self._state_keys[table.name] = list(state)
            for key, tensor in {"weight": weight_RD, **state}.items():
                self.register_buffer(f"{table.name}/{key}", tensor)

    def weights(self) -> dict[str, Tensor]:
        """[R, D] of every table, by name."""
        return {name: self.get_buffer(f"{name}/weight") for name in self._state_keys}

    def state(self, table: str) -> State:
        """The optimizer's live tensors of a table by name, [R] or [R, D]."""
        return {key: self.get_buffer(f"{table}/{key}") for key in self._state_keys[table]}

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Vectors per key, [E of the key, D], in the order of the ids."""
        ids_E = [ids[key].values() for key in self.table_of]
        # Autograd calls back for what depends on a tensor with a gradient; the weights, which have none, are not it.
        anchor = torch.empty(0, requires_grad=True)
        return dict(zip(self.table_of, _look_up(anchor, self, *ids_E), strict=True))

    @torch.no_grad()
    def update(self, ids_E: Sequence[Tensor], gradients_ED: Sequence[Tensor]) -> None:
        """One step of the optimizer, with the gradients of all ranks."""
        weights = self.weights()
        sizes = [size for weight in weights.values() for size in (weight.numel(), len(weight))]
        flat = torch.zeros(sum(sizes), device=gradients_ED[0].device)
        parts = iter(torch.split(flat, sizes))
        sums = {name: (next(parts).view_as(weight), next(parts)) for name, weight in weights.items()}
        for table, ids, gradients in zip(self.table_of.values(), ids_E, gradients_ED, strict=True):
            gradient_RD, times_R = sums[table]
            _add_rows(gradient_RD, ids, gradients.float())
            # One whose gradients cancel was looked up all the same, and may have to decay.
            times_R.index_fill_(0, ids, 1.0)
        dist.all_reduce(flat)
        for table, (gradient_RD, times_R) in sums.items():
            self._update(
                weights[table],
                self.state(table),
                gradient_RD.div_(dist.get_world_size()),
                is_looked_up_R=times_R > 0,
                lr=self.param_groups[0]["lr"],
                config=self.config,
            )


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
