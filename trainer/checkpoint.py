"""Sharded checkpoints: written by all ranks, complete when the manifest stands, loaded by any plan on any ranks.

OUT/checkpoints/step-00000100/
    rank-R.safetensors   what rank R held: shards of tables and of their optimizer state, its share of the dense
                         weights and of AdamW's state, its random numbers and open metrics
    index.json           of every tensor: type, shape, and which part of it lies where
    manifest.json        written last: step, world size, position in the data, files with sizes and checksums, metrics
                         of validations, versions, hash of the configuration, and a checksum of all that; a folder
                         without it is not a checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from ..data.errors import StorageError, UserError
from ..data.loader import LoaderState
from ..embeddings.shards import local_shards
from .canonical import growth, load_table, load_whole, table_pieces
from .manifest import DamagedError, Manifest, Used, use_newest
from .optimizer import Optimizer
from .parallel import World, gather_objects, on_main
from .pieces import Piece, Source
from .retention import set_aside
from .state import TrainState
from .storage import Location, Reading, UnreadableError

TABLES = "lookup."
"""What names of the tables begin with in a recommender's state dict."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """Everything of a run whose values training changes."""

    parallel: DistributedModelParallel
    optimizer: Optimizer
    state: TrainState

    def pieces(self, world: World) -> list[Piece]:
        """What this rank writes into a checkpoint: what it alone holds, and its share of what all hold."""
        dim = self.parallel.module.lookup.dim
        shards = local_shards(self.parallel)
        own = [piece for shard in shards if not shard.is_replicated for piece in table_pieces(shard, dim=dim)]
        common = [piece for shard in shards if shard.is_replicated for piece in table_pieces(shard, dim=dim)]
        common += [Piece.whole(f"weights/{name}", tensor) for name, tensor in dense_weights(self.parallel).items()]
        common += [Piece.whole(f"dense/{name}", tensor) for name, tensor in self.optimizer.state_tensors().items()]
        own += common[world.rank :: world.size]
        return own + [Piece.whole(f"rank/{world.rank}/{key}", value) for key, value in self.state.rank_state().items()]


def dense_weights(parallel: DistributedModelParallel) -> dict[str, Tensor]:
    """The weights that every rank holds whole, by name."""
    return {name: tensor for name, tensor in parallel.state_dict().items() if not name.startswith(TABLES)}


def load_weights(parallel: DistributedModelParallel, folder: Location, *, world: World) -> Manifest:
    """Fill the weights alone, for evaluation; see `load`."""
    return _together(folder, world, lambda source: _fill_weights(parallel, source, may_grow=False))


def load(trainable: Trainable, folder: Location, *, world: World, reading: Reading | None = None) -> Manifest:
    """Fill a freshly built run in place, whatever plan and number of ranks wrote the checkpoint.

    Args:
        reading: how patient to be with the storage; default: not at all.

    Raises:
        DamagedError: a file is not as it was written.
        StorageError: the storage does not give it.
        UserError: the checkpoint is incomplete, or of a model with other tensors.
    """
    state = trainable.state

    def fill(source: Source) -> None:
        _fill_weights(trainable.parallel, source, may_grow=False)
        for name, tensor in trainable.optimizer.state_tensors().items():
            load_whole(source, f"dense/{name}", tensor)
        ranks = _rank_states(source, source.manifest.world_size)
        state.load_rank_states(ranks, rank=world.rank, world_size=world.size, step=source.manifest.step)

    manifest = _together(folder, world, fill, reading)
    state.step, state.batches = manifest.step, manifest.batches
    state.validations = dict(manifest.validations)
    state.loader = LoaderState(manifest.loader.epoch, manifest.loader.consumed)
    # fbgemm counts updates for Adam's bias correction outside its state.
    trainable.optimizer.sparse.set_optimizer_step(manifest.batches)
    return manifest


def load_newest(
    trainable: Trainable,
    folders: Sequence[Location],
    *,
    world: World,
    say: Callable[[str], None],
    owns: bool,
    reading: Reading | None = None,
) -> Used[Manifest]:
    """Load the newest of some complete checkpoints that is undamaged and can be read; others are told.

    Args:
        owns: damaged ones are set aside, as their run goes on; else nothing is written.

    Raises:
        UserError: all are damaged, or the newest usable one does not fit.
        StorageError: the storage does not answer.
    """
    used = use_newest(folders, lambda folder: load(trainable, folder, world=world, reading=reading), say=say)
    # Only now: where all are damaged, the memory of this machine may be at fault, and none of them.
    for folder in used.damaged if owns else ():
        on_main(world, partial(set_aside, folder))
    return used


def load_start(trainable: Trainable, folder: Location, *, world: World, reading: Reading | None = None) -> list[str]:
    """Begin a new run from another run's weights, and its tables' optimizer state.

    Tables and dense weights may be new or have grown: old rows come to their places, and others stay fresh.

    Returns:
        What stays fresh.

    Raises:
        UserError: the checkpoint is damaged, a tensor has fewer rows now or other columns, or a table of hashed ids has
            another number of rows.
        StorageError: the storage does not give it.
    """
    told: list[str] = []

    def fill(source: Source) -> None:
        _fill_weights(trainable.parallel, source, may_grow=True)
        told.extend(growth(source, _shapes(trainable.parallel)))

    _together(folder, world, fill, reading)
    return sorted({name for names in gather_objects(told) for name in names})


def _shapes(parallel: DistributedModelParallel) -> dict[str, tuple[int, ...]]:
    """Of the weights that this rank holds, tables as wholes, by their names in a checkpoint."""
    dim = parallel.module.lookup.dim
    tables = {f"tables/{shard.table}/weight": (shard.num_rows, dim) for shard in local_shards(parallel)}
    return tables | {f"weights/{name}": tuple(tensor.shape) for name, tensor in dense_weights(parallel).items()}


def _together(
    folder: Location, world: World, fill: Callable[[Source], None], reading: Reading | None = None
) -> Manifest:
    """Fill on every rank; what one rank finds wrong, all ranks raise."""
    problem: UserError | None = None
    source = None
    try:
        source = Source(folder, reading)
        if missing := source.size_problems(part=world.rank, parts=world.size):
            raise DamagedError(f"checkpoint {folder} is damaged: {'; '.join(missing)}")
        fill(source)
    except (DamagedError, StorageError) as error:
        problem = error
    except UserError as error:
        what = "it was written for other tables or another model"
        problem = UserError(f"checkpoint {folder} does not fit this run: {error}; {what}") if source else error
    finally:
        if source is not None:
            source.close()
    if problems := sorted(filter(None, gather_objects(problem)), key=_weight):
        raise problems[0]
    assert source is not None
    return source.manifest


def _weight(problem: UserError) -> int:
    """Which of several ranks' problems to raise, the least first; of equals, that of the first rank.

    A damaged file weighs more than one that another rank cannot read, and both more than what does not fit; storage
    that was away for one rank says nothing about the checkpoint.
    """
    if isinstance(problem, (DamagedError, UnreadableError)):
        return int(isinstance(problem, UnreadableError))
    return 3 if isinstance(problem, StorageError) else 2


def _fill_weights(parallel: DistributedModelParallel, source: Source, *, may_grow: bool) -> None:
    for shard in local_shards(parallel):
        load_table(source, shard, dim=parallel.module.lookup.dim, may_grow=may_grow)
    for name, tensor in dense_weights(parallel).items():
        load_whole(source, f"weights/{name}", tensor, may_grow=may_grow)


def _rank_states(source: Source, world_size: int) -> list[dict[str, Tensor]]:
    """What every rank of the saving run left, in rank order; read by every rank, since it is small."""
    states: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    for name in source.entries:
        if found := re.fullmatch(r"rank/(\d+)/(\w+)", name):
            states[int(found[1])][found[2]] = source.tensor(name)
    return states
