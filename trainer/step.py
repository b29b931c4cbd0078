"""One step: forward and backward through TorchRec's pipeline, the check, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ..data.batch import Batch
from .config import TrainerConfig
from .health import require_finite
from .optimizer import Deferred
from .parallel import World
from .unpipelined import Unpipelined

if TYPE_CHECKING:
    from .loop import Run


@dataclass(frozen=True, slots=True)
class Trained:
    """A batch after its backward pass, and this rank's summed loss on it."""

    batch: Batch
    loss_sum: Tensor


Pipeline: TypeAlias = TrainPipelineSparseDist[Batch, Trained] | Unpipelined[Trained]


@dataclass(frozen=True, slots=True)
class Step:
    """A finished update."""

    trained: list[Trained]
    lr: float
    gradient_norm: Tensor


def build_pipeline(parallel: DistributedModelParallel, config: TrainerConfig, world: World) -> Pipeline:
    """The pipeline that overlaps a step with the next batch's exchange of ids and the one after's way to the device."""
    forward = _scaled_loss(parallel, config, world)
    if parallel.module.lookup.collection is None:
        return Unpipelined(forward, world.device)
    return TrainPipelineSparseDist(parallel, Deferred(), world.device, custom_model_fwd=forward)


def _scaled_loss(
    parallel: DistributedModelParallel, config: TrainerConfig, world: World
) -> Callable[[Batch | None], tuple[Tensor, Trained]]:
    def forward(batch: Batch | None) -> tuple[Tensor, Trained]:
        assert batch is not None
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            loss_sum, _ = parallel(batch)
        require_finite(loss_sum, "the loss")  # before backward reaches the tables, whose update is part of it
        # Gradients are averaged over ranks: times their number, they are those of the mean over the global batch.
        scale = world.size / (max(batch.num_labels, 1) * config.accumulate)
        return loss_sum * scale, Trained(batch, loss_sum.detach())

    return forward


def train_step(run: Run, batches: Iterator[Batch]) -> Step | None:
    """One update from `trainer.accumulate` batches, fewer at the end of an epoch; None when there is none left."""
    accumulate = run.config.trainer.accumulate
    lr = run.trainable.optimizer.begin(run.state.step)
    trained: list[Trained] = []
    while len(trained) < accumulate:
        try:
            trained.append(run.pipeline.progress(batches))
        except StopIteration:
            break
        if trained[-1].batch.state.consumed == 0:  # the epoch is over, and no step belongs to two
            break
    if not trained:
        return None
    norm = run.trainable.optimizer.update(gradient_scale=accumulate / len(trained))
    return Step(trained, lr, norm)
