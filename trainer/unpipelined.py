"""Steps of a run whose tables all lie on every rank: without an exchange of ids there is none to overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..data.batch import Batch

Out = TypeVar("Out")


class Unpipelined(Generic[Out]):
    """Does one batch after the other, where TorchRec's pipeline would find no sharded table to trace.

    Args:
        forward: a batch -> the loss to derive, and what a step returns.
    """

    def __init__(self, forward: Callable[[Batch | None], tuple[Tensor, Out]], device: torch.device) -> None:
        self._forward = forward
        self._device = device

    def progress(self, batches: Iterator[Batch]) -> Out:
        """Forward and backward of the next batch; StopIteration when there is none."""
        loss, out = self._forward(next(batches).to(self._device, non_blocking=True))
        torch.autograd.backward(loss)
        return out

    def detach(self) -> None:
        """Nothing to take off the model."""

    def attach(self, sparse_dist: bool = True) -> None:
        """Nothing to put back onto the model."""
