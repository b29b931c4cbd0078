"""Batches and embeddings for the model's tests, made from a seed without any file."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ultrarec.data.batch import Batch
from ultrarec.data.config import FeatureConfig
from ultrarec.data.order import LoaderState

NUM_ITEMS = 30
NUM_HASHED = 7
START = 1_650_000_000
ACTIONS = ("is_click", "is_like", "long_view")
FEATURES = {
    "tab": FeatureConfig(kind="category", role="event", num_values=5),
    "duration": FeatureConfig(kind="bucket", role="event", num_values=8),
    "author": FeatureConfig(kind="hash", role="event", num_values=NUM_HASHED),
    "play_time": FeatureConfig(kind="bucket", role="outcome", num_values=6),
    "user_id": FeatureConfig(kind="hash", role="user", num_values=NUM_HASHED),
    "age": FeatureConfig(kind="category", role="user", num_values=4),
}


@dataclass
class Sample:
    """One user's events as plain tensors, the form in which tests read and change them."""

    items: Tensor
    timestamps: Tensor
    query_timestamps: Tensor
    actions: Tensor
    tab: Tensor
    duration: Tensor
    author: Tensor
    play_time: Tensor
    num_targets: int
    user_id: int
    age: int
    labels: Tensor

    @property
    def length(self) -> int:
        return len(self.items)


def _random_sample(length: int, num_targets: int, seed: int, *, next_item: bool = False) -> Sample:
    """A sample of `length` events, the last `num_targets` of which are targets."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int = length) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    times = START + integers(0, 50_000, length + 1).cumsum(0)
    is_target = torch.arange(length) >= length - num_targets
    return Sample(
        items=integers(0, NUM_ITEMS + 1),
        timestamps=times[:length],
        query_timestamps=times[1:] if next_item else times[:length],
        actions=integers(0, 2 ** len(ACTIONS)).masked_fill(is_target, 0),
        tab=integers(0, 6),
        duration=integers(0, 9),
        author=integers(0, NUM_HASHED + 1),
        play_time=integers(0, 7).masked_fill(is_target, 0),
        num_targets=num_targets,
        user_id=int(integers(1, NUM_HASHED + 1, 1)),
        age=int(integers(0, 5, 1)),
        labels=integers(1, NUM_ITEMS + 1) if next_item else integers(0, 2 ** len(ACTIONS), num_targets),
    )


def _collate(
    samples: list[Sample], candidates: Tensor | None = None, *, sampled: bool = False, per_sample: bool = False
) -> Batch:
    """The batch of these samples; the ids of candidates and positives stand last, as the loader writes them.

    With `per_sample` every sample has the candidates.
    """
    lengths = torch.tensor([sample.length for sample in samples])
    bags = {
        "item": (torch.cat([sample.items for sample in samples]), lengths),
        "author": (torch.cat([sample.author for sample in samples]), lengths),
        "user_id": (torch.tensor([sample.user_id for sample in samples]), torch.ones_like(lengths)),
    }
    labels = torch.cat([sample.labels for sample in samples])
    labels_per_sample = torch.tensor([len(sample.labels) for sample in samples])
    if sampled:
        bags["positive"] = (labels, labels_per_sample)
    if candidates is not None:
        bags["candidate"] = (candidates, torch.tensor([len(candidates)] + [0] * (len(samples) - 1)))
        if per_sample:
            bags["candidate"] = (candidates.repeat(len(samples)), torch.full_like(lengths, len(candidates)))
    return Batch(
        ids=KeyedJaggedTensor.from_lengths_sync(
            list(bags), torch.cat([ids for ids, _ in bags.values()]), torch.cat([count for _, count in bags.values()])
        ),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        num_targets=torch.tensor([sample.num_targets for sample in samples]),
        timestamps=torch.cat([sample.timestamps for sample in samples]),
        query_timestamps=torch.cat([sample.query_timestamps for sample in samples]),
        actions=torch.cat([sample.actions for sample in samples]),
        features={
            "tab": torch.cat([sample.tab for sample in samples]),
            "duration": torch.cat([sample.duration for sample in samples]),
            "play_time": torch.cat([sample.play_time for sample in samples]),
            "age": torch.tensor([sample.age for sample in samples]),
        },
        labels=labels,
        users=torch.repeat_interleave(torch.arange(len(samples)), labels_per_sample),
        num_labels=len(labels),
        epoch=0,
        samples=torch.zeros(len(samples), 3, dtype=torch.int64),
        skipped=(),
        state=LoaderState(),
    )


@dataclass
class Tables:
    """The sharded tables' part: rows looked up from dense stand-ins, which gradients reach."""

    item: Tensor
    author: Tensor
    user_id: Tensor

    def look_up(self, batch: Batch) -> dict[str, Tensor]:
        rows = {"positive": self.item, "candidate": self.item, **vars(self)}
        return {key: rows[key][batch.ids[key].values()] for key in batch.ids.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture
def features() -> dict[str, FeatureConfig]:
    return FEATURES


@pytest.fixture
def actions() -> tuple[str, ...]:
    return ACTIONS


@pytest.fixture
def random_sample() -> Callable[..., Sample]:
    return _random_sample


@pytest.fixture
def collate() -> Callable[..., Batch]:
    return _collate


@pytest.fixture
def tables() -> Callable[..., Tables]:
    """Makes tables of a width and dtype, as leaves of the graph."""

    def make(dim: int, dtype: torch.dtype = torch.float64) -> Tables:
        generator = torch.Generator().manual_seed(7)

        def rows(count: int) -> Tensor:
            return torch.randn(count, dim, generator=generator, dtype=dtype).requires_grad_()

        return Tables(item=rows(NUM_ITEMS + 1), author=rows(NUM_HASHED + 1), user_id=rows(NUM_HASHED + 1))

    return make


# History alone, a chunk of targets, a target without history, a user without anything, a long history.
SHAPES = [(4, 0), (6, 3), (1, 1), (0, 0), (13, 1), (3, 3)]


@pytest.fixture
def samples(random_sample):
    return [random_sample(length, targets, seed) for seed, (length, targets) in enumerate(SHAPES)]


@pytest.fixture
def walks(random_sample):
    """Samples of next_item training."""
    return [random_sample(length, 0, seed, next_item=True) for seed, length in enumerate([4, 12, 1, 0, 7])]
