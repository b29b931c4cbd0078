"""Where events and contextual tokens lie in the sequences that the stack sees: [contextual | history | targets].

A batch holds events only, sample after sample. In front of each sample's events come C contextual tokens, one per
user feature. Everything here is index arithmetic on whole batches, and nothing makes the host wait for a GPU.
"""

# T = events of all samples, B = samples, C = contextual tokens per sample, S = T + B * C tokens of all sequences,
# M = targets of all samples

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch


@dataclass(frozen=True, slots=True)
class Layout:
    """The sequences of one batch; every tensor is int64."""

    num_contextual: int
    """C"""
    event_offsets: Tensor
    """[B+1], where each sample's events begin and end among the T."""
    num_targets: Tensor
    """[B]"""
    sample_of_event: Tensor
    """[T]"""
    index_of_event: Tensor
    """[T], counted from 0 at the sample's first event."""

    @classmethod
    def of(cls, batch: Batch, *, num_contextual: int) -> Layout:
        """Lay out a batch with `num_contextual` tokens in front of every sample's events."""
        offsets = batch.offsets
        num_events = batch.timestamps.numel()
        samples = torch.arange(offsets.numel() - 1, device=offsets.device)
        sample_of_event = torch.repeat_interleave(samples, offsets.diff(), output_size=num_events)
        events = torch.arange(num_events, device=offsets.device)
        return cls(num_contextual, offsets, batch.num_targets, sample_of_event, events - offsets[sample_of_event])

    @property
    def offsets(self) -> Tensor:
        """[B+1], where each sequence begins and ends among the S."""
        samples = torch.arange(self.event_offsets.numel(), device=self.event_offsets.device)
        return self.event_offsets + self.num_contextual * samples

    @property
    def num_history(self) -> Tensor:
        """[B], events before the targets."""
        return self.event_offsets.diff() - self.num_targets

    @property
    def is_target(self) -> Tensor:
        """[T] bool, whether an event is a target."""
        return self.index_of_event >= self.num_history[self.sample_of_event]

    def target_events(self, count: int) -> Tensor:
        """The targets among the T events; [M]; `count` is M, known from the labels."""
        before = self.event_offsets[1:] - self.num_targets.cumsum(0)
        targets = torch.arange(count, device=before.device)
        return targets + torch.repeat_interleave(before, self.num_targets, output_size=count)

    def rows(self, events: Tensor) -> Tensor:
        """The rows among the S tokens of some of the T events, given by number."""
        return events + self.num_contextual * (self.sample_of_event[events] + 1)

    def join(self, context: Tensor, events: Tensor) -> Tensor:
        """Contextual values [B, C, ...] and event values [T, ...], as one sequence per sample [S, ...]."""
        if self.num_contextual == 0:
            return events
        context = context.flatten(0, 1)
        order = torch.empty(len(context) + len(events), dtype=torch.int64, device=events.device)
        numbers = torch.arange(len(order), device=events.device)
        context_rows = self.offsets[:-1, None] + torch.arange(self.num_contextual, device=events.device)
        order[context_rows.flatten()] = numbers[: len(context)]
        order[self.rows(numbers[: len(events)])] = numbers[len(context) :]
        return torch.cat([context, events]).index_select(0, order)

    def join_times(self, times: Tensor) -> Tensor:
        """Timestamps [T] of the events as those of all tokens [S].

        Contextual tokens take the time of their sample's first event: no query is earlier, so none learns of a time
        that lies ahead of it. In a sample without events they take 0.
        """
        first_times = torch.cat([times, times.new_zeros(1)])[self.event_offsets[:-1]]
        first_times = first_times.masked_fill(self.event_offsets.diff() == 0, 0)
        return self.join(first_times[:, None].expand(-1, self.num_contextual), times)
