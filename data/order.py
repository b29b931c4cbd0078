"""In which order samples are read: pure functions of (seed, epoch); no file is opened, no process group asked.

An epoch is one global sequence of samples 0..n-1, cut into steps, each dealt to the ranks. Only the dealing knows the
world size, so that a position in the sequence (`LoaderState`) can be resumed on any other.

The sequence runs through windows of row groups. Within its window every row group is spread evenly: any stretch of the
sequence takes of each row group its share. So a rank can read a few of the window's row groups and find in them its
part of every step.

Legend: R = rows, G = row groups, S = samples, W = windows (row groups whose samples are mixed).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from .cost import UNITS_PER_TOKEN, CostModel
from .samples import Integers, Numbers, RowCounts, Sampler, Slices, Split
from .spread import in_groups, spread
from .stochastic_length import StochasticLength

_ROW_GROUPS, _SAMPLES = 0, 1
COUNTED = 1 << 18
"""Samples whose steps are counted one by one before training begins; a quarter of a second."""


@dataclass(frozen=True)
class LoaderState:
    """A position in the order, free of world size and of the size of a step."""

    epoch: int = 0
    consumed: int = 0
    """Samples of the epoch that all ranks together have consumed."""


@dataclass(frozen=True)
class Samples:
    """[S] each."""

    rows: Integers
    """Number of the row, over all files."""
    numbers: Integers
    """Which of the row's samples."""
    groups: Integers
    """The row group it is read from."""
    windows: Integers
    """The window it is read in."""
    places: Numbers
    """Cost of what stands in the window before its row, in the order of the dataset, over the cost of the window."""
    costs: Integers
    """What it costs to train, as `CostModel` counts; an expectation until its step has been decided."""
    slices: Slices

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Integers | slice) -> Samples:
        """These of the samples."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)[:-1]}
        return Samples(**{name: column[index] for name, column in columns.items()}, slices=self.slices.take(index))

    def followed_by(self, other: Samples) -> Samples:
        """These samples, then the other's."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)[:-1]}
        columns = {name: np.concatenate(pair) for name, pair in pairs.items()}
        return Samples(**columns, slices=self.slices.followed_by(other.slices))


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
    """As many samples per step as have at most `most` of what is measured, but at least one."""

    measure: Literal["rows", "tokens", "cost"]
    most: float
    """Samples; or events together; or cost together, in tokens."""

    def ends(self, sizes: Integers, *, is_last: bool, first: int = 0, unit: int = 1) -> list[int]:
        """Where steps end in a run of samples; a step that samples after the run might extend is left out.

        Args:
            first: number in the epoch of the run's first sample.
            unit: steps that are not sized by rows end at multiples of so many samples in the epoch, where they have
                room for as many.
        """
        if self.measure == "rows":
            ends = list(range(int(self.most), len(sizes) + 1, int(self.most)))
        else:
            most = self.most * (UNITS_PER_TOKEN if self.measure == "cost" else 1)
            ends = _full_ends(np.cumsum(sizes), int(most), first, unit)
        rest = len(sizes) - (ends[-1] if ends else 0)
        return [*ends, len(sizes)] if is_last and rest else ends


def _full_ends(total_sizes: Integers, budget: int, first: int, unit: int) -> list[int]:
    """Ends of the steps, each as long as the budget allows, that are followed by at least one sample."""
    ends: list[int] = []
    begin, used = 0, 0
    while (end := max(int(np.searchsorted(total_sizes, used + budget, side="right")), begin + 1)) < len(total_sizes):
        whole = (first + end) // unit * unit - first
        begin = whole if whole > begin else end
        used = int(total_sizes[begin - 1])
        ends.append(begin)
    return ends


@dataclass(frozen=True)
class _Window:
    """The sequence of one window; what belongs to rows is kept once per row, as a row may give very many samples."""

    number: int
    rows: Integers
    """[R], like the next three."""
    groups: Integers
    counts: RowCounts
    places: Numbers
    index: npt.NDArray[np.int32]
    """[S], like the next three: which of the rows."""
    numbers: npt.NDArray[np.int32]
    costs: Integers
    sizes: Integers
    """What the size of a step is measured by."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sequence of samples of every epoch, drawn window by window, so that no epoch is ever held as a whole."""

    counts_of: Callable[[Integers], RowCounts]
    """The counts of all rows of these row groups, which are ascending; reads them, or has them."""
    group_begin: Integers
    """[G+1] first row of each row group, over all files."""
    group_samples: Integers
    """[G] samples of each row group."""
    sampler: Sampler
    split: Split
    step_size: StepSize
    cost_model: CostModel
    stochastic_length: StochasticLength | None
    """If set, the sequence and the sizes of steps go by expected tokens and costs; each step then decides."""
    shuffle: bool
    """Mix row groups, and the samples of each; else both keep the order of the dataset."""
    groups_per_window: int
    seed: int
    balance_for: int = 1
    """Ranks among which even a step of few samples is to be dealt evenly (see `in_groups`)."""

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return int(self.group_samples.sum())

    def windows(self, epoch: int) -> list[Integers]:
        """The row groups of each window, in ascending order within one; over all windows each occurs exactly once."""
        groups = np.arange(len(self.group_samples))
        if self.shuffle:
            groups = np.random.default_rng((self.seed, epoch, _ROW_GROUPS)).permutation(groups)
        starts = range(0, len(groups), self.groups_per_window)
        return [np.sort(groups[start : start + self.groups_per_window]) for start in starts]

    def steps(self, epoch: int, consumed: int = 0) -> Iterator[Step]:
        """The steps of an epoch after its first `consumed` samples; together they hold each other sample once."""
        windows = self.windows(epoch)
        ends = np.cumsum([self.group_samples[groups].sum() for groups in windows])
        first = int(np.searchsorted(ends, consumed, side="right"))
        skipped = consumed - (int(ends[first - 1]) if first else 0)
        unit = self.balance_for if self.shuffle else 1
        pending, pending_sizes = _NO_SAMPLES, np.zeros(0, np.int64)
        for number in range(first, len(windows)):
            window = self._window(epoch, number, windows[number], int(ends[number - 1]) if number else 0)
            sizes = np.concatenate([pending_sizes, window.sizes[skipped:]])
            is_last = number == len(windows) - 1
            ends_of_steps = self.step_size.ends(sizes, is_last=is_last, first=consumed, unit=unit)
            # In the window's own numbers; what is pending stands before it, at the numbers below `skipped`.
            shift = skipped - len(pending)
            for begin, end in itertools.pairwise([0, *ends_of_steps]):
                samples = self._samples(window, max(begin + shift, skipped), end + shift)
                samples = pending.take(slice(begin, end)).followed_by(samples) if begin < len(pending) else samples
                yield self._step(epoch, consumed, samples)
                consumed += end - begin
            done = ends_of_steps[-1] if ends_of_steps else 0
            rest = self._samples(window, max(done + shift, skipped), len(window.index))
            pending, pending_sizes = pending.take(slice(done, None)).followed_by(rest), sizes[done:]
            skipped = 0

    def num_steps(self, epochs: int, *, per_update: int = 1) -> int:
        """Updates in the first `epochs` epochs, `per_update` steps each, fewer at the end of an epoch.

        Exact where steps are sized by rows, or all epochs together have at most `COUNTED` samples. Else what the first
        `COUNTED` samples of the first epoch lead to expect: where steps end depends on every sample before, and to walk
        through 10 million of them takes 4 seconds per epoch.
        """
        if self.step_size.measure == "rows":
            steps = [-(-self.num_samples // int(self.step_size.most))] * epochs
        elif self.num_samples * epochs <= COUNTED:
            steps = [sum(1 for _ in self.steps(epoch)) for epoch in range(epochs)]
        else:
            steps = [self._expected_steps] * epochs
        return sum(-(-number // per_update) for number in steps)

    @cached_property
    def _expected_steps(self) -> int:
        number = done = 0
        for step in self.steps(0):
            number, done = number + 1, done + len(step.samples)
            if done >= COUNTED:
                break
        return round(number * self.num_samples / done)

    def _step(self, epoch: int, first_sample: int, samples: Samples) -> Step:
        after = first_sample + len(samples)
        state = LoaderState(epoch, after) if after < self.num_samples else LoaderState(epoch + 1, 0)
        return Step(epoch, first_sample, self._decided(epoch, samples), state)

    def _decided(self, epoch: int, samples: Samples) -> Samples:
        """The samples of a step with what stochastic length leaves of their histories, and what they then cost."""
        if self.stochastic_length is None:
            return samples
        targets = self.sampler.num_targets(samples.slices)
        slices = self.stochastic_length.decide(
            samples.slices,
            epoch=epoch,
            rows=samples.rows,
            numbers=samples.numbers,
            places=samples.places,
            cost_of=lambda history: self.cost_model.units(history, targets),
        )
        return replace(samples, slices=slices, costs=self.cost_model.units(slices.kept, targets))

    def _window(self, epoch: int, number: int, groups: Integers, first: int) -> _Window:
        """The rows of a window, and the sequence of all their samples, of which `first` in the epoch come before."""
        num_rows = self.group_begin[groups + 1] - self.group_begin[groups]
        counts = self.counts_of(groups)
        num_samples = self.sampler.num_samples(counts, self.split)
        random = np.random.default_rng((self.seed, epoch, _SAMPLES, number)) if self.shuffle else None
        begin = np.cumsum(num_rows) - num_rows
        parts = [
            self._part(np.arange(first, first + many), counts, num_samples, random)
            for first, many in zip(begin.tolist(), num_rows.tolist(), strict=True)
        ]
        index, numbers, tokens, costs, positions = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        if random is not None and self.balance_for > 1:
            order = in_groups(positions, costs, self.balance_for, random, first=first)
        else:
            order = np.argsort(positions, kind="stable")
        until = np.concatenate([[0], np.cumsum(costs)])
        sizes = {"rows": np.ones_like(costs), "tokens": tokens, "cost": costs}[self.step_size.measure]
        return _Window(
            number=number,
            rows=np.arange(num_rows.sum()) + np.repeat(self.group_begin[groups] - begin, num_rows),
            groups=np.repeat(groups, num_rows),
            counts=counts,
            places=until[np.cumsum(num_samples) - num_samples] / max(int(until[-1]), 1),
            index=index[order],
            numbers=numbers[order],
            costs=costs[order],
            sizes=sizes[order],
        )

    def _part(
        self, rows: Integers, counts: RowCounts, num_samples: Integers, random: np.random.Generator | None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Integers, Integers, Numbers]:
        """[S] each of one row group: index of the row, number, tokens, cost, and the position in 0..1 of its window."""
        index = np.repeat(rows, num_samples[rows])
        numbers = np.arange(len(index)) - np.repeat(np.cumsum(num_samples[rows]) - num_samples[rows], num_samples[rows])
        slices = self.sampler.slices(counts.take(index), numbers, self.split)
        tokens, costs = self._expected(slices)
        positions = (np.arange(len(index)) + 0.5) / max(len(index), 1) if random is None else spread(costs, random)
        return index.astype(np.int32), numbers.astype(np.int32), tokens, costs, positions

    def _expected(self, slices: Slices) -> tuple[Integers, Integers]:
        """[S] tokens and costs of samples, expected where stochastic length has yet to decide."""
        targets = self.sampler.num_targets(slices)
        if self.stochastic_length is None:
            return slices.kept + targets, self.cost_model.units(slices.kept, targets)
        tokens = self.stochastic_length.expected(slices.kept, lambda history: history + targets)
        costs = self.stochastic_length.expected(slices.kept, lambda history: self.cost_model.units(history, targets))
        return tokens, costs

    def _samples(self, window: _Window, begin: int, end: int) -> Samples:
        """Samples `begin` to `end` of the window's sequence."""
        index, numbers = (column[begin:end].astype(np.int64) for column in (window.index, window.numbers))
        return Samples(
            rows=window.rows[index],
            numbers=numbers,
            groups=window.groups[index],
            windows=np.full(len(index), window.number),
            places=window.places[index],
            costs=window.costs[begin:end],
            slices=self.sampler.slices(window.counts.take(index), numbers, self.split),
        )


_NONE = np.zeros(0, np.int64)
_NO_SAMPLES = Samples(_NONE, _NONE, _NONE, _NONE, np.zeros(0), _NONE, Slices(_NONE, _NONE, _NONE, _NONE))
