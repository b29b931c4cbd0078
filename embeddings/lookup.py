"""The lookup: a batch's ids -> embedding vectors, from tables that TorchRec shards over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .config import EmbeddingsConfig
from .replicated import ReplicatedTables
from .shards import local_shards
from .tables import init_rows


class Lookup(nn.Module):
    """Looks up every key of a batch; `collection` is what DistributedModelParallel replaces by its sharded twin.

    Args:
        tables: all tables.
        config: which of them every rank holds whole, and how those learn.
    """

    def __init__(self, tables: Sequence[EmbeddingConfig], config: EmbeddingsConfig) -> None:
        super().__init__()
        whole = [table for table in tables if config.sharding.get(table.name) == "data_parallel"]
        cut = [table for table in tables if table not in whole]
        self.collection = EmbeddingCollection(tables=cut, device=torch.device("meta")) if cut else None
        self.replicated = ReplicatedTables(whole, config.optimizer) if whole else None
        self.keys = [key for table in tables for key in table.feature_names]
        self.sharded_keys = [key for table in cut for key in table.feature_names]
        self.dim = config.dim

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Vectors per key, [values of the key, dim], in the order of the ids."""
        vectors: dict[str, Tensor] = {}
        if self.collection is not None:
            looked_up = self.collection(ids)
            vectors |= {key: looked_up[key].values() for key in self.sharded_keys}
        if self.replicated is not None:
            replicated = self.replicated(ids)
            vectors |= {key: replicated[key] for key in self.replicated.table_of}
        # Rows are stored padded to fbgemm's vector width; the padding receives no gradient.
        return {key: vectors[key][:, : self.dim] for key in self.keys}


def init_tables(parallel: DistributedModelParallel, *, std: float, seed: int) -> None:
    """Give every shard that this rank holds its part of the tables' initial values."""
    for shard in local_shards(parallel):
        init_rows(
            shard.weight_RD,
            table=shard.table,
            first_row=shard.first_row,
            first_column=shard.first_column,
            dim=shard.num_columns,
            std=std,
            seed=seed,
        )
