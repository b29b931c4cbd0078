"""What one rank trains on in one step.

Legend: B = samples of this rank (at least 1: a rank without samples in a step gets one of no events), T = events of
all samples (history, then targets, sample after sample), M = labelled predictions, S = real samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from .deal import NO_LOADS, Loads
from .faults import SkippedSample
from .order import LoaderState


@dataclass
class Batch(Pipelineable):
    """Jagged samples of one step; every tensor but `numbers` is int64.

    Either an input of `ranking` (targets trail the history, one label per target) or of `next_item` (no targets: in
    training each of the T positions predicts the event after it, in evaluation only a sample's last one does).
    """

    ids: KeyedJaggedTensor
    """What sharded tables look up, stride B, no weights: "item" (T ids); then each feature of kind `hash` (T ids of
    events, 1 id per sample of users); then, where the loader has candidates, "positive" (M ids, only if the candidates
    are sampled) and "candidate" (shared by the batch: all lie in the first sample's bag; none in evaluation; where each
    prediction has its own, every item among them once)."""
    offsets: Tensor
    """[B+1], where each sample's events begin and end."""
    num_targets: Tensor
    """[B], trailing events of each sample that are targets; zeros for next_item."""
    timestamps: Tensor
    """[T], as in the log."""
    query_timestamps: Tensor
    """[T], when a position's prediction is asked for: next_item, the time of the event after it; else `timestamps`."""
    actions: Tensor
    """[T], bitmask of each event's actions; 0 at targets."""
    features: dict[str, Tensor]
    """Ids of the features of other kinds: `event` and `outcome` [T] (an outcome is 0 at targets), `user` [B]."""
    labels: Tensor
    """[M]: ranking, the targets' action bitmasks; next_item, item ids (0, an unknown item, cannot be predicted)."""
    users: Tensor
    """[M], the user of each label, as the row's number over all files in order."""
    num_labels: int
    """Labels that this step was planned with over all ranks, known without communication; a mean over the step divides
    by them less the `num_skipped_labels` of all ranks."""
    epoch: int
    samples: Tensor
    """[S, 3] (file, row in the file, sample of the row) of each real sample; stays on the CPU, for the audit."""
    state: LoaderState
    """Where to resume once this batch has been trained."""
    skipped: tuple[SkippedSample, ...] = ()
    """Samples of this rank in this step that `data.bad_data="skip"` left out."""
    num_skipped_labels: int = 0
    """Their labels, which `num_labels` counts: that they are damaged is known only to the rank that has read them."""
    loads: Loads = NO_LOADS
    """How evenly the step was dealt; the same on every rank."""
    numbers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """[M] float32 each, by column: ranking, what stands there at the targets; NaN where the log has nothing."""
    negatives: Tensor | None = None
    """[M, negatives], where each prediction has its own: the places of their items among the ids of "candidate"."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """This batch on another device, all but `samples`."""
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            lambda ids: ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """This batch in page-locked memory, from which `to(..., non_blocking=True)` does not stop the host."""
        return self._map(lambda tensor: tensor.pin_memory(), lambda ids: ids.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until the work queued on `stream` is done."""
        for tensor in [*self._tensors().values(), *self.features.values(), *self.numbers.values()]:
            tensor.record_stream(stream)
        self.ids.record_stream(stream)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that travel, by field, `ids`, `features` and `numbers` apart."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, Tensor) and name != "samples"}

    def _map(
        self,
        move: Callable[[Tensor], Tensor],
        move_ids: Callable[[KeyedJaggedTensor], KeyedJaggedTensor],
    ) -> Batch:
        moved: dict[str, Any] = {name: move(tensor) for name, tensor in self._tensors().items()}
        features = {name: move(tensor) for name, tensor in self.features.items()}
        numbers = {name: move(tensor) for name, tensor in self.numbers.items()}
        return dataclasses.replace(self, ids=move_ids(self.ids), features=features, numbers=numbers, **moved)
