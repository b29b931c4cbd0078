"""Stochastic length: most long histories are cut to a few of their events, anew in every epoch; training only.

Of N = max_history and alpha follows t = N**(alpha / 2). A history of n > t events stays whole with probability
min(1, N**alpha / n**2), else t of its events are kept ("Stochastic Length" in HSTU, arXiv 2402.17152). The balanced
form decides for the samples of a step together (load-balanced stochastic length, ULTRA-HSTU, arXiv 2602.16986,
Algorithm 1 and appendix C).

There, every rank samples on its own, and is told the mean load of all by a periodic all-reduce. Here no rank needs to
be told: each plans the whole step from counts of events, in which the load to be met is the step's expected cost.
Steps sized by tokens or cost have the same expectation; where it drifts (steps of equally many rows, another part of
the dataset), the target follows at once, step by step.

Decisions depend on (seed, epoch, row, number of the sample), and if balanced on the other samples of the step; never on
the number of ranks.

Legend: S = samples, E = events of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from .hashing import Bits, keys, uniform
from .samples import Integers, Numbers, Slices

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class StochasticLength:
    """Which histories are cut, and to which events."""

    max_history: int
    alpha: float
    selection: Literal["recent", "random", "time_weighted"]
    balanced: bool
    seed: int

    @property
    def threshold(self) -> int:
        """Events that a cut history keeps; shorter ones stay whole."""
        return round(self.max_history ** (self.alpha / 2))

    def probabilities(self, history: Integers) -> Numbers:
        """[S] float64: how likely histories of so many events are to stay whole."""
        long = np.maximum(history, 1).astype(np.float64)
        return np.where(history <= self.threshold, 1.0, np.minimum(1.0, self.max_history**self.alpha / long**2))

    def expected(self, history: Integers, amount: Callable[[Integers], Integers]) -> Integers:
        """[S] expectation, rounded, of what is `amount(kept)` for so many events kept."""
        whole = self.probabilities(history)
        cut = amount(np.minimum(history, self.threshold))
        return np.rint(whole * amount(history) + (1 - whole) * cut).astype(np.int64)

    def decide(
        self,
        slices: Slices,
        *,
        epoch: int,
        rows: Integers,
        numbers: Integers,
        places: Numbers,
        cost_of: Callable[[Integers], Integers],
    ) -> Slices:
        """The slices of a step's samples with what is kept of each history.

        `places` are the samples' places in the dataset: ranks get neighbours, so that every rank's part of a balanced
        step costs what was expected, within two samples. `cost_of` says what so many events of each sample cost.
        """
        history = slices.kept
        cut = np.minimum(history, self.threshold)
        whole, draws = self.probabilities(history), uniform(keys(self.seed, epoch, rows, numbers))
        if self.balanced:
            in_turn = np.argsort(places, kind="stable")
            weights = (cost_of(history) - cost_of(cut)).astype(np.float64)
            is_whole = np.empty(len(history), bool)
            is_whole[in_turn] = round_dependently(whole[in_turn], weights[in_turn], draws[in_turn])
        else:
            is_whole = draws < whole
        kept = np.where(is_whole, history, cut)
        begin = slices.target_begin - kept if self.selection == "recent" else slices.history_begin
        return replace(slices, history_begin=begin, kept=kept)

    def select(self, events: Events, keys_of_samples: Bits) -> Booleans:
        """[E] which events of cut histories are kept: of each sample `threshold` ones, or all if it has no more.

        Drawn without replacement; an event of age f_i, counted from the sample's newest one here, weighs 1, or
        1 - f_i / sum(f) if time-weighted.
        """
        # From 1 on: 0 would repeat the draw that decided.
        priorities = uniform(keys_of_samples[events.samples] + (events.numbers + 1).astype(np.uint64))
        if self.selection == "time_weighted":
            # The smallest exponential variables of these rates are such a draw (Efraimidis and Spirakis 2006).
            weights = _freshness(events)
            last = np.full_like(weights, np.finfo(np.float64).max)
            priorities = np.divide(-np.log(1 - priorities), weights, out=last, where=weights > 0)
        priorities[events.is_certain] = -1
        return _smallest(priorities, events.samples, self.threshold)


@dataclass(frozen=True)
class Events:
    """[E] each: events to select from, sample after sample, each sample's in the order of time."""

    samples: Integers
    """Place of the event's sample in the batch; ascending."""
    numbers: Integers
    """The event's number in its row."""
    times: Integers
    is_certain: Booleans
    """Kept whatever is drawn."""


def _smallest(values: Numbers, samples: Integers, number: int) -> Booleans:
    """[E] which values are among the `number` smallest of their sample; `samples` is ascending.

    Selected in a table with a line per sample, the rest of it infinite: lengths differ little, since a cut history has
    `number` to max_history events. Sorting all took three to four times as long.
    """
    begins = np.flatnonzero(np.diff(samples, prepend=-1))
    sizes = np.diff(begins, append=len(samples))
    table = np.full((len(sizes), max(int(sizes.max(initial=0)), number)), np.inf)
    line, place = np.repeat(np.arange(len(sizes)), sizes), np.arange(len(samples)) - np.repeat(begins, sizes)
    table[line, place] = values
    chosen = np.argpartition(table, number - 1, axis=1)[:, :number]
    is_chosen = np.zeros(table.shape, bool)
    np.put_along_axis(is_chosen, chosen, True, axis=1)
    return is_chosen[line, place]


def _freshness(events: Events) -> Numbers:
    """[E] 1 - f_i / sum(f), in the order of the events."""
    newest = np.flatnonzero(np.diff(events.samples, append=-1))
    sizes = np.diff(newest, prepend=-1)
    ages = (np.repeat(events.times[newest], sizes) - events.times).astype(np.float64)
    totals = np.bincount(events.samples, ages)[events.samples]
    return 1 - np.divide(ages, totals, out=np.zeros_like(ages), where=totals > 0)


def round_dependently(probabilities: Numbers, weights: Numbers, draws: Numbers) -> Booleans:
    """[S] True with exactly these probabilities, such that weights add up to what is expected.

    The sum of the weights of True over any leading samples differs from its expectation by less than one weight, and
    over any stretch by less than two. `draws` are independent and uniform in [0, 1), one per sample.

    Ordered pivotal sampling (Deville and Tillé, Biometrika 1998), with weights as in Gandhi et al. (J. ACM 2006): of
    two undecided samples one takes from the other, at random, as much weight * probability as decides one of them. The
    chances are such that neither gains on average; what they weigh together stays the same.
    """
    is_true = probabilities >= 1
    undecided = np.flatnonzero(~is_true)
    if not len(undecided):
        return is_true
    held, *others = undecided.tolist()
    chance, weight, last_draw = float(probabilities[held]), float(weights[held]), float(draws[held])
    columns = (column[others].tolist() for column in (probabilities, weights, draws))
    for sample, its_chance, its_weight, draw in zip(others, *columns, strict=True):
        room, load = (1 - chance) * weight, chance * weight
        its_room, its_load = (1 - its_chance) * its_weight, its_chance * its_weight
        up, down = min(room, its_load), min(load, its_room)
        is_up = draw * (up + down) < down
        if (room <= its_load) if is_up else (load <= its_room):
            is_true[held] = is_up
            left = its_load - room if is_up else its_load + load
            held, chance, weight = sample, left / its_weight, its_weight
        else:
            is_true[sample] = not is_up
            chance = (load + its_load if is_up else load - its_room) / weight
    is_true[held] = last_draw < chance
    return is_true
