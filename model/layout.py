"""Where events and contextual tokens lie in the sequences that the stack sees: [contextual | history | targets].

A batch holds events only, sample after sample. In front of each sample's events come C contextual tokens, one per
user feature. An event is one token, or, interleaved, an event of the history is two: what it shows, and what came of
it. Everything here is index arithmetic on whole batches; the host waits for a GPU only where events are interleaved,
to learn how many belong to histories.
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
    interleaved: bool = False
    """Whether each event of the history has a second token, for what came of it."""

    @classmethod
    def of(cls, batch: Batch, *, num_contextual: int, interleaved: bool = False) -> Layout:
        """Lay out a batch with `num_contextual` tokens in front of every sample's events."""
        offsets = batch.offsets
        num_events = batch.timestamps.numel()
        samples = torch.arange(offsets.numel() - 1, device=offsets.device)
        sample_of_event = torch.repeat_interleave(samples, offsets.diff(), output_size=num_events)
        events = torch.arange(num_events, device=offsets.device)
        index_of_event = events - offsets[sample_of_event]
        return cls(num_contextual, offsets, batch.num_targets, sample_of_event, index_of_event, interleaved)

    @property
    def offsets(self) -> Tensor:
        """[B+1], where each sequence begins and ends among the S."""
        samples = torch.arange(self.event_offsets.numel(), device=self.event_offsets.device)
        begins = self.event_offsets + self.num_contextual * samples
        if self.interleaved:
            begins = begins + torch.cat([begins.new_zeros(1), self.num_history.cumsum(0)])
        return begins

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

    @property
    def history_events(self) -> Tensor:
        """The events among the T that are no targets, by number."""
        (events,) = (~self.is_target).nonzero(as_tuple=True)
        return events

    def rows(self, events: Tensor) -> Tensor:
        """The rows among the S tokens of some of the T events, given by number; their first where they have two."""
        rows = events + self.num_contextual * (self.sample_of_event[events] + 1)
        if self.interleaved:
            is_history = (~self.is_target).long()
            rows = rows + (is_history.cumsum(0) - is_history)[events]
        return rows

    def last_rows(self, events: Tensor) -> Tensor:
        """As `rows`, but the last row of each event, which has seen all of it."""
        rows = self.rows(events)
        return rows + (~self.is_target).long()[events] if self.interleaved else rows

    def join(self, context: Tensor, events: Tensor, outcomes: Tensor | None = None) -> Tensor:
        """Values of contextual tokens [B, C, ...] and of events [T, ...], as one sequence per sample [S, ...].

        Interleaved, `outcomes` [T, ...] has the values of the second tokens; those of targets are left out.
        """
        if self.num_contextual == 0 and not self.interleaved:
            return events
        device = events.device
        context_rows = self.offsets[:-1, None] + torch.arange(self.num_contextual, device=device)
        parts = [context.flatten(0, 1), events]
        rows = [context_rows.flatten(), self.rows(torch.arange(len(events), device=device))]
        if self.interleaved:
            assert outcomes is not None
            history = self.history_events
            parts.append(outcomes[history])
            rows.append(self.last_rows(history))
        joined = torch.cat(parts)
        order = torch.empty(len(joined), dtype=torch.int64, device=device)
        order[torch.cat(rows)] = torch.arange(len(joined), device=device)
        return joined.index_select(0, order)

    def join_times(self, times: Tensor) -> Tensor:
        """Timestamps [T] of the events as those of all tokens [S].

        Contextual tokens take the time of their sample's first event: no query is earlier, so none learns of a time
        that lies ahead of it. In a sample without events they take 0.
        """
        first_times = torch.cat([times, times.new_zeros(1)])[self.event_offsets[:-1]]
        first_times = first_times.masked_fill(self.event_offsets.diff() == 0, 0)
        return self.join(first_times[:, None].expand(-1, self.num_contextual), times, times)
