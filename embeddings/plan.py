"""The sharding plan: which rank holds which part of which table, and a page that says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingPlan, ShardingType

from ..data.errors import UserError
from .config import EmbeddingOptimizerConfig, EmbeddingsConfig

OPTIMIZERS = {"rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "adam": EmbOptimType.ADAM}
"""What fbgemm has for sharded tables; replicated ones have `updates.UPDATES`."""
# The planner replicates no table unasked: TorchRec's own way fails on the CPU (see replicated.py), and ours pays with a
# sum over all rows in every step. Nor does it cut columns unasked: row-wise Adagrad keeps one sum per piece of a row,
# so that a table would learn otherwise on a cluster whose planner cuts it.
PLANNED = [ShardingType.ROW_WISE, ShardingType.TABLE_WISE]
RESERVED_SHARE = 0.15
"""Part of a device's memory that the planner leaves to activations and the dense model."""


class DoesNotFit(UserError):
    """The planner finds no place for the tables on these ranks."""


def fused_params(config: EmbeddingOptimizerConfig) -> dict[str, Any]:
    """fbgemm's arguments for the optimizer that runs inside the tables' backward pass."""
    params: dict[str, Any] = {
        "optimizer": OPTIMIZERS[config.kind],
        "learning_rate": config.lr,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adam":
        params["beta1"], params["beta2"] = config.betas
    else:
        # fbgemm's Adagrad ignores weight_decay in its default mode; its Adam decays like this in any.
        params["weight_decay_mode"] = WeightDecayMode.DECOUPLE
    return params


def make_plan(
    module: nn.Module, config: EmbeddingsConfig, *, device: torch.device
) -> tuple[ShardingPlan, EmbeddingCollectionSharder]:
    """Plan the tables inside `module` over all ranks of the default process group; every rank gets the same plan.

    Raises:
        UserError: `embeddings.sharding` names a table that does not exist or cannot be placed so, or the tables do not
            fit.
    """
    planner, sharder = _planner(module, config, _topology(config, device))
    if planner is None:
        return ShardingPlan({}), sharder
    with _naming_the_remedy(dist.get_world_size()):
        return planner.collective_plan(module, [sharder], dist.group.WORLD), sharder


def plan_for(module: nn.Module, config: EmbeddingsConfig, *, nodes: int, procs: int, memory_bytes: int) -> ShardingPlan:
    """The plan that `make_plan` would make on `nodes` of `procs` GPUs with so much memory each; no group is needed.

    Raises:
        DoesNotFit: the tables do not fit.
        UserError: as `make_plan`.
    """
    if config.hbm_gib is not None:
        memory_bytes = int(config.hbm_gib * 2**30)
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=nodes * procs, local_world_size=procs, hbm_cap_bytes=memory_bytes),
        kernel_config=KernelConfig(compute_device="cuda"),
    )
    planner, sharder = _planner(module, config, topology)
    if planner is None:
        return ShardingPlan({})
    with _naming_the_remedy(nodes * procs):
        return planner.plan(module, [sharder])


def _planner(
    module: nn.Module, config: EmbeddingsConfig, topology: Topology
) -> tuple[EmbeddingShardingPlanner | None, EmbeddingCollectionSharder]:
    """What plans the tables inside `module`, None if there are none; and what shards them."""
    names = [table.name for m in module.modules() for table in getattr(m, "embedding_configs", list)()]
    replicated = [table for m in module.modules() for table in getattr(m, "table_of", {}).values()]
    _check_names(config, [*names, *replicated])
    _check_optimizer(config.optimizer, sharded=names)
    if not names:
        return None, EmbeddingCollectionSharder()
    sharder = EmbeddingCollectionSharder(fused_params=fused_params(config.optimizer))
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints={name: _constraints(config.sharding.get(name, "auto")) for name in names},
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_SHARE),
    )
    return planner, sharder


@contextmanager
def _naming_the_remedy(world_size: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the planner's PlannerError carries a page of figures; keep its first line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        raise DoesNotFit(
            f"no sharding plan fits {world_size} rank(s): {reason}; "
            "add ranks, lower embeddings.dim, or change embeddings.sharding / embeddings.hbm_gib"
        ) from error


def _check_names(config: EmbeddingsConfig, tables: list[str]) -> None:
    if unknown := sorted(set(config.sharding) - set(tables)):
        raise UserError(
            f"embeddings.sharding names {unknown}; the tables of this run are {list(dict.fromkeys(tables))}"
        )


def _check_optimizer(config: EmbeddingOptimizerConfig, *, sharded: list[str]) -> None:
    if sharded and config.kind not in OPTIMIZERS:
        raise UserError(
            f"embeddings.optimizer.kind={config.kind!r} updates every row of a table, and {sharded} are spread over "
            f"the ranks; set embeddings.sharding.{sharded[0]}='data_parallel' for each, or choose one of "
            f"{sorted(OPTIMIZERS)}"
        )


def _constraints(sharding: str) -> ParameterConstraints:
    types = PLANNED if sharding == "auto" else [ShardingType(sharding)]
    return ParameterConstraints(sharding_types=[kind.value for kind in types])


def _topology(config: EmbeddingsConfig, device: torch.device) -> Topology:
    """What the planner may count on: ranks, ranks of a node, and the device memory of each."""
    hbm_bytes = None
    if config.hbm_gib is not None:
        hbm_bytes = int(config.hbm_gib * 2**30)
    elif device.type == "cuda":
        hbm_bytes = torch.cuda.get_device_properties(device).total_memory
    world_size = dist.get_world_size()
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            hbm_cap_bytes=hbm_bytes,
        ),
        kernel_config=KernelConfig(compute_device=device.type),
    )


def describe_plan(plan: ShardingPlan, config: EmbeddingsConfig) -> str:
    """The plan as a table of text: for each table its placement, why, and the rows and columns of each rank."""
    replicated = sorted(name for name, sharding in config.sharding.items() if sharding == "data_parallel")
    lines = [
        f"{'table':<16} {'sharding':<12} {'kernel':<8} {'placed by':<14} shards: rank [rows x columns at row, column]"
    ]
    for module_plan in plan.plan.values():
        for table, placement in sorted(module_plan.items()):
            reason = "recipe" if config.sharding.get(table, "auto") != "auto" else "planner"
            shards = ", ".join(_describe_shard(shard) for shard in placement.sharding_spec.shards)
            lines.append(
                f"{table:<16} {placement.sharding_type:<12} {placement.compute_kernel:<8} {reason:<14} {shards}"
            )
    lines += [
        f"{table:<16} {'data_parallel':<13} {'dense':<7} {'recipe':<14} whole on every rank" for table in replicated
    ]
    return "\n".join(lines) + "\n"


def _describe_shard(shard: Any) -> str:
    rows, columns = shard.shard_sizes
    row, column = shard.shard_offsets
    return f"{shard.placement.rank()} [{rows} x {columns} at {row}, {column}]"
