"""What of the tables one rank holds: weights and optimizer state, placed in the whole table, whatever the plan."""

# R = rows of a shard, D = its stored columns

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from .replicated import ReplicatedTables


@dataclass(frozen=True, slots=True)
class TableShard:
    """A part of a table, with live tensors: filling them in place changes the table."""

    table: str
    num_rows: int
    """Rows of the whole table."""
    num_columns: int
    """Stored columns of the whole table, padding included."""
    first_row: int
    first_column: int
    weight_RD: Tensor
    state: dict[str, Tensor]
    """The optimizer's, by name: [R], one value per row of this shard, or [R, D], one per weight."""
    is_replicated: bool
    """Every rank holds the same."""


def local_shards(parallel: DistributedModelParallel) -> list[TableShard]:
    """Every shard of every table that this rank holds."""
    states = parallel.fused_optimizer.state_dict()["state"]
    weights = parallel.state_dict()
    sharded = [
        shard
        for name, weight in weights.items()
        if hasattr(weight, "local_shards")
        for shard in _shards_of(name.split(".")[-2], weight, states.get(name, {}))
    ]
    return [*sharded, *(shard for module in parallel.modules() for shard in _replicas_of(module))]


def _shards_of(table: str, weight: Any, states: dict[str, Any]) -> list[TableShard]:
    parts = _in_order(weight)
    by_key = {key.removeprefix(f"{table}."): _in_order(state) for key, state in states.items()}
    return [
        TableShard(
            table=table,
            num_rows=weight.size(0),
            num_columns=weight.size(1),
            first_row=part.metadata.shard_offsets[0],
            first_column=part.metadata.shard_offsets[1],
            weight_RD=part.tensor.detach(),
            # A column-wise table's row-wise state is kept piece behind piece along the rows: in the order of columns.
            state={key: shards[k].tensor.detach() for key, shards in by_key.items()},
            is_replicated=False,
        )
        for k, part in enumerate(parts)
    ]


def _in_order(tensor: Any) -> list[Any]:
    return sorted(tensor.local_shards(), key=lambda shard: shard.metadata.shard_offsets)


def _replicas_of(module: nn.Module) -> list[TableShard]:
    if not isinstance(module, ReplicatedTables):
        return []
    return [
        TableShard(
            table=name,
            num_rows=weight.size(0),
            num_columns=weight.size(1),
            first_row=0,
            first_column=0,
            weight_RD=weight,
            state=module.state(name),
            is_replicated=True,
        )
        for name, weight in module.weights().items()
    ]
