"""Which of a row's events are the history and which the targets of each of its samples: index arithmetic, no events.

Legend: R = rows (users), S = samples. A row's events are numbered from 0 in true time order; the first num_train of
them train, the next num_validation validate, the rest test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .hashing import Bits, mix, uniform

Split = Literal["train", "validation", "test"]
Targets = Literal["all", "recent"]
Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]

# Kept apart from the streams that order.py draws from the same seed and epoch.
_NEGATIVES = 2


@dataclass(frozen=True)
class RowCounts:
    """[R] int32 each: all events of a row, and how many of them train and validate."""

    num_events: npt.NDArray[np.int32]
    num_train: npt.NDArray[np.int32]
    num_validation: npt.NDArray[np.int32]

    def take(self, rows: Integers) -> RowCounts:
        """The counts of these rows."""
        return RowCounts(self.num_events[rows], self.num_train[rows], self.num_validation[rows])

    def range_of(self, split: Split) -> tuple[Integers, Integers]:
        """[R] first event of the split, and the one after its last."""
        train = self.num_train.astype(np.int64)
        test = train + self.num_validation
        if split == "train":
            return np.zeros_like(train), train
        return (train, test) if split == "validation" else (test, self.num_events.astype(np.int64))


@dataclass(frozen=True)
class Slices:
    """[S] each: a sample's history is [history_begin, target_begin), its targets [target_begin, target_end)."""

    history_begin: Integers
    target_begin: Integers
    target_end: Integers
    kept: Integers
    """So many events of the history are read; fewer than all only under stochastic length."""

    def take(self, index: Integers | slice) -> Slices:
        """The slices of these samples."""
        return Slices(self.history_begin[index], self.target_begin[index], self.target_end[index], self.kept[index])

    def followed_by(self, other: Slices) -> Slices:
        """These slices, then the other's."""
        return Slices(
            np.concatenate([self.history_begin, other.history_begin]),
            np.concatenate([self.target_begin, other.target_begin]),
            np.concatenate([self.target_end, other.target_end]),
            np.concatenate([self.kept, other.kept]),
        )


@dataclass(frozen=True)
class RankingSampler:
    """Each target event is judged, given the newest `max_history` events before it.

    Of those, the batch drops what has the target's own timestamp (see `collate`). Training takes `targets_per_sample`
    consecutive events at a time, which share the history before the first of them. Evaluation takes one event at a
    time with all that precedes it, earlier events of the same split included, as in serving. A user's first event has
    an empty history.
    """

    max_history: int
    targets_per_sample: int
    targets: Targets = "all"
    """Which training events are targets: each of them, or of each user the newest `max_history`."""

    def num_samples(self, counts: RowCounts, split: Split) -> Integers:
        """[R] samples that each row gives."""
        begin, end = self._range(counts, split)
        return -((begin - end) // self._per_sample(split))

    def slices(self, counts: RowCounts, numbers: Integers, split: Split) -> Slices:
        """Sample `numbers[s]` of the row that `counts` describes at s."""
        begin, end = self._range(counts, split)
        target_begin = begin + numbers * self._per_sample(split)
        target_end = np.minimum(target_begin + self._per_sample(split), end)
        return _with_whole_history(self.max_history, target_begin, target_end)

    def num_targets(self, slices: Slices) -> Integers:
        """[S] targets that the model reads."""
        return slices.target_end - slices.target_begin

    def num_tokens(self, slices: Slices) -> Integers:
        """[S] events that the model reads, history and targets; an upper bound where timestamps tie."""
        return slices.kept + self.num_targets(slices)

    def num_labels(self, slices: Slices, split: Split) -> int:
        """Labels of all these samples."""
        return int((slices.target_end - slices.target_begin).sum())

    def _range(self, counts: RowCounts, split: Split) -> tuple[Integers, Integers]:
        """[R] the first target, and the event after the last."""
        begin, end = counts.range_of(split)
        if split == "train" and self.targets == "recent":
            begin = np.maximum(begin, end - self.max_history)
        return begin, end

    def _per_sample(self, split: Split) -> int:
        return self.targets_per_sample if split == "train" else 1


@dataclass(frozen=True)
class NextItemSampler:
    """The events of a history predict the item that follows (SASRec's protocol, as in HSTU, arXiv 2402.17152).

    Training cuts a row's training events into windows, one sample each: the newest `max_history` + 1 events, of which
    every one but the last predicts its successor; then as many that end with the oldest event of these; and so on back
    to the first. Neighbours share one event, a target of the older window and the beginning of the newer one: so every
    event is predicted once, but for the row's first, which has nothing before it. The samples of a row are numbered
    from the newest window back. Evaluation takes each event of the split as one sample, predicted from the newest
    `max_history` events before it; again none for an event with nothing before it.
    """

    max_history: int
    targets: Targets = "all"
    """Which training events are targets: each of them, or of each user the newest `max_history`, one window."""

    def num_samples(self, counts: RowCounts, split: Split) -> Integers:
        """[R] samples that each row gives."""
        begin, end = counts.range_of(split)
        if split == "train":
            windows = -((1 - np.maximum(end, 1)) // self.max_history)
            return np.minimum(windows, 1) if self.targets == "recent" else windows
        return np.maximum(end - np.maximum(begin, 1), 0)

    def slices(self, counts: RowCounts, numbers: Integers, split: Split) -> Slices:
        """Sample `numbers[s]` of the row that `counts` describes at s; its one target is the newest event."""
        begin, end = counts.range_of(split)
        is_training = split == "train"
        target_begin = end - 1 - numbers * self.max_history if is_training else np.maximum(begin, 1) + numbers
        return _with_whole_history(self.max_history, target_begin, target_begin + 1)

    def num_targets(self, slices: Slices) -> Integers:
        """[S] targets that the model reads: none, it predicts them from the history alone."""
        return np.zeros_like(slices.target_end)

    def num_tokens(self, slices: Slices) -> Integers:
        """[S] events that the model reads: the history."""
        return slices.kept

    def num_labels(self, slices: Slices, split: Split) -> int:
        """Labels of all these samples: one per event read in training, one per sample in evaluation."""
        return int(self.num_tokens(slices).sum()) if split == "train" else len(slices.target_begin)


def _with_whole_history(max_history: int, target_begin: Integers, target_end: Integers) -> Slices:
    history_begin = np.maximum(target_begin - max_history, 0)
    return Slices(history_begin, target_begin, target_end, target_begin - history_begin)


Sampler = RankingSampler | NextItemSampler


@dataclass(frozen=True)
class Candidates:
    """Items that predictions are compared with.

    `catalogue`: the ids 1..num_items. `sampled`: `num_negatives` uniform ids of 1..num_items, for all predictions of a
    step, and all different where there are enough items. `per_sample`: so many for each sample of the step, drawn one
    by one. `per_position`: likewise for each prediction.
    """

    kind: Literal["catalogue", "sampled", "per_sample", "per_position"]
    num_items: int
    num_negatives: int = 0

    def __post_init__(self) -> None:
        if (self.kind != "catalogue") != (self.num_negatives > 0):
            raise ValueError(
                f"num_negatives={self.num_negatives} with kind={self.kind!r}: "
                "sampled candidates need at least 1, a catalogue takes none"
            )

    def ids(self, *, seed: int, epoch: int, first_sample: int) -> Integers:
        """The ids for the step that begins at `first_sample` of its epoch; the same on every rank and world size."""
        if self.kind == "catalogue":
            return np.arange(1, self.num_items + 1)
        random = np.random.default_rng((seed, epoch, _NEGATIVES, first_sample))
        if self.num_negatives > self.num_items:
            return random.integers(1, self.num_items + 1, self.num_negatives)
        return random.choice(self.num_items, self.num_negatives, replace=False, shuffle=False) + 1

    def ids_by_sample(self, sample_keys: Bits) -> Integers:
        """[S, num_negatives] ids for samples with these keys, whatever else is in the step."""
        draws = mix(np.arange(self.num_negatives, dtype=np.uint64) + np.uint64(_NEGATIVES << 32))
        return (uniform(sample_keys[:, None] ^ draws) * self.num_items).astype(np.int64) + 1

    def ids_by_position(self, sample_keys: Bits, lengths: Integers) -> Integers:
        """[M, num_negatives] ids for each of the `lengths[s]` predictions of samples with these keys."""
        positions = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.ids_by_sample(mix(np.repeat(sample_keys, lengths) ^ mix(positions.astype(np.uint64))))

    def mean_ids(self, *, samples: float, predictions: float) -> float:
        """Ids that a rank with so many samples and predictions looks up; of `per_position` the different ones drawn."""
        if self.kind == "catalogue":
            return self.num_items
        if self.kind == "per_position":
            return self.num_items * (1 - (1 - 1 / self.num_items) ** (predictions * self.num_negatives))
        return self.num_negatives * (samples if self.kind == "per_sample" else 1)
