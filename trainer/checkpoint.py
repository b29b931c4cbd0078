"""Sharded checkpoints: written by all ranks, complete when the manifest stands, loaded on any number of ranks.

OUT/checkpoints/step-00000100/
    __R_N.distcp, .metadata   torch.distributed.checkpoint: weights, optimizer state of tables and dense weights,
                              random numbers and open metrics of every rank
    manifest.json             written last: step, world size, position in the data, files with sizes and checksums,
                              versions, hash of the configuration; a folder without it is not a checkpoint
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel

from ..data.errors import UserError
from ..data.loader import LoaderState
from .manifest import (
    MANIFEST,
    Manifest,
    Position,
    all_checkpoints,
    checkpoint_folder,
    complete_checkpoints,
    file_record,
    step_of,
)
from .optimizer import Optimizer
from .parallel import World, gather_objects
from .state import TrainState

VERSIONED = ("ultrarec", "torch", "torchrec")


@dataclass(frozen=True, slots=True)
class Trainable:
    """Everything of a run whose values training changes."""

    parallel: DistributedModelParallel
    optimizer: Optimizer
    state: TrainState

    def tensors(self) -> dict[str, Any]:
        """The live tensors by name; filling them in place restores a run.

        The tables' optimizer state is flattened to one entry per tensor: a rank that owns no shard of a table would
        otherwise contribute an empty dict, which torch.distributed.checkpoint takes for a value of its own.
        """
        sparse = self.optimizer.sparse.state_dict()["state"]
        return {
            **{f"weights/{name}": tensor for name, tensor in self.parallel.state_dict().items()},
            **{f"tables/{table}/{key}": value for table, states in sparse.items() for key, value in states.items()},
            **{f"dense/{name}": tensor for name, tensor in self.optimizer.state_tensors().items()},
        }


def save(trainable: Trainable, out: Path, *, world: World, config_hash: str, dataset: str, keep_last: int) -> None:
    """Write the checkpoint of the current step; when this returns, it is complete on every rank."""
    state = trainable.state
    folder = checkpoint_folder(out, state.step)
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # what a run that died while saving left behind
        folder.mkdir(parents=True)
    dist.barrier()
    own = {f"rank/{world.rank}/{key}": value for key, value in state.rank_state().items()}
    state_dict_saver.save(trainable.tensors() | own, checkpoint_id=folder)
    records = gather_objects([file_record(path) for path in sorted(folder.glob(f"__{world.rank}_*"))])
    if world.is_main:
        Manifest(
            step=state.step,
            batches=state.batches,
            world_size=world.size,
            loader=Position(state.loader.epoch, state.loader.consumed),
            files=[file_record(folder / ".metadata"), *(record for part in records for record in part)],
            versions={name: version(name) for name in VERSIONED},
            config_hash=config_hash,
            dataset=dataset,
        ).write(folder)
        retain(out, keep_last=keep_last)
    dist.barrier()


def retain(out: Path, *, keep_last: int) -> None:
    """Delete complete checkpoints but the newest `keep_last`, and incomplete ones before the newest."""
    complete = complete_checkpoints(out)
    for folder in all_checkpoints(out):
        if folder not in complete[-keep_last:] and (step_of(folder) or 0) < (step_of(complete[-1]) or 0):
            # The manifest goes first: a kill between the two leaves a folder that is no checkpoint, not half of one.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)


def load_weights(parallel: DistributedModelParallel, folder: Path, *, world: World) -> Manifest:
    """Fill the weights alone, for evaluation; see `load`."""
    manifest = _verified(folder, world)
    _fill({f"weights/{name}": tensor for name, tensor in parallel.state_dict().items()}, folder)
    return manifest


def load(trainable: Trainable, folder: Path, *, world: World) -> Manifest:
    """Fill a freshly built run in place, whatever number of ranks wrote the checkpoint.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or of a model with other tensors.
    """
    manifest = _verified(folder, world)
    _fill(trainable.tensors(), folder)
    state = trainable.state
    state.step, state.batches = manifest.step, manifest.batches
    state.loader = LoaderState(manifest.loader.epoch, manifest.loader.consumed)
    # fbgemm counts updates for Adam's bias correction outside its state.
    trainable.optimizer.sparse.set_optimizer_step(manifest.batches)
    state.load_rank_states(_rank_states(folder, manifest.world_size), rank=world.rank, world_size=world.size)
    return manifest


def _verified(folder: Path, world: World) -> Manifest:
    """The manifest, after all ranks together have checked every file it lists."""
    manifest = Manifest.read(folder)
    shares = gather_objects(manifest.problems(folder, part=world.rank, parts=world.size))
    problems = [problem for share in shares for problem in share]
    if problems:
        raise UserError(
            f"checkpoint {folder} is damaged: {'; '.join(problems)}; delete that folder to use an older one"
        )
    return manifest


def _fill(tensors: dict[str, Any], folder: Path) -> None:
    try:
        state_dict_loader.load(tensors, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"checkpoint {folder} does not fit this run: {reason}; it was written for other tables or another model"
        ) from error


def _rank_states(folder: Path, world_size: int) -> list[dict[str, Tensor]]:
    """What every rank of the saving run left, in rank order; read by every rank, since it is small."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    entries = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith("rank/") and isinstance(entry, TensorStorageMetadata)
    }
    state_dict_loader.load(entries, checkpoint_id=folder)
    return [
        {
            name.removeprefix(f"rank/{rank}/"): value
            for name, value in entries.items()
            if name.startswith(f"rank/{rank}/")
        }
        for rank in range(world_size)
    ]
