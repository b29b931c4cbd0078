"""Synthetic interaction logs of any size from a seed, in which a better model can be told from a worse one.

The rule, for each user:

- The number of events is log-normal (`LENGTH_SIGMA`) around the mean, at least 1. Events come in sessions, of
  `EVENTS_PER_SESSION` on average, which start at uniform times of `DAYS` days.
- Item i of the catalogue belongs to category (i - 1) % C; inside its category its popularity is that of Zipf's law,
  with the rank (i - 1) // C + 1. C is about the square root of the catalogue.
- A user has a lasting interest, and a present one that a session replaces with probability `DRIFT`: categories, drawn
  by Zipf's law over the categories. An event's category is the present interest (`PRESENT`), else the lasting one
  (`LASTING`), else any by popularity.
- Let `recent` be the share of the event's category among the `NUM_RECENT` events before it, and `old` its share among
  the user's first `NUM_OLD` events (places without an earlier event count as another category). Then every action of
  `ACTIONS` happens on its own with probability sigmoid(bias + a * recent + b * old).

So `click` can be predicted from a short history, `share` only from one that reaches back to the user's beginning, and
`like` needs both. The probabilities depend on the past events' items alone, so the best possible prediction is known:
`_synth.json` has its normalised entropy (NE), over all events and over those from `split_time` on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import counted

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

START = 1_700_000_000_000  # milliseconds since 1970
DAYS = 30
MS_PER_DAY = 86_400_000
SPLIT_TIME = START + 27 * MS_PER_DAY
LENGTH_SIGMA = 1.0
EVENTS_PER_SESSION = 8
SECONDS_BETWEEN_EVENTS = 40
DRIFT = 0.25
PRESENT, LASTING = 0.6, 0.25
NUM_RECENT, NUM_OLD = 8, 16
ACTIONS = {"click": (-1.5, 3.0, 0.0), "like": (-3.5, 3.0, 3.0), "share": (-5.0, 0.0, 7.0)}
"""(bias, a, b) of each."""
MOST_CATEGORIES = 1024

SUMMARY_FILE = "_synth.json"  # readers of a folder of Parquet leave out what begins with _
EVENTS_PER_BLOCK = 1 << 20
"""A block of users has its own random numbers and its own file; the expected size bounds memory."""
SECONDS_BETWEEN_REPORTS = 5.0


@dataclass(frozen=True, kw_only=True)
class LogSpec:
    """How large a log to make."""

    users: int
    items: int
    events_per_user: float
    seed: int

    @property
    def num_categories(self) -> int:
        """C."""
        return min(max(round(self.items**0.5), 1), MOST_CATEGORIES)

    @property
    def users_per_block(self) -> int:
        """Depends on the mean only, so that no amount of memory or threads changes a file."""
        return max(1, min(self.users, int(EVENTS_PER_BLOCK / self.events_per_user)))

    @property
    def num_blocks(self) -> int:
        """Files."""
        return -(-self.users // self.users_per_block)


def write_log(spec: LogSpec, root: Path, *, report: Callable[[str], None] = lambda line: None) -> int:
    """Write part-*.parquet, one per block of users, and _synth.json to the new folder `root`; return the events.

    Columns: user_id, item_id, timestamp (milliseconds) int64, category int32, and a boolean for each action. A file is
    in the order of time. Memory holds one block.
    """
    root.mkdir(parents=True)
    everything, tested = _Oracle(), _Oracle()
    last = time.monotonic()
    for block in range(spec.num_blocks):
        events, probabilities = make_block(spec, block)
        pq.write_table(events, root / f"part-{block:05d}.parquet", compression="zstd")
        is_test = events["timestamp"].to_numpy() >= SPLIT_TIME
        labels = {name: events[name].to_numpy() for name in ACTIONS}
        everything.add(labels, probabilities)
        tested.add(
            {name: values[is_test] for name, values in labels.items()},
            {name: values[is_test] for name, values in probabilities.items()},
        )
        if time.monotonic() - last > SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            report(f"made: {counted(everything.events, 'event')}, {block + 1:,} of {spec.num_blocks:,} files")
    summary = {
        **dataclasses.asdict(spec),
        "num_categories": spec.num_categories,
        "events": everything.events,
        "split_time": SPLIT_TIME,
        "best_possible": {"all": everything.summary(), "from_split_time": tested.summary()},
    }
    (root / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    report(f"made: {counted(everything.events, 'event')} of {counted(spec.users, 'user')}")
    return everything.events


def make_block(spec: LogSpec, block: int) -> tuple[pa.Table, dict[str, Floats]]:
    """The events of one block of users in the order of time, and the probability of each action of each event."""
    random = np.random.default_rng((spec.seed, block))
    first_user = block * spec.users_per_block
    lengths = _lengths(random, min(spec.users_per_block, spec.users - first_user), spec.events_per_user)
    user = np.repeat(np.arange(len(lengths)), lengths)
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_new_session = random.random(len(user)) < 1 / EVENTS_PER_SESSION
    is_new_session[start] = True
    category = _categories(random, spec, user, is_new_session, start)
    item = 1 + category + spec.num_categories * _ranks(random, spec, category)
    timestamp = _times(random, user, is_new_session)
    probabilities = _probabilities(category, start)
    order = np.argsort(timestamp, kind="stable")
    columns: dict[str, npt.NDArray[np.generic]] = {
        "user_id": first_user + 1 + user,
        "item_id": item,
        "timestamp": timestamp,
        "category": category.astype(np.int32),
    }
    for name, probability in probabilities.items():
        columns[name] = random.random(len(user)) < probability
    table = pa.table({name: values[order] for name, values in columns.items()})
    return table, {name: probability[order] for name, probability in probabilities.items()}


def _lengths(random: np.random.Generator, num_users: int, mean: float) -> Integers:
    lengths = random.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, num_users)
    return np.maximum(np.rint(lengths), 1).astype(np.int64)


def _categories(
    random: np.random.Generator,
    spec: LogSpec,
    user: Integers,
    is_new_session: npt.NDArray[np.bool_],
    start: Integers,
) -> Integers:
    """[events] category of each event."""
    size, number = len(user), np.arange(len(user))
    changes = is_new_session & (random.random(size) < DRIFT)
    changes[start] = True
    drawn = _zipf(random.random(size), np.full(size, spec.num_categories))
    present = drawn[np.maximum.accumulate(np.where(changes, number, 0))]
    lasting = _zipf(random.random(int(user[-1]) + 1), np.full(int(user[-1]) + 1, spec.num_categories))[user]
    popular = _zipf(random.random(size), np.full(size, spec.num_categories))
    choice = random.random(size)
    return np.where(choice < PRESENT, present, np.where(choice < PRESENT + LASTING, lasting, popular))


def _ranks(random: np.random.Generator, spec: LogSpec, category: Integers) -> Integers:
    """[events] which item of its category, 0 for the most popular; the last categories may have one item less."""
    sizes = (spec.items - 1 - category) // spec.num_categories + 1
    return _zipf(random.random(len(category)), sizes)


def _zipf(uniform: Floats, sizes: Integers) -> Integers:
    """Ranks from 0 below `sizes`, rank r with about the weight 1 / (r + 1): the inverse of its smooth distribution."""
    return np.minimum(np.floor((sizes + 1.0) ** uniform).astype(np.int64), sizes) - 1


def _times(random: np.random.Generator, user: Integers, is_new_session: npt.NDArray[np.bool_]) -> Integers:
    """[events] milliseconds, strictly ascending inside each user."""
    session = np.cumsum(is_new_session) - 1
    begins = random.integers(0, DAYS * MS_PER_DAY, int(session[-1]) + 1)
    begins = begins[np.lexsort((begins, user[is_new_session]))]
    steps = np.cumsum(random.exponential(SECONDS_BETWEEN_EVENTS * 1000, len(user)).astype(np.int64) + 1)
    time_in_session = steps - steps[is_new_session][session]
    number = np.arange(len(user))
    # Long sessions may reach into the next one: times are pushed on, by a millisecond per event at least.
    apart = user * (1 << 40) - number
    return np.maximum.accumulate(begins[session] + time_in_session + apart) - apart + START


def _probabilities(category: Integers, start: Integers) -> dict[str, Floats]:
    """[events] of each action; `start` is where the events of an event's user begin."""
    size = len(category)
    place = np.arange(size) - start
    recent, old = np.zeros(size, np.int8), np.zeros(size, np.int8)
    for back in range(1, NUM_RECENT + 1):
        recent[back:] += (category[back:] == category[:-back]) & (place[back:] >= back)
    for early in range(NUM_OLD):
        old += (category == category[np.minimum(start + early, size - 1)]) & (place > early)
    shares = recent / NUM_RECENT, old / NUM_OLD
    return {name: 1 / (1 + np.exp(-(bias + a * shares[0] + b * shares[1]))) for name, (bias, a, b) in ACTIONS.items()}


class _Oracle:
    """Cross entropy of the true probabilities, and the entropy of the base rate, of each action."""

    def __init__(self) -> None:
        self.events = 0
        self._positives = dict.fromkeys(ACTIONS, 0)
        self._loss = dict.fromkeys(ACTIONS, 0.0)

    def add(self, labels: dict[str, npt.NDArray[np.bool_]], probabilities: dict[str, Floats]) -> None:
        """Count these events."""
        self.events += len(next(iter(labels.values())))
        for name, label in labels.items():
            self._positives[name] += int(label.sum())
            probability = probabilities[name]
            self._loss[name] -= float(np.log(np.where(label, probability, 1 - probability)).sum())

    def summary(self) -> dict[str, dict[str, float]]:
        """{action: base rate and NE}, the latter as `ultrarec evaluate` computes it: 1 knows the base rate only."""
        result = {}
        for name, positives in self._positives.items():
            rate = positives / max(self.events, 1)
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) if 0 < rate < 1 else 0.0
            ne = self._loss[name] / self.events / entropy if entropy else 1.0
            result[name] = {"base_rate": round(rate, 6), "ne": round(float(ne), 6)}
        return result
