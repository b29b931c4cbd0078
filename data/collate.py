"""From samples and the histories they are cut from to a `Batch`, without a loop over samples.

Legend: S = samples of this rank, B = max(S, 1), E = events of all samples from history_begin to target_end,
T = those of them that the model reads, M = labels.
"""

from __future__ import annotations

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
from .order import Samples, Step
from .reader import Histories
from .samples import Candidates, Integers, NextItemSampler, RankingSampler, Sampler, Split


@dataclass(frozen=True)
class Collator:
    """How samples become batches; the same for every step of a loader."""

    sampler: Sampler
    split: Split
    features: Mapping[str, FeatureConfig]
    candidates: Candidates | None
    file_begin: Integers
    """First row of each file, and the number of all rows."""
    seed: int

    def __post_init__(self) -> None:
        for name in {"item", "positive", "candidate"}.intersection(self.features):
            raise UserError(
                f"data.features.{name}: {name!r} is the name of a lookup of items; "
                "prepare the dataset with another name for this column"
            )

    def batch(self, step: Step, samples: Samples, windows: Mapping[int, Histories]) -> Batch:
        """The batch of the rank that was dealt `samples` of `step`; `windows` holds every window they are read in."""
        gathered = _gather(samples, windows, self.features)
        if isinstance(self.sampler, RankingSampler):
            read = _read_ranking(gathered, samples, self.features)
        else:
            read = _read_next_item(gathered, samples, self.sampler, self.split)
        lengths = read.lengths if len(samples) else np.zeros(1, np.int64)
        return Batch(
            ids=self._ids(step, lengths, read, gathered.users),
            offsets=_tensor(np.concatenate([[0], np.cumsum(lengths)])),
            num_targets=_tensor(read.num_targets if len(samples) else lengths),
            timestamps=_tensor(read.events["timestamps"]),
            query_timestamps=_tensor(read.query_timestamps),
            actions=_tensor(read.events["actions"]),
            features={k: _tensor(v) for k, v in self._feature_ids(read, gathered.users, hashed=False).items()},
            labels=_tensor(read.labels),
            users=_tensor(np.repeat(samples.rows, read.labels_per_sample)),
            num_labels=self.sampler.num_labels(step.samples.slices, self.split),
            epoch=step.epoch,
            samples=_tensor(self._audit(samples)),
            state=step.state,
        )

    def _feature_ids(self, read: _Read, users: Mapping[str, Integers], *, hashed: bool) -> dict[str, Integers]:
        """Ids of the features that are looked up in sharded tables, or of the others: [T] of events, [B] of users."""
        ids = {}
        for name, feature in self.features.items():
            if (feature.kind == "hash") == hashed:
                ids[name] = read.events[name] if feature.role != "user" else users[name]
                if feature.role == "user" and not len(ids[name]):
                    ids[name] = np.zeros(1, np.int64)
        return ids

    def _ids(self, step: Step, lengths: Integers, read: _Read, users: Mapping[str, Integers]) -> KeyedJaggedTensor:
        bags = {"item": (read.events["items"], lengths)}
        for name, ids in self._feature_ids(read, users, hashed=True).items():
            bags[name] = (ids, np.ones_like(lengths) if self.features[name].role == "user" else lengths)
        if self.candidates is not None:
            if self.candidates.kind == "sampled":
                bags["positive"] = (read.labels, read.labels_per_sample if len(read.labels) else lengths)
            ids = self._candidate_ids(step, self.candidates)
            bags["candidate"] = (ids, np.concatenate([[len(ids)], np.zeros_like(lengths[1:])]))
        values, bag_lengths = (np.concatenate(parts) for parts in zip(*bags.values(), strict=True))
        return KeyedJaggedTensor.from_lengths_sync(list(bags), _tensor(values), _tensor(bag_lengths))

    def _candidate_ids(self, step: Step, candidates: Candidates) -> Integers:
        """The ids of a training step; evaluation compares with none, but has the key, as every batch does."""
        if self.split != "train":
            return np.zeros(0, np.int64)
        return candidates.ids(seed=self.seed, epoch=step.epoch, first_sample=step.first_sample)

    def _audit(self, samples: Samples) -> Integers:
        files = np.searchsorted(self.file_begin, samples.rows, side="right") - 1
        return np.stack([files, samples.rows - self.file_begin[files], samples.numbers], axis=1)


@dataclass(frozen=True)
class _Gathered:
    """[E] events, each sample's from history_begin to target_end, and [S] user feature ids."""

    lengths: Integers
    events: dict[str, Integers]
    users: dict[str, Integers]


@dataclass(frozen=True)
class _Read:
    """What the model reads of the gathered events ([T]), and what it is asked ([M])."""

    lengths: Integers
    num_targets: Integers
    events: dict[str, Integers]
    query_timestamps: Integers
    labels: Integers
    labels_per_sample: Integers


def _gather(samples: Samples, windows: Mapping[int, Histories], features: Mapping[str, FeatureConfig]) -> _Gathered:
    lengths = samples.slices.target_end - samples.slices.history_begin
    of_users = [name for name, feature in features.items() if feature.role == "user"]
    of_events = ["items", "timestamps", "actions", *(name for name in features if name not in of_users)]
    event_parts: dict[str, list[Integers]] = {name: [np.zeros(0, np.int64)] for name in of_events}
    user_parts: dict[str, list[Integers]] = {name: [np.zeros(0, np.int64)] for name in of_users}
    # Samples stand in the order of their windows, so that the windows' parts, one after the other, are in their order.
    for window in np.unique(samples.windows).tolist():
        inside = samples.windows == window
        histories = windows[window]
        places = histories.positions(samples.rows[inside])
        index = _ranges(histories.offsets[places] + samples.slices.history_begin[inside], lengths[inside])
        for name, parts in event_parts.items():
            parts.append(histories.events[name][index])
        for name, parts in user_parts.items():
            parts.append(histories.users[name][places])
    events = {name: np.concatenate(parts) for name, parts in event_parts.items()}
    return _Gathered(lengths, events, {name: np.concatenate(parts) for name, parts in user_parts.items()})


def _read_ranking(gathered: _Gathered, samples: Samples, features: Mapping[str, FeatureConfig]) -> _Read:
    """The targets without what came of them, and before them the events that are earlier in time."""
    num_targets = samples.slices.target_end - samples.slices.target_begin
    is_target = np.zeros(int(gathered.lengths.sum()), bool)
    first_target = np.cumsum(gathered.lengths) - num_targets
    is_target[_ranges(first_target, num_targets)] = True
    # Not the events of the target's own time: logs repeat a record under one timestamp, and the repetition in the
    # history would hand the model the label (in KuaiRand-Pure, one exposure in 26, nine in ten with equal clicks).
    times = gathered.events["timestamps"]
    is_read = is_target | (times < np.repeat(times[first_target], gathered.lengths))
    outcomes = ["actions", *(name for name, feature in features.items() if feature.role == "outcome")]
    hidden = {name: np.where(is_target, 0, gathered.events[name]) for name in outcomes}
    return _Read(
        lengths=np.add.reduceat(is_read, np.cumsum(gathered.lengths) - gathered.lengths, dtype=np.int64),
        num_targets=num_targets,
        events={name: values[is_read] for name, values in {**gathered.events, **hidden}.items()},
        query_timestamps=times[is_read],
        labels=gathered.events["actions"][is_target],
        labels_per_sample=num_targets,
    )


def _read_next_item(gathered: _Gathered, samples: Samples, sampler: NextItemSampler, split: Split) -> _Read:
    """All events but each sample's last are read; what is asked of each is its successor."""
    lengths = sampler.num_tokens(samples.slices)
    ends = np.cumsum(gathered.lengths)
    is_read = np.ones(int(gathered.lengths.sum()), bool)
    is_read[ends - 1] = False
    follows = np.ones_like(is_read)
    follows[ends - gathered.lengths] = False
    items = gathered.events["items"]
    return _Read(
        lengths=lengths,
        num_targets=np.zeros_like(lengths),
        events={name: values[is_read] for name, values in gathered.events.items()},
        query_timestamps=gathered.events["timestamps"][follows],
        labels=items[follows] if split == "train" else items[ends - 1],
        labels_per_sample=lengths if split == "train" else np.ones_like(lengths),
    )


def _ranges(begin: Integers, lengths: Integers) -> Integers:
    """begin[0], begin[0] + 1, … (lengths[0] numbers), then the same from begin[1], and so on."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(begin - starts, lengths)


def _tensor(values: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
