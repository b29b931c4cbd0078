"""The lookup: a batch's ids -> embedding vectors, from tables that TorchRec shards over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .tables import init_rows


class Lookup(nn.Module):
    """Looks up every key of a batch; `collection` is what DistributedModelParallel replaces by its sharded twin."""

    def __init__(self, tables: Sequence[EmbeddingConfig], *, dim: int) -> None:
        super().__init__()
        self.collection = EmbeddingCollection(tables=list(tables), device=torch.device("meta"))
        self.keys = [key for table in tables for key in table.feature_names]
        self.dim = dim

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Vectors per key, [values of the key, dim], in the order of the ids."""
        looked_up = self.collection(ids)
        # Rows are stored padded to fbgemm's vector width; the padding receives no gradient.
        return {key: looked_up[key].values()[:, : self.dim] for key in self.keys}


def init_tables(module: nn.Module, *, std: float, seed: int) -> None:
    """Give every local shard of the sharded tables inside `module` its part of the tables' initial values."""
    for sharded in module.modules():
        if isinstance(sharded, ShardedEmbeddingCollection):
            for fqn, weight in sharded.state_dict().items():
                table = fqn.split(".")[-2]
                for shard in weight.local_shards():
                    row, column = shard.metadata.shard_offsets
                    init_rows(
                        shard.tensor,
                        table=table,
                        first_row=row,
                        first_column=column,
                        dim=weight.size(1),
                        std=std,
                        seed=seed,
                    )
