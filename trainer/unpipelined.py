"""Steps of a run whose tables all lie on every rank: without an exchange of ids there is none to overlap."""

from __future__ import annotations

from collections.abc import Iterator

from ..data.batch import Batch
from .pipeline import GuardedPipeline, Trained


class Unpipelined(GuardedPipeline):
    """Does one batch after the other, where TorchRec's pipeline would find no sharded table to trace."""

    def progress(self, batches: Iterator[Batch]) -> Trained:
        """Forward, agreement and backward of the next batch; StopIteration when there is none."""
        loss, trained = self._scaled_loss(next(batches).to(self._world.device, non_blocking=True))
        self._backward(loss)
        return trained

    def detach(self) -> None:
        """Nothing to take off the model."""

    def attach(self, sparse_dist: bool = True) -> None:
        """Nothing to put back onto the model."""
