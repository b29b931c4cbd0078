"""What a recipe would need of GPUs that are not there: memory, operations and traffic of a step, by formulas.

A model, not a measurement. Rates are those of data sheets; times are what one step takes at least if each kind of work
ran at its full rate and hid behind the longest one. Bytes are of the fullest or busiest rank.
"""

# N = ranks, P = values of the dense weights

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..trainer.config import Config
from .workload import Catalogue, Workload, workload_of

if TYPE_CHECKING:
    from torch import nn
    from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

    from ..trainer.build import Recommender
    from ..trainer.devices import Device

NETWORK_BANDWIDTH = 50e9
"""Bytes per second and GPU between nodes, in one direction: one 400 Gbit/s adapter each."""
USABLE = 0.9
"""Share of a GPU's memory that a run may count on; the rest is for the context, collectives and fragmentation."""
REPLICATED_PASSES = {"rowwise_adagrad": 11, "adamw": 25}
"""How often the update of a table that every rank holds reads or writes as many values as the table has."""
BATCHES_ON_DEVICE = 3
"""Of the pipeline: one trained, one whose ids travel, one on its way to the device."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a table on a rank."""

    rank: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """One embedding table, and what of it lies where."""

    name: str
    rows: int
    columns: int
    """As stored, padded."""
    sharding: str
    """`data_parallel` is whole on every rank, and has no shards."""
    kernel: str
    shards: list[Shard]
    ids: float
    """Looked up in it by one rank in a batch, on average."""

    @property
    def is_in_host_memory(self) -> bool:
        """Whether the GPU reads it over the bus."""
        return "uvm" in self.kernel

    def share(self, rank: int) -> float:
        """Of the values looked up by all ranks, the part that this one holds."""
        return sum(s.rows * s.columns for s in self.shards if s.rank == rank) / (self.rows * self.columns)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All figures of a plan; bytes and operations are per rank, of one step."""

    ranks: int
    samples: float
    """Of a step, over all ranks."""
    tokens: float
    """Events of a step, over all ranks."""
    dense_parameters: int
    tables: list[Table]
    memory: dict[str, float]
    """Bytes by what they hold."""
    longest: float
    """Bytes in all if every sample were as long as the longest of the data."""
    memory_limit: float
    flops: float
    is_at_most: bool
    """Whether operations and activations are those of channels that select every event: lengths are known, not actions.
    """
    communication: dict[str, float]
    """Bytes that the busiest rank sends, by what they are."""
    seconds: dict[str, float]
    """At least, for compute, memory and network."""

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def problems(self) -> list[str]:
        """Why it does not fit; empty if it does."""
        found = []
        if (total := sum(self.memory.values())) > self.memory_limit:
            found.append(f"{gib(total)} GiB needed on the fullest rank, {gib(self.memory_limit)} GiB usable")
        found += [
            f"the planner puts table {table.name!r} in host memory: it is too large for the GPUs"
            for table in self.tables
            if table.is_in_host_memory
        ]
        return found


def gib(num_bytes: float) -> str:
    """Bytes as a number of GiB."""
    return f"{num_bytes / 2**30:,.2f}"


def estimate(config: Config, catalogue: Catalogue, *, nodes: int, procs: int, device: Device) -> Estimate:
    """All figures of a run on `nodes` of `procs` GPUs.

    Raises:
        DoesNotFit: the planner finds no place for the tables.
        UserError: the recipe does not fit the data, or names tables that do not exist.
    """
    import torch

    from ..embeddings.plan import plan_for
    from ..trainer.build import recommender_of

    ranks = nodes * procs
    work = workload_of(config, catalogue)
    with torch.device("meta"):
        popularity = torch.zeros(catalogue.num_items + 1) if config.objective.num_in_batch else None
        recommender = recommender_of(
            config, num_items=catalogue.num_items, actions=catalogue.actions, popularity=popularity
        )
    plan = plan_for(recommender, config.embeddings, nodes=nodes, procs=procs, memory_bytes=int(device.memory_bytes))
    tables = _tables(recommender, plan, _ids(config, catalogue, work, ranks))
    parameters = _num_values(recommender.model)
    memory = _memory(config, work, tables, parameters, ranks=ranks)
    flops = _flops(config, catalogue, work) * work.samples / ranks * config.trainer.accumulate
    traffic = _communication(config, tables, parameters, ranks=ranks)
    return Estimate(
        ranks=ranks,
        samples=work.samples * config.trainer.accumulate,
        tokens=work.samples * config.trainer.accumulate * work.mean(work.history + work.targets),
        dense_parameters=parameters,
        tables=tables,
        memory=memory,
        longest=_longest(config, work, memory, ranks=ranks),
        memory_limit=USABLE * device.memory_bytes,
        flops=flops,
        is_at_most=bool(config.model.channels),
        communication=traffic,
        seconds={
            "compute": flops / device.flops(config.trainer.precision),
            "memory": _bytes_moved(config, tables, parameters, memory, ranks=ranks) / device.memory_bandwidth,
            "network": _network_seconds(traffic, nodes=nodes, procs=procs, device=device),
        },
    )


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ids(config: Config, catalogue: Catalogue, work: Workload, ranks: int) -> dict[str, float]:
    """Ids that one rank looks up in a batch, by table.

    Items: one per event; with candidates, also these, and with sampled ones the item of each label. Hashed features:
    one per event, or of users one per sample.
    """
    from ..embeddings.tables import ITEM_TABLE
    from ..trainer.costs import candidates_of

    samples = work.samples / ranks
    events = samples * work.mean(work.history + work.targets)
    candidates = candidates_of(config.objective, catalogue.num_items)
    items = events
    if candidates is not None:
        labels = 0 if candidates.kind == "catalogue" else events
        items += labels + candidates.mean_ids(samples=samples, predictions=events)
    hashed = {
        name: samples if feature.role == "user" else events
        for name, feature in config.data.features.items()
        if feature.kind == "hash"
    }
    return {ITEM_TABLE: items, **hashed}


def _tables(recommender: Recommender, plan: ShardingPlan, ids: dict[str, float]) -> list[Table]:
    lookup = recommender.lookup
    tables = []
    for module_plan in plan.plan.values():
        for name, placed in cast("EmbeddingModuleShardingPlan", module_plan).items():
            shards = [
                Shard(rank=shard.placement.rank(), rows=shard.shard_sizes[0], columns=shard.shard_sizes[1])
                for shard in cast(Any, placed.sharding_spec).shards
            ]
            assert lookup.collection is not None
            rows, columns = lookup.collection.embeddings[name].weight.shape
            tables.append(
                Table(
                    name=name,
                    rows=rows,
                    columns=columns,
                    sharding=placed.sharding_type,
                    kernel=placed.compute_kernel,
                    shards=shards,
                    ids=ids[name],
                )
            )
    whole = lookup.replicated.weights() if lookup.replicated is not None else {}
    return tables + [
        Table(
            name=name,
            rows=len(weight),
            columns=weight.size(1),
            sharding="data_parallel",
            kernel="dense",
            shards=[],
            ids=ids[name],
        )
        for name, weight in whole.items()
    ]


def _memory(config: Config, work: Workload, tables: list[Table], parameters: int, *, ranks: int) -> dict[str, float]:
    """Bytes on the fullest rank, by what they hold.

    Tables: 4 bytes per value of the rank's shards. Their optimizer: 4 per row of a shard (row-wise Adagrad) or 8 per
    value (Adam). Replicated tables: 4 (columns + 1) per row, 8 columns more with AdamW, and 8 (columns + 1) while
    their gradients are summed.
    Dense: 4 P each of weights and gradients, 8 P of AdamW; under bf16 2 P of rounded weights. Vectors: 8 per value
    looked up, with their gradients. Batches: `BATCHES_ON_DEVICE` of 8 bytes per id and, per event, time (twice),
    actions and feature. Activations: as `_activations`.
    Logits of the loss are left out: it computes them in chunks.
    """
    on_rank = [_table_bytes(config, tables, rank) for rank in range(ranks)]
    fullest = max(on_rank, key=sum)
    events = work.samples / ranks * work.mean(work.history + work.targets)
    memory = {
        "tables": fullest[0],
        "tables' optimizer": fullest[1],
        "replicated tables": _replicated_bytes(config, tables),
        "dense weights": (6.0 if config.trainer.precision == "bf16" else 4.0) * parameters,
        "dense gradients": 4.0 * parameters,
        "dense optimizer": 8.0 * parameters,
        "looked-up vectors": sum(8.0 * table.ids * table.columns for table in tables),
        "batches": BATCHES_ON_DEVICE
        * 8.0
        * (sum(table.ids for table in tables) + events * (3 + len(config.data.features))),
    }
    return {**memory, **_activations(config, work, samples=work.samples / ranks)}


def _replicated_bytes(config: Config, tables: list[Table]) -> float:
    """Bytes of the tables that every rank holds, of their optimizer's state, and of their gradients while summed."""
    moments = 8.0 if config.embeddings.optimizer.kind == "adamw" else 0.0
    return sum(t.rows * (12.0 * (t.columns + 1) + moments * t.columns) for t in tables if not t.shards)


def _table_bytes(config: Config, tables: list[Table], rank: int) -> tuple[float, float]:
    """Bytes of a rank's shards in device memory, and of their optimizer's state."""
    shards = [shard for t in tables if not t.is_in_host_memory for shard in t.shards if shard.rank == rank]
    values, rows = sum(s.rows * s.columns for s in shards), sum(s.rows for s in shards)
    return 4.0 * values, 8.0 * values if config.embeddings.optimizer.kind == "adam" else 4.0 * rows


def _activations(config: Config, work: Workload, *, samples: float) -> dict[str, float]:
    """What the forward pass keeps of so many samples, in bytes: the backbone and the MLPs that make tokens.

    Backbones that pad a rank's samples pad them to the longest that so many have on average. The MLPs of an event,
    content and action, keep their inputs, hidden values before and after the activation, and outputs, in float32. Heads
    and norms of the ends are left out.
    """
    from ..model.activations import activation_bytes
    from ..model.flops import Sample

    roles = [feature.role for feature in config.data.features.values()]
    contextual = roles.count("user")
    history, targets = work.longest_of(samples)
    layers = activation_bytes(
        config.model,
        Sample(contextual=contextual, history=work.history, targets=work.targets),
        longest=Sample(contextual=contextual, history=history, targets=targets),
        bytes_per_value=2 if config.trainer.precision == "bf16" else 4,
    )
    activations = {"activations": samples * work.mean(layers)}
    if config.model.token_hidden is not None:
        inputs = config.embeddings.dim * (1 + len(roles) - roles.count("user"))
        values = inputs + 2 * (2 * config.model.token_hidden + config.model.width)
        activations["token encoders"] = 4.0 * values * samples * work.mean(work.history + work.targets)
    return activations


def _longest(config: Config, work: Workload, memory: dict[str, float], *, ranks: int) -> float:
    """Bytes in all if every sample were as long as the longest of the data."""
    tokens = work.history + work.targets
    longest = tokens == tokens.max()
    share = longest / longest.sum()
    # A step sized by tokens or cost has fewer of them.
    samples = work.samples if config.data.batch_rows is not None else work.samples * work.mean(tokens) / tokens.max()
    extreme = Workload(history=work.history, targets=work.targets, share=share, samples=samples)
    return sum((memory | _activations(config, extreme, samples=samples / ranks)).values())


def _flops(config: Config, catalogue: Catalogue, work: Workload) -> float:
    """Of the mean sample, both passes: the mean of the formula over lengths, not the formula of the mean length."""
    from ..trainer.costs import samples_flops

    flops = samples_flops(
        config,
        history=work.history,
        targets=work.targets,
        num_items=catalogue.num_items,
        num_actions=len(catalogue.actions),
    )
    return work.mean(flops.train)


def _communication(config: Config, tables: list[Table], parameters: int, *, ranks: int) -> dict[str, float]:
    """Bytes that the busiest rank sends in a step, by what they are.

    Of what a rank asks for or holds, (N - 1) / N concerns other ranks. Ids: 8 bytes each, from who asks. Vectors: 4 per
    value, from who holds the row, so that the owner of a whole table sends for all; their gradients come back the same
    way, and it receives as much. Dense gradients: 4 P in a ring, which sends each value 2 (N - 1) / N times; likewise
    replicated tables, whose sums have a column more.
    """
    sharded = [table for table in tables if table.shards]
    others = (ranks - 1) / ranks
    asked = 8.0 * sum(table.ids for table in sharded)
    vectors = others * 4.0 * _busiest(sharded, ranks)
    replicated = sum(t.rows * (t.columns + 1) for t in tables if not t.shards)
    per_batch = {
        "ids": others * asked,
        "vectors": vectors,
        "vectors' gradients": vectors,
        "dense gradients": 2 * others * 4.0 * parameters,
        "replicated tables": 2 * others * 4.0 * replicated,
    }
    return {name: num_bytes * config.trainer.accumulate for name, num_bytes in per_batch.items()}


def _busiest(tables: list[Table], ranks: int) -> float:
    """Values that the busiest rank looks up for all ranks in a batch."""
    return max(sum(t.share(rank) * ranks * t.ids * t.columns for t in tables) for rank in range(ranks))


def _bytes_moved(
    config: Config, tables: list[Table], parameters: int, memory: dict[str, float], *, ranks: int
) -> float:
    """Bytes that the busiest rank's memory reads and writes in a step.

    Tables: each row looked up is read, and read and written by its update, 12 per value. Of a replicated table all rows
    are, in `REPLICATED_PASSES` over its sums, 4 per value. The dense AdamW reads four and writes three arrays, 28 P.
    Activations, encoders and vectors are written once and read once.
    """
    kept = sum(memory.get(name, 0.0) for name in ("activations", "token encoders", "looked-up vectors"))
    replicated = sum(t.rows * (t.columns + 1) for t in tables if not t.shards)
    passes = REPLICATED_PASSES.get(config.embeddings.optimizer.kind, 0)
    sharded = _busiest([table for table in tables if table.shards], ranks)
    per_batch = 12.0 * sharded + 4.0 * passes * replicated + 2 * kept
    return per_batch * config.trainer.accumulate + 28.0 * parameters


def _network_seconds(traffic: dict[str, float], *, nodes: int, procs: int, device: Device) -> float:
    """Exchanges go to all other ranks alike, over links and network at the same time; a ring is as slow as its slowest
    part.
    """
    ranks = nodes * procs
    exchanged = traffic["ids"] + traffic["vectors"] + traffic["vectors' gradients"]
    summed = traffic["dense gradients"] + traffic["replicated tables"]
    between = (ranks - procs) / max(ranks - 1, 1)
    exchange = max(exchanged * between / NETWORK_BANDWIDTH, exchanged * (1 - between) / device.link_bandwidth)
    return exchange + summed / (NETWORK_BANDWIDTH if nodes > 1 else device.link_bandwidth)
