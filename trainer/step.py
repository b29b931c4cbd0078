"""One step: forward and backward through TorchRec's pipeline, then the update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..data.batch import Batch
from .pipeline import Trained, Verdict

if TYPE_CHECKING:
    from .loop import Run


@dataclass(frozen=True, slots=True)
class Consumed:
    """A batch that a step has taken, and what all ranks found of it."""

    trained: Trained
    verdict: Verdict

    @property
    def batch(self) -> Batch:
        """This rank's part of it."""
        return self.trained.batch


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step; batches whose numbers went wrong have changed nothing."""

    consumed: list[Consumed]
    lr: float
    gradient_norm: Tensor | float
    """NaN when no batch was good, and so nothing was updated."""

    @property
    def trained(self) -> list[Trained]:
        """The good batches."""
        return [each.trained for each in self.consumed if each.verdict.is_good]

    @property
    def signum(self) -> int:
        """The signal that asks the run to stop after this step, 0 without one."""
        return max(each.verdict.signum for each in self.consumed)


def train_step(run: Run, batches: Iterator[Batch]) -> Step | None:
    """One update from `trainer.accumulate` batches, fewer at the end of an epoch; None when there is none left."""
    accumulate = run.config.trainer.accumulate
    lr = run.trainable.optimizer.begin(run.state.step)
    consumed: list[Consumed] = []
    while len(consumed) < accumulate:
        try:
            trained = run.pipeline.progress(batches)
        except StopIteration:
            break
        consumed.append(Consumed(trained, run.pipeline.verdict))
        if trained.batch.state.consumed == 0:  # the epoch is over, and no step belongs to two
            break
    if not consumed:
        return None
    good = sum(each.verdict.is_good for each in consumed)
    norm: Tensor | float = math.nan
    if good:
        with run.timer.phase("optimizer"):
            norm = run.trainable.optimizer.update(gradient_scale=accumulate / good)
    return Step(consumed, lr, norm)
