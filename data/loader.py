"""The batches of one rank, prepared ahead in background threads."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from .batch import Batch
from .collate import Collator
from .config import DataConfig
from .cost import CostModel
from .deal import Loads, deal, loads_of
from .errors import UserError
from .faults import Fault, NothingLeftError
from .locations import shown
from .memory import Memory
from .order import LoaderState, Order, Samples, Step, StepSize
from .prefetch import Prefetcher
from .reader import Histories, Reader
from .samples import Candidates, NextItemSampler, RankingSampler, Sampler, Split
from .stochastic_length import StochasticLength
from .storage import Storage, load_dataset

__all__ = ["Candidates", "CostModel", "Loader", "LoaderState", "NextItemSampler", "RankingSampler", "Sampler", "Split"]

_BEGINNING = LoaderState()
_PLANNED = 32
"""Steps that are dealt before they are due: row groups of the next window are decoded one per step meanwhile, not all
when it begins, which would make the step that begins it wait."""


class Loader:
    """One rank's batches of a split, from `state` to the end of epoch number `epochs` - 1 (None: without end).

    All ranks together read each sample of an epoch exactly once, in the same steps on every world size, and every
    rank takes part in every step. Training is shuffled, sized by `batch_rows`, `batch_tokens` or `batch_cost`, and cut
    by `stochastic_length`; validation and test have a fixed order and take `evaluate_rows`. A step is dealt to the
    ranks by `cost_model`, by default by tokens. Each `iter()` begins at `state` again. A rank decodes its share of the
    row groups, in `threads` threads, and holds that of one window, and of the next as far as it is due.

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
        cost_model: CostModel | None = None,
        numbers: Sequence[str] = (),
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._epochs, self._state = epochs, state
        self._config, self._pin_memory = config, pin_memory
        self._name = f"ultrarec-loader-{split}"
        self._running: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()
        self._storage, memory = Storage(config.path, retry_seconds=config.retry_seconds), Memory()
        self._reader = Reader(
            load_dataset(config.path, retry_seconds=config.retry_seconds),
            config.features,
            storage=self._storage,
            memory=memory,
            bad_data=config.bad_data,
            numbers=numbers,
        )
        stochastic_length = stochastic_length_of(config, sampler) if split == "train" else None
        self._order = _order(config, sampler, split, self._reader, cost_model, stochastic_length)
        self._collator = Collator(
            sampler,
            split,
            config.features,
            candidates,
            stochastic_length,
            file_begin=self._reader.file_begin,
            seed=config.seed,
            memory=memory,
            numbers=tuple(numbers),
        )
        self._check(config.path, split)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self._order.num_samples

    @property
    def faults(self) -> list[Fault]:
        """What opening the dataset found damaged, and left out; the same on every rank."""
        return self._reader.faults

    def num_steps(self, epochs: int, *, per_update: int = 1) -> int:
        """Updates in the first `epochs` epochs, of `per_update` batches each, fewer at the end of an epoch.

        With `batch_tokens` or `batch_cost`, and more than a quarter of a million samples, an estimate.
        """
        return self._order.num_steps(epochs, per_update=per_update)

    def __iter__(self) -> Iterator[Batch]:
        ahead = Prefetcher(self._batches(), 1, self._name)
        self._running.add(ahead)
        return ahead

    def close(self) -> None:
        """End the background threads, also those that wait for storage; iterators still in use stop."""
        self._storage.close()
        for ahead in list(self._running):
            ahead.close()

    def _batches(self) -> Generator[Batch, None, None]:
        """The batches, `threads + prefetch` of them in work or done."""
        # Those done wait in line with those in work. With a line of threads + 1, and those done elsewhere, threads ran
        # out of work while the batch due next was not done: 7% to 9% fewer events per second in three comparisons of
        # four, on two noisy cores.
        ahead = self._config.threads + self._config.prefetch
        pool = ThreadPoolExecutor(self._config.threads, thread_name_prefix=f"{self._name}-worker")
        shelf = _Shelf(self._reader, pool)
        planned, in_work = deque[_Share](), deque[tuple[_Share, "Future[Batch]"]]()
        plan = self._plan()
        try:
            while True:
                for share in plan:
                    planned.append(share)
                    shelf.expect(share)
                    if len(planned) == _PLANNED:
                        break
                if planned:
                    share = planned.popleft()
                    in_work.append((share, pool.submit(self._batch, share, shelf.groups_of(share))))
                    shelf.decode_next()
                if not in_work:
                    return
                if len(in_work) == ahead or not planned:
                    share, batch = in_work.popleft()
                    yield batch.result()
                    shelf.forget_before(share)
        finally:
            pool.shutdown(cancel_futures=True)

    def _plan(self) -> Iterator[_Share]:
        epoch, consumed = self._state.epoch, self._state.consumed
        while self.num_samples and (self._epochs is None or epoch < self._epochs):
            for step in self._order.steps(epoch, consumed):
                yield self._share(step)
            epoch, consumed = epoch + 1, 0

    def _share(self, step: Step) -> _Share:
        samples = step.samples
        ranks = deal(samples.places, samples.costs, self._world_size)
        mine = np.flatnonzero(ranks == self._rank)
        by_group = np.lexsort((samples.groups[mine], samples.windows[mine]))
        return _Share(
            # Without the samples of all ranks: many steps are planned ahead.
            step=replace(step, samples=samples.take(slice(0))),
            first_window=int(samples.windows[0]),
            num_labels=self._order.sampler.num_labels(samples.slices, self._order.split),
            loads=loads_of(ranks, samples.costs, self._world_size),
            samples=samples.take(mine[by_group]),
        )

    def _batch(self, share: _Share, groups: dict[int, Future[Histories]]) -> Batch:
        # The pool takes tasks in the order of their submission, so none of these waits for a task behind this one.
        histories = {group: decoded.result() for group, decoded in groups.items()}
        batch = self._collator.batch(share.step, share.num_labels, share.samples, histories)
        batch.loads = share.loads
        return batch.pin_memory() if self._pin_memory else batch

    def _check(self, path: str, split: Split) -> None:
        if split == "train" and not self.num_samples and self.faults:
            raise NothingLeftError.of(shown(path), self.faults, num_rows=int(self._reader.file_begin[-1]))
        if split == "train" and not self.num_samples:
            raise UserError(
                f"data.path={shown(path)}: no user has enough training events for a sample; "
                "prepare the dataset with a later split or lower minimum counts"
            )
        if self._state.consumed > self.num_samples:
            raise UserError(
                f"the run stopped after {self._state.consumed} samples of an epoch, but data.path={shown(path)} gives "
                f"{self.num_samples}; resume with the dataset and the data settings that the run began with"
            )


@dataclass(frozen=True)
class _Share:
    """What this rank does in a step."""

    step: Step
    first_window: int
    """The oldest window that any rank reads in this step."""
    num_labels: int
    """Of all ranks."""
    loads: Loads
    samples: Samples

    @property
    def window(self) -> tuple[int, int]:
        """(epoch, window), which grows from step to step."""
        return self.step.epoch, self.first_window


class _Shelf:
    """Row groups that this rank will need, is decoding, or holds until their window is over."""

    def __init__(self, reader: Reader, pool: ThreadPoolExecutor) -> None:
        self._reader, self._pool = reader, pool
        self._expected: dict[tuple[int, int, int], None] = {}
        self._decoded: dict[tuple[int, int, int], Future[Histories]] = {}

    def expect(self, share: _Share) -> None:
        """The row groups of a step that will come."""
        for key in self._keys(share):
            if key not in self._decoded:
                self._expected.setdefault(key)

    def decode_next(self) -> None:
        """Begin with the row group that is expected first."""
        if self._expected:
            self._decode(next(iter(self._expected)))

    def groups_of(self, share: _Share) -> dict[int, Future[Histories]]:
        """The row groups of a step that is due; begins with those that have not been begun."""
        for key in self._keys(share):
            if key not in self._decoded:
                self._decode(key)
        return {key[2]: self._decoded[key] for key in self._keys(share)}

    def forget_before(self, share: _Share) -> None:
        """Drop the row groups of windows that are over when this step is done."""
        for key in [key for key in self._decoded if key[:2] < share.window]:
            del self._decoded[key]

    def _decode(self, key: tuple[int, int, int]) -> None:
        self._expected.pop(key, None)
        self._decoded[key] = self._pool.submit(self._reader.read, key[2])

    def _keys(self, share: _Share) -> list[tuple[int, int, int]]:
        """(epoch, window, row group) of every row group of a step."""
        pairs = np.unique(np.stack([share.samples.windows, share.samples.groups]), axis=1).T.tolist()
        return [(share.step.epoch, window, group) for window, group in pairs]


def stochastic_length_of(config: DataConfig, sampler: Sampler) -> StochasticLength | None:
    """What cuts the histories of training samples; None if nothing does."""
    if config.stochastic_length is None:
        return None
    return StochasticLength(max_history=sampler.max_history, seed=config.seed, **config.stochastic_length.model_dump())


def _order(
    config: DataConfig,
    sampler: Sampler,
    split: Split,
    reader: Reader,
    cost_model: CostModel | None,
    stochastic_length: StochasticLength | None,
) -> Order:
    is_training = split == "train"
    return Order(
        counts_of=reader.counts_of,
        group_begin=reader.group_begin,
        group_samples=reader.num_samples(sampler, split),
        sampler=sampler,
        split=split,
        step_size=_training_size(config) if is_training else StepSize("rows", config.evaluate_rows),
        cost_model=cost_model or CostModel.of_tokens_alone(sampler.max_history),
        stochastic_length=stochastic_length,
        shuffle=is_training,
        groups_per_window=config.shuffle_row_groups,
        seed=config.seed,
        balance_for=config.balance_for,
    )


def _training_size(config: DataConfig) -> StepSize:
    if config.batch_rows is not None:
        return StepSize("rows", config.batch_rows)
    if config.batch_tokens is not None:
        return StepSize("tokens", config.batch_tokens)
    assert config.batch_cost is not None
    return StepSize("cost", config.batch_cost)
