"""The batches of one rank, prepared ahead in a background thread."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np

from .batch import Batch
from .collate import Collator
from .config import DataConfig
from .errors import UserError
from .order import LoaderState, Order, Step, StepSize, deal
from .prefetch import Prefetcher
from .reader import Histories, Reader
from .samples import Candidates, NextItemSampler, RankingSampler, Sampler, Split
from .schema import DatasetInfo

__all__ = ["Candidates", "Loader", "LoaderState", "NextItemSampler", "RankingSampler", "Sampler", "Split"]

_BEGINNING = LoaderState()


class Loader:
    """One rank's batches of a split, from `state` to the end of epoch number `epochs` - 1 (None: without end).

    All ranks together read each sample of an epoch exactly once, in the same steps on every world size, and every
    rank takes part in every step. Training is shuffled and sized by `batch_rows` or `batch_tokens`; validation and
    test keep the order of the dataset and take `evaluate_rows`. Each `iter()` begins at `state` again.

    Raises UserError for a dataset or features that cannot be read, a split without samples to train on, and a state
    beyond the epoch's end.
    """

    def __init__(
        self,
        config: DataConfig,
        sampler: Sampler,
        *,
        split: Split,
        rank: int,
        world_size: int,
        epochs: int | None,
        state: LoaderState = _BEGINNING,
        pin_memory: bool = False,
        candidates: Candidates | None = None,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._epochs, self._state = epochs, state
        self._pin_memory, self._prefetch = pin_memory, config.prefetch
        self._name = f"ultrarec-loader-{split}"
        self._running: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()
        self._reader = Reader(DatasetInfo.load(config.path), config.features)
        self._order = _order(config, sampler, split, self._reader)
        self._collator = Collator(
            sampler, split, config.features, candidates, file_begin=self._reader.file_begin, seed=config.seed
        )
        self._check(config.path, split)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self._order.num_samples

    def steps_per_epoch(self, epoch: int) -> int:
        """Steps of a whole epoch; with `batch_tokens` they depend on the epoch's order, and are counted."""
        return self._order.num_steps(epoch)

    def __iter__(self) -> Iterator[Batch]:
        ahead = Prefetcher(self._batches(), self._prefetch, self._name)
        self._running.add(ahead)
        return ahead

    def close(self) -> None:
        """End the background threads; iterators still in use stop."""
        for ahead in list(self._running):
            ahead.close()

    def _batches(self) -> Iterator[Batch]:
        epoch, consumed = self._state.epoch, self._state.consumed
        while self.num_samples and (self._epochs is None or epoch < self._epochs):
            groups = self._order.windows(epoch)
            windows: dict[int, Histories] = {}
            for step in self._order.steps(epoch, consumed):
                first, last = int(step.samples.windows[0]), int(step.samples.windows[-1])
                for window in [window for window in windows if window < first]:
                    del windows[window]
                for window in range(first, last + 1):
                    if window not in windows:
                        windows[window] = self._reader.read(groups[window])
                yield self._batch(step, windows)
            epoch, consumed = epoch + 1, 0

    def _batch(self, step: Step, windows: dict[int, Histories]) -> Batch:
        ranks = deal(self._order.sampler.num_tokens(step.samples.slices), self._world_size)
        mine = step.samples.take(np.flatnonzero(ranks == self._rank))
        batch = self._collator.batch(step, mine, windows)
        return batch.pin_memory() if self._pin_memory else batch

    def _check(self, path: str, split: Split) -> None:
        if split == "train" and not self.num_samples:
            raise UserError(
                f"data.path={path}: no user has enough training events for a sample; "
                "prepare the dataset with a later split or lower minimum counts"
            )
        if self._state.consumed > self.num_samples:
            raise UserError(
                f"the run stopped after {self._state.consumed} samples of an epoch, but data.path={path} gives "
                f"{self.num_samples}; resume with the dataset and the data settings that the run began with"
            )


def _order(config: DataConfig, sampler: Sampler, split: Split, reader: Reader) -> Order:
    is_training = split == "train"
    training_size = StepSize(config.batch_rows, config.batch_tokens)
    return Order(
        counts=reader.counts,
        group_begin=reader.group_begin,
        sampler=sampler,
        split=split,
        step_size=training_size if is_training else StepSize(config.evaluate_rows, None),
        shuffle=is_training,
        groups_per_window=config.shuffle_row_groups if is_training else 1,
        seed=config.seed,
    )
