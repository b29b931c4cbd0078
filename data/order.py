"""In which order samples are read: pure functions of (seed, epoch); no file is opened, no process group asked.

An epoch is one global sequence of samples 0..n-1, cut into steps, each dealt to the ranks. Only the dealing knows the
world size, so that a position in the sequence (`LoaderState`) can be resumed on any other.

Legend: R = rows, G = row groups, S = samples, W = windows (row groups whose samples are mixed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from .samples import Integers, RowCounts, Sampler, Slices, Split

_ROW_GROUPS, _SAMPLES = 0, 1


@dataclass(frozen=True)
class LoaderState:
    """A position in the order, free of world size and of the size of a step."""

    epoch: int = 0
    consumed: int = 0
    """Samples of the epoch that all ranks together have consumed."""

    def to_dict(self) -> dict[str, int]:
        """Plain numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, int]) -> LoaderState:
        """The state that `to_dict` wrote."""
        return cls(epoch=int(fields["epoch"]), consumed=int(fields["consumed"]))


@dataclass(frozen=True)
class Samples:
    """[S] each: the row (over all files), the sample of that row, the window it is read in, and its slices."""

    rows: Integers
    numbers: Integers
    windows: Integers
    slices: Slices

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Integers | slice) -> Samples:
        """These of the samples."""
        return Samples(self.rows[index], self.numbers[index], self.windows[index], self.slices.take(index))

    def followed_by(self, other: Samples) -> Samples:
        """These samples, then the other's."""
        mine, others = self.slices, other.slices
        return Samples(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.numbers, other.numbers]),
            np.concatenate([self.windows, other.windows]),
            Slices(
                np.concatenate([mine.history_begin, others.history_begin]),
                np.concatenate([mine.target_begin, others.target_begin]),
                np.concatenate([mine.target_end, others.target_end]),
            ),
        )


@dataclass(frozen=True)
class Step:
    """What all ranks together consume in one step."""

    epoch: int
    first_sample: int
    """Number in the epoch's sequence of the step's first sample."""
    samples: Samples
    state: LoaderState
    """Where to resume after this step."""


@dataclass(frozen=True)
class StepSize:
    """Either `rows` samples per step, or as many as have at most `tokens` events together, but at least one."""

    rows: int | None
    tokens: int | None

    def ends(self, num_tokens: Integers, *, is_last: bool) -> list[int]:
        """Where steps end in a run of samples; a step that samples after the run might extend is left out."""
        if self.tokens is None:
            ends = list(range(self.rows or 1, len(num_tokens) + 1, self.rows or 1))
        else:
            ends = _full_ends(np.cumsum(num_tokens), self.tokens)
        rest = len(num_tokens) - (ends[-1] if ends else 0)
        return [*ends, len(num_tokens)] if is_last and rest else ends


def _full_ends(total_tokens: Integers, budget: int) -> list[int]:
    """Ends of the steps, each as long as the budget allows, that are followed by at least one sample."""
    ends: list[int] = []
    begin, used = 0, 0
    while begin < len(total_tokens):
        begin = max(int(np.searchsorted(total_tokens, used + budget, side="right")), begin + 1)
        used = int(total_tokens[begin - 1])
        ends.append(begin)
    return ends[:-1]


def deal(num_tokens: Integers, world_size: int) -> Integers:
    """[S] the rank of each sample of a step.

    Longest first, to the ranks there and back, so that all get as many samples (give or take one) of about as many
    events: the slowest rank sets the pace of a step.
    """
    place = np.empty(len(num_tokens), np.int64)
    place[np.argsort(-num_tokens, kind="stable")] = np.arange(len(num_tokens))
    lap, seat = np.divmod(place, world_size)
    return np.where(lap % 2 == 0, seat, world_size - 1 - seat)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sequence of samples of every epoch, drawn window by window, so that no epoch is ever held as a whole."""

    counts: RowCounts
    group_begin: Integers
    """[G+1] first row of each row group, over all files."""
    sampler: Sampler
    split: Split
    step_size: StepSize
    shuffle: bool
    """Mix row groups, and samples inside windows; else the order of the dataset."""
    groups_per_window: int
    seed: int

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return int(self._samples_of_groups.sum())

    @cached_property
    def _samples_of_groups(self) -> Integers:
        until = np.concatenate([[0], np.cumsum(self.sampler.num_samples(self.counts, self.split))])
        return np.diff(until[self.group_begin])

    def windows(self, epoch: int) -> list[Integers]:
        """The row groups of each window, in ascending order within one; over all windows each occurs exactly once."""
        groups = np.arange(len(self.group_begin) - 1)
        if self.shuffle:
            groups = np.random.default_rng((self.seed, epoch, _ROW_GROUPS)).permutation(groups)
        starts = range(0, len(groups), self.groups_per_window)
        return [np.sort(groups[start : start + self.groups_per_window]) for start in starts]

    def steps(self, epoch: int, consumed: int = 0) -> Iterator[Step]:
        """The steps of an epoch after its first `consumed` samples; together they hold each other sample once."""
        windows = self.windows(epoch)
        ends = np.cumsum([self._samples_of_groups[groups].sum() for groups in windows])
        first_window = int(np.searchsorted(ends, consumed, side="right"))
        skipped = consumed - (int(ends[first_window - 1]) if first_window else 0)
        pending: Samples | None = None
        for window in range(first_window, len(windows)):
            samples = self._samples(epoch, window, windows[window])
            pending = samples.take(slice(skipped, None)) if pending is None else pending.followed_by(samples)
            begin = 0
            is_last = window == len(windows) - 1
            for end in self.step_size.ends(self.sampler.num_tokens(pending.slices), is_last=is_last):
                yield self._step(epoch, consumed, pending.take(slice(begin, end)))
                consumed += end - begin
                begin = end
            pending = pending.take(slice(begin, None))

    def num_steps(self, epoch: int) -> int:
        """Steps of a whole epoch."""
        if self.step_size.rows is not None:
            return -(-self.num_samples // self.step_size.rows)
        return sum(1 for _ in self.steps(epoch))

    def _step(self, epoch: int, first_sample: int, samples: Samples) -> Step:
        after = first_sample + len(samples)
        state = LoaderState(epoch, after) if after < self.num_samples else LoaderState(epoch + 1, 0)
        return Step(epoch, first_sample, samples, state)

    def _samples(self, epoch: int, window: int, groups: Integers) -> Samples:
        """All samples of a window, mixed if this order shuffles."""
        rows = np.concatenate([np.arange(self.group_begin[group], self.group_begin[group + 1]) for group in groups])
        num_samples = self.sampler.num_samples(self.counts.take(rows), self.split)
        rows = np.repeat(rows, num_samples)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(num_samples) - num_samples, num_samples)
        if self.shuffle:
            mixed = np.random.default_rng((self.seed, epoch, _SAMPLES, window)).permutation(len(rows))
            rows, numbers = rows[mixed], numbers[mixed]
        slices = self.sampler.slices(self.counts.take(rows), numbers, self.split)
        return Samples(rows, numbers, np.full(len(rows), window), slices)
