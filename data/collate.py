"""From samples and the histories they are cut from to a `Batch`, without a loop over samples.

Legend: S = samples of this rank, B = max(S, 1), E = events of all samples from history_begin to target_end,
T = those of them that the model reads, M = labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .batch import Batch
from .config import FeatureConfig
from .errors import UserError
from .faults import Fault, SkippedSample
from .features import numbers_of
from .hashing import keys
from .memory import Memory
from .order import Samples, Step
from .reader import Histories, number_key
from .samples import Candidates, Integers, RankingSampler, Sampler, Split
from .stochastic_length import Booleans, Events, StochasticLength

_LONG = 200
"""Mean events per sample from which on samples are copied one by one, in a loop of Python: at 500, three columns take
2.5 ns per event, against 6.1 through an index of the events, which short samples need, and 3.6 through
`numpy.concatenate`; in two threads at once 8.8, 10.3 and 13.7."""


@dataclass(frozen=True)
class Collator:
    """How samples become batches; the same for every step of a loader."""

    sampler: Sampler
    split: Split
    features: Mapping[str, FeatureConfig]
    candidates: Candidates | None
    stochastic_length: StochasticLength | None
    file_begin: Integers
    """First row of each file, and the number of all rows."""
    seed: int
    memory: Memory
    numbers: tuple[str, ...] = ()
    """Columns whose values at the targets are labels too; ranking only."""

    def __post_init__(self) -> None:
        for name in {"item", "positive", "candidate"}.intersection(self.features):
            raise UserError(
                f"data.features.{name}: {name!r} is the name of a lookup of items; "
                "prepare the dataset with another name for this column"
            )

    def batch(self, step: Step, num_labels: int, samples: Samples, histories: Mapping[int, Histories]) -> Batch:
        """The batch of the rank that was dealt `samples`; `histories` holds every row group they are read from."""
        samples, left_out = self._without_faults(samples, histories)
        read = self._read(step, samples, histories)
        lengths = read.lengths if len(samples) else np.zeros(1, np.int64)
        drawn = self._drawn_by_position(step, samples, read)
        return Batch(
            ids=self._ids(step, samples, lengths, read, drawn),
            offsets=_tensor(np.concatenate([[0], np.cumsum(lengths)])),
            num_targets=_tensor(read.num_targets if len(samples) else lengths),
            timestamps=_tensor(read.events["timestamps"]),
            query_timestamps=_tensor(read.query_timestamps),
            actions=_tensor(read.events["actions"]),
            features={k: _tensor(v) for k, v in self._feature_ids(read, hashed=False).items()},
            labels=_tensor(read.labels),
            numbers={name: torch.from_numpy(numbers_of(bits)) for name, bits in read.numbers.items()},
            users=_tensor(np.repeat(samples.rows, read.labels_per_sample)),
            num_labels=num_labels,
            epoch=step.epoch,
            samples=_tensor(self._audit(samples)),
            skipped=self._skipped(left_out, histories),
            num_skipped_labels=self.sampler.num_labels(left_out.slices, self.split),
            state=step.state,
            negatives=None if drawn is None else _tensor(drawn.places),
        )

    def _without_faults(self, samples: Samples, histories: Mapping[int, Histories]) -> tuple[Samples, Samples]:
        """The samples of rows that may be used, and those that are left out."""
        faulty = {group: np.array(sorted(read.faults)) for group, read in histories.items() if read.faults}
        if not faulty:
            return samples, samples.take(slice(0))
        is_fit = np.ones(len(samples), bool)
        for group, rows in faulty.items():
            inside = samples.groups == group
            is_fit[inside] = (rows[0] >= 0) & ~np.isin(samples.rows[inside] - histories[group].first_row, rows)
        return samples.take(np.flatnonzero(is_fit)), samples.take(np.flatnonzero(~is_fit))

    def _skipped(self, left_out: Samples, histories: Mapping[int, Histories]) -> tuple[SkippedSample, ...]:
        places = zip(self._audit(left_out).tolist(), left_out.groups.tolist(), left_out.rows.tolist(), strict=True)
        return tuple(
            SkippedSample(file, row, sample, _fault_of(histories[group], number))
            for (file, row, sample), group, number in places
        )

    def _read(self, step: Step, samples: Samples, histories: Mapping[int, Histories]) -> _Read:
        slices, is_ranking = samples.slices, isinstance(self.sampler, RankingSampler)
        num_targets = self.sampler.num_targets(slices)
        lengths = slices.target_begin - slices.history_begin + num_targets
        gathered = _Gathered(samples, histories, lengths, self.features, self.numbers, self.memory)
        times = gathered.column("timestamps")
        if is_ranking or self.stochastic_length is not None:
            is_read = _is_earlier(times, lengths, num_targets) if is_ranking else np.ones(len(times), bool)
            if self.stochastic_length is not None:
                self._leave_out(self.stochastic_length, step, samples, times=times, lengths=lengths, is_read=is_read)
            is_read[_ranges(np.cumsum(lengths) - num_targets, num_targets)] = True
            if not is_read.all():
                gathered.keep(is_read)
                times = times[is_read]
        events = {name: times if name == "timestamps" else gathered.column(name) for name in gathered.columns}
        if is_ranking:
            return _read_ranking(gathered, events, num_targets, self.features, self.numbers)
        return _read_next_item(gathered, events, self.split)

    def _leave_out(
        self,
        stochastic_length: StochasticLength,
        step: Step,
        samples: Samples,
        *,
        times: Integers,
        lengths: Integers,
        is_read: Booleans,
    ) -> None:
        """Of the history events that are read, clear those that are left out of histories that are cut."""
        slices = samples.slices
        is_cut = slices.kept < slices.target_begin - slices.history_begin
        if not is_cut.any():
            return
        sample_of = np.repeat(np.arange(len(samples)), lengths)
        places = np.flatnonzero(is_read & is_cut[sample_of])
        sample_of, ends = sample_of[places], np.cumsum(lengths)
        events = Events(
            samples=sample_of,
            numbers=places + (slices.history_begin - ends + lengths)[sample_of],
            times=times[places],
            # For next-item the newest event, which asks for the sample's target; for ranking that is a target.
            is_certain=places == ends[sample_of] - 1,
        )
        sample_keys = keys(self.seed, step.epoch, samples.rows, samples.numbers)
        is_read[places] = stochastic_length.select(events, sample_keys)

    def _feature_ids(self, read: _Read, *, hashed: bool) -> dict[str, Integers]:
        """Ids of the features that are looked up in sharded tables, or of the others: [T] of events, [B] of users."""
        ids = {}
        for name, feature in self.features.items():
            if (feature.kind == "hash") == hashed:
                ids[name] = read.events[name] if feature.role != "user" else read.users[name]
                if feature.role == "user" and not len(ids[name]):
                    ids[name] = np.zeros(1, np.int64)
        return ids

    def _ids(
        self, step: Step, samples: Samples, lengths: Integers, read: _Read, drawn: _Drawn | None
    ) -> KeyedJaggedTensor:
        bags = {"item": (read.events["items"], lengths)}
        for name, ids in self._feature_ids(read, hashed=True).items():
            bags[name] = (ids, np.ones_like(lengths) if self.features[name].role == "user" else lengths)
        if self.candidates is not None:
            if self.candidates.kind != "catalogue":
                bags["positive"] = (read.labels, read.labels_per_sample if len(read.labels) else lengths)
            if drawn is None:
                bags["candidate"] = self._candidate_bags(step, samples, self.candidates, num_bags=len(lengths))
            else:
                bags["candidate"] = drawn.items, _all_in_the_first(len(drawn.items), num_bags=len(lengths))
        values, bag_lengths = zip(*bags.values(), strict=True)
        # One bag needs no copy.
        joined = values[0]
        if len(values) > 1:
            joined = np.concatenate(values, out=self.memory.empty(sum(map(len, values))))
        return KeyedJaggedTensor.from_lengths_sync(list(bags), _tensor(joined), _tensor(np.concatenate(bag_lengths)))

    def _candidate_bags(
        self, step: Step, samples: Samples, candidates: Candidates, *, num_bags: int
    ) -> tuple[Integers, Integers]:
        """The ids of a training step and how many lie in each bag; evaluation has none."""
        lengths = np.zeros(num_bags, np.int64)
        if self.split != "train":
            return np.zeros(0, np.int64), lengths
        if candidates.kind == "per_sample":
            sample_keys = keys(self.seed, step.epoch, samples.rows, samples.numbers)
            ids = candidates.ids_by_sample(sample_keys if len(samples) else np.zeros(1, np.uint64))
            return ids.ravel(), lengths + candidates.num_negatives
        shared = candidates.ids(seed=self.seed, epoch=step.epoch, first_sample=step.first_sample)
        return shared, _all_in_the_first(len(shared), num_bags=num_bags)

    def _drawn_by_position(self, step: Step, samples: Samples, read: _Read) -> _Drawn | None:
        """The negatives of each prediction, where each has its own: an item that many drew is looked up once."""
        if self.candidates is None or self.candidates.kind != "per_position" or self.split != "train":
            return None
        sample_keys = keys(self.seed, step.epoch, samples.rows, samples.numbers)
        ids = self.candidates.ids_by_position(sample_keys, read.labels_per_sample)
        # Not by numpy.unique, which sorts all draws: 3.3 million of 128 samples with 200 predictions and 128 negatives.
        is_drawn = np.zeros(self.candidates.num_items + 1, bool)
        is_drawn[ids] = True
        return _Drawn(np.flatnonzero(is_drawn), (np.cumsum(is_drawn) - 1)[ids])

    def _audit(self, samples: Samples) -> Integers:
        files = np.searchsorted(self.file_begin, samples.rows, side="right") - 1
        return np.stack([files, samples.rows - self.file_begin[files], samples.numbers], axis=1)


def _all_in_the_first(count: int, *, num_bags: int) -> Integers:
    lengths = np.zeros(num_bags, np.int64)
    lengths[0] = count
    return lengths


def _fault_of(histories: Histories, row: int) -> Fault:
    faults = histories.faults
    return faults[-1] if -1 in faults else faults[row - histories.first_row]


@dataclass(frozen=True)
class _Drawn:
    """Items that are drawn at least once, and [M, negatives] the places of each prediction's among them."""

    items: Integers
    places: Integers


@dataclass(frozen=True)
class _Read:
    """What the model reads of the gathered events ([T]) and users ([S]), and what it is asked ([M])."""

    lengths: Integers
    num_targets: Integers
    events: dict[str, Integers]
    users: dict[str, Integers]
    query_timestamps: Integers
    labels: Integers
    labels_per_sample: Integers
    numbers: dict[str, Integers]
    """[M] each, by column, in bits."""


class _Gathered:
    """Stretches of events, sample after sample, out of several row groups; columns are copied one by one, once."""

    def __init__(
        self,
        samples: Samples,
        histories: Mapping[int, Histories],
        lengths: Integers,
        features: Mapping[str, FeatureConfig],
        numbers: tuple[str, ...],
        memory: Memory,
    ) -> None:
        """`lengths` [S] events of each sample, from its history_begin on; samples stand in the order of groups."""
        of_users = [name for name, feature in features.items() if feature.role == "user"]
        self.columns = ["items", "timestamps", "actions", *(name for name in features if name not in of_users)]
        self.columns += map(number_key, numbers)
        self.lengths, self._memory = lengths, memory
        self._is_long = bool(lengths.sum() >= _LONG * len(lengths) > 0)
        self._is_cut = False
        self._parts: list[tuple[Histories, Integers, Integers]] = []
        user_parts: dict[str, list[Integers]] = {name: [np.zeros(0, np.int64)] for name in of_users}
        for group, begin, end in _runs(samples.groups):
            source, part = histories[group], slice(begin, end)
            rows = samples.rows[part] - source.first_row
            self._parts.append((source, source.offsets[rows] + samples.slices.history_begin[part], lengths[part]))
            for name, parts in user_parts.items():
                parts.append(source.users[name][rows])
        self.users = {name: np.concatenate(parts) for name, parts in user_parts.items()}
        self._index = [] if self._is_long else [_ranges(begin, many) for _, begin, many in self._parts]

    def column(self, name: str) -> Integers:
        """The values of a column."""
        return self._gather([source.events[name] for source, _, _ in self._parts])

    def successors(self, name: str, values: Integers) -> Integers:
        """The values of the events that follow in the log; `values` are those of the events themselves.

        Every sample has events, and one follows its last.
        """
        if self._is_cut:
            return self._gather([source.events[name][1:] for source, _, _ in self._parts])
        # But for the last of each sample they are there already, warm and in one piece.
        successors = self._memory.empty(len(values))
        successors[:-1] = values[1:]
        following = [source.events[name][begin + lengths] for source, begin, lengths in self._parts]
        if following:
            successors[np.cumsum(self.lengths) - 1] = np.concatenate(following)
        return successors

    def _gather(self, sources: list[Integers]) -> Integers:
        """Out of a column of each part."""
        if self._is_long:
            return self._gather_long(sources)
        values = self._memory.empty(sum(len(index) for index in self._index))
        end = 0
        for source, index in zip(sources, self._index, strict=True):
            begin, end = end, end + len(index)
            # "clip" copies straight into `values`; "raise" would go through a buffer.
            np.take(source, index, out=values[begin:end], mode="clip")
        return values

    def _gather_long(self, sources: list[Integers]) -> Integers:
        """Sample by sample, each of them one copy of its memory, and the lock of the interpreter held: numpy would give
        it away for each, and wait for the other threads to have it back.
        """
        values = self._memory.empty(int(self.lengths.sum()))
        into, place = values.data, 0
        for source, (_, begin, lengths) in zip(sources, self._parts, strict=True):
            events = source.data
            for first, last in zip(begin.tolist(), (begin + lengths).tolist(), strict=True):
                end = place + last - first
                into[place:end] = events[first:last]
                place = end
        return values

    def keep(self, is_kept: npt.NDArray[np.bool_]) -> Integers:
        """Forget the other events; returns the new lengths of the samples, none of which loses all."""
        index = self._index or [_ranges(begin, many) for _, begin, many in self._parts]
        masks = np.split(is_kept, np.cumsum([len(each) for each in index])[:-1])
        self._index = [each[mask] for each, mask in zip(index, masks, strict=True)]
        self._is_long, self._is_cut = False, True
        self.lengths = np.add.reduceat(is_kept, np.cumsum(self.lengths) - self.lengths, dtype=np.int64)
        return self.lengths


def _is_earlier(times: Integers, lengths: Integers, num_targets: Integers) -> Booleans:
    """[E] which events are earlier in time than their sample's first target.

    Not the events of the target's own time: logs repeat a record under one timestamp, and the repetition in the history
    would hand the model the label (in KuaiRand-Pure, one exposure in 26, nine in ten with equal clicks).
    """
    return times < np.repeat(times[np.cumsum(lengths) - num_targets], lengths)


def _read_ranking(
    gathered: _Gathered,
    events: dict[str, Integers],
    num_targets: Integers,
    features: Mapping[str, FeatureConfig],
    numbers: tuple[str, ...],
) -> _Read:
    """The targets without what came of them, and before them the events of the history."""
    targets = _ranges(np.cumsum(gathered.lengths) - num_targets, num_targets)
    labels = events["actions"][targets]
    for name in ["actions", *(name for name, feature in features.items() if feature.role == "outcome")]:
        events[name][targets] = 0
    return _Read(
        lengths=gathered.lengths,
        num_targets=num_targets,
        events=events,
        users=gathered.users,
        query_timestamps=events["timestamps"],
        labels=labels,
        labels_per_sample=num_targets,
        numbers={name: events[number_key(name)][targets] for name in numbers},
    )


def _read_next_item(gathered: _Gathered, events: dict[str, Integers], split: Split) -> _Read:
    """Of each event that is read, what is asked is its successor in the log, whether or not that one is read too."""
    lengths, successors = gathered.lengths, gathered.successors("items", events["items"])
    return _Read(
        lengths=lengths,
        num_targets=np.zeros_like(lengths),
        events=events,
        users=gathered.users,
        query_timestamps=gathered.successors("timestamps", events["timestamps"]),
        labels=successors if split == "train" else successors[np.cumsum(lengths) - 1],
        labels_per_sample=lengths if split == "train" else np.ones_like(lengths),
        numbers={},
    )


def _runs(groups: Integers) -> list[tuple[int, int, int]]:
    """(group, begin, end) of each run of equal groups."""
    bounds = [*np.flatnonzero(np.diff(groups, prepend=-1)).tolist(), len(groups)]
    return [(int(groups[begin]), begin, end) for begin, end in itertools.pairwise(bounds)]


def _ranges(begin: Integers, lengths: Integers) -> Integers:
    """begin[0], begin[0] + 1, … (lengths[0] numbers), then the same from begin[1], and so on."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(begin - starts, lengths)


def _tensor(values: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
