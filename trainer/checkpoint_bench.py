"""What saving and loading cost: stall of a step, rates of writing and reading, beside a plain copy of the files."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ..embeddings.config import EmbeddingsConfig
from ..embeddings.lookup import Lookup, init_tables
from ..embeddings.plan import make_plan
from ..embeddings.shards import local_shards
from .checkpoint import Trainable, load
from .config import CheckpointConfig, OptimizerConfig
from .manifest import Manifest, checkpoint_folder
from .optimizer import Optimizer
from .parallel import World, gather_objects
from .saver import Saver
from .state import TrainState

DIM = 64
BATCH = 4096
"""Ids that a rank looks up in a step."""
ROUNDS = 3
QUIET_STEPS = 25
"""Steps of a round before its save, and again after it."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds on the slowest rank."""

    stall: float
    """What `save` keeps a step waiting."""
    save: float
    """From the begin of a save to its completed manifest, while nothing else runs."""
    load: float
    copy: float
    """A plain copy of every rank's file, brought to disk."""
    step: float
    """A step while nothing is written, before and after those that follow."""
    step_while_saving: float


class _Tables(nn.Module):
    def __init__(self, config: EmbeddingsConfig, rows: int) -> None:
        super().__init__()
        table = EmbeddingConfig(name="item", embedding_dim=DIM, num_embeddings=rows, feature_names=["item"])
        self.lookup = Lookup([table], config)
        self.model = nn.Linear(DIM, DIM)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        vectors: Tensor = self.model(self.lookup(ids)["item"])
        return vectors.square().sum()


def measure(root: Path, *, gib: float, device: torch.device) -> dict[str, Any]:
    """Bytes of a checkpoint and the rounds, on every rank of the process group.

    Args:
        root: an empty folder; what is written there stays.
        gib: size of the table over all ranks, without its optimizer state.
    """
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    trainable = _trainable(rows=int(gib * 2**30) // (4 * DIM), device=device)
    config = CheckpointConfig(keep_last=1)
    saver = Saver(config, root, world, config_hash="", dataset="", say=print)
    _save(trainable, saver, world)  # the first one allocates its copy
    saver.wait()
    rounds = []
    for number in range(ROUNDS):
        if world.is_main:
            print(f"round {number + 1} of {ROUNDS}, in {root}", file=sys.stderr)
        rounds.append(_round(trainable, saver, world))
    size = Manifest.read(checkpoint_folder(root, trainable.state.step)).bytes
    saver.close()
    return {"bytes": size, "rounds": rounds}


def _round(trainable: Trainable, saver: Saver, world: World) -> Round:
    stall = _seconds(lambda: _save(trainable, saver, world))
    saver.wait()
    save = _seconds(lambda: _save(trainable, saver, world, wait=True))
    folder = checkpoint_folder(saver.home, trainable.state.step)
    assert isinstance(folder, Path)
    own = folder / f"rank-{world.rank:05}.safetensors"
    own.read_bytes()  # a save leaves nothing in the page cache; copy and load shall both find the file there
    copy = _seconds(lambda: _copy(own))
    loading = _seconds(lambda: load(trainable, folder, world=world))
    quiet = [_step(trainable) for _ in range(QUIET_STEPS)]
    _save(trainable, saver, world)
    slowed = [_step(trainable)]
    while any(gather_objects(saver.is_busy)):
        slowed.append(_step(trainable))
    quiet += [_step(trainable) for _ in range(QUIET_STEPS)]
    return Round(stall, save, loading, copy, step=mean(quiet), step_while_saving=mean(slowed))


def _trainable(*, rows: int, device: torch.device) -> Trainable:
    config = EmbeddingsConfig(dim=DIM, sharding={"item": "row_wise"})
    tables = _Tables(config, rows)
    plan, sharder = make_plan(tables, config, device=device)
    parallel = DistributedModelParallel(tables, device=device, plan=plan, sharders=[sharder])
    init_tables(parallel, std=0.02, seed=0)
    dense = {name: p for name, p in parallel.named_parameters() if name.startswith("model.")}
    optimizer = Optimizer(OptimizerConfig(), dense=dense, sparse=parallel.fused_optimizer, total_steps=1)
    return Trainable(parallel, optimizer, TrainState())


def _save(trainable: Trainable, saver: Saver, world: World, *, wait: bool = False) -> None:
    trainable.state.step += 1
    saver.save(trainable.pieces(world), trainable.state, sync=[])
    if wait and (error := saver.wait()):
        raise OSError(error)


def _step(trainable: Trainable) -> float:
    """Train one step; its seconds."""
    rows = local_shards(trainable.parallel)[0].num_rows

    def step() -> None:
        ids = torch.randint(0, rows, (BATCH,))
        trainable.optimizer.begin(0)
        trainable.parallel(KeyedJaggedTensor(keys=["item"], values=ids, lengths=torch.tensor([BATCH]))).backward()
        trainable.optimizer.update()

    return _seconds(step)


def _copy(path: Path) -> None:
    copy = path.with_name(f"{path.name}.copy")
    shutil.copyfile(path, copy)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    copy.unlink()


def _seconds(work: Callable[[], Any]) -> float:
    """How long all ranks need for some work that they begin together."""
    dist.barrier()
    started = time.monotonic()
    work()
    return _slowest(time.monotonic() - started)


def _slowest(seconds: float) -> float:
    return max(gather_objects(seconds))
