"""How fast batches come out of a prepared dataset, against pyarrow reading the same columns of the same files."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .config import DataConfig
from .deal import NO_LOADS
from .errors import UserError, first_line
from .loader import Loader
from .preparation.writing import HistoryWriter
from .reader import EVENT_COLUMNS
from .samples import NextItemSampler
from .schema import (
    ITEMS_FILE,
    Counts,
    DatasetInfo,
    Roles,
    Split,
    Vocabulary,
    file_sha256,
)

LONGEST_HISTORY = 2**20
EVENTS_PER_ROW_GROUP = 1 << 19
NUM_ITEMS = 1_000_000


@dataclass(frozen=True)
class Turn:
    """Events that were read once, and how long that took."""

    events: int
    seconds: float

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


@dataclass(frozen=True)
class Figures:
    """What one rank measured, or all together. First turns take fresh memory, the others reuse it."""

    scan: Sequence[Turn]
    """Of the bare scan of the rank's share of the row groups."""
    loader: Sequence[Turn]
    """Of the rank's batches, epoch by epoch."""
    resident_bytes: int
    """Of the process before the loader was made: mostly libraries."""
    peak_bytes: int
    """Largest while the loader ran."""
    imbalance: float
    """Largest load of a rank over the mean, over all steps."""

    @property
    def first_share(self) -> float:
        """Of the scan's rate, both in fresh memory."""
        return self.loader[0].rate / self.scan[0].rate

    @property
    def share(self) -> float:
        """Of the scan's rate, both in memory in use; medians."""
        return usual(self.loader) / usual(self.scan)


def usual(turns: Sequence[Turn]) -> float:
    """Median rate of the turns after the first."""
    return statistics.median(turn.rate for turn in turns[1:])


def together(ranks: Sequence[Figures]) -> Figures:
    """All ranks, each turn as long as that of the slowest."""

    def joined(turns_of: Callable[[Figures], Sequence[Turn]]) -> list[Turn]:
        turns = zip(*map(turns_of, ranks), strict=True)
        return [Turn(sum(each.events for each in turn), max(each.seconds for each in turn)) for turn in turns]

    return Figures(
        scan=joined(lambda figures: figures.scan),
        loader=joined(lambda figures: figures.loader),
        resident_bytes=sum(figures.resident_bytes for figures in ranks),
        peak_bytes=sum(figures.peak_bytes for figures in ranks),
        imbalance=ranks[0].imbalance,
    )


def measure(root: Path, *, ranks: int, threads: int, batch_tokens: int, turns: int) -> list[Figures]:
    """What each of `ranks` fresh processes measures, all at once: 1 + `turns` scans, then as many epochs.

    They are forked from one process that has imported everything and run nothing. Raises UserError for a file that
    cannot be read.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Manager() as manager, ProcessPoolExecutor(ranks, context) as pool:
        config = DataConfig(path=str(root), batch_tokens=batch_tokens, threads=threads)
        work = partial(_measure_rank, config, ranks, 1 + turns, manager.Barrier(ranks))
        measured = [pool.submit(work, rank) for rank in range(ranks)]
        return _results(measured)


def _results(ranks: Sequence[Future[Figures]]) -> list[Figures]:
    """Of all ranks; if one has failed, its error, and not that of those that waited for it."""
    wait(ranks)
    errors = [error for rank in ranks if (error := rank.exception())]
    causes = [error for error in errors if not isinstance(error, BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return [rank.result() for rank in ranks]


def _measure_rank(config: DataConfig, ranks: int, turns: int, barrier: Barrier, rank: int) -> Figures:
    """`barrier` is where the ranks wait for each other."""
    threads = config.threads
    try:
        pa.set_cpu_count(threads)
        places = _row_groups(config.path)[rank::ranks]
        ways = [_timed_scans(partial(scan, places, threads), turns, barrier) for scan in (_scan_spread, _scan)]
        # Only the first of all is in fresh memory.
        best = max(ways, key=usual)
        resident = _memory("VmRSS")
        _forget_peak()
        barrier.wait()
        loader, imbalance = _epochs(config, rank=rank, world_size=ranks, number=turns)
        return Figures([ways[0][0], *best[1:]], loader, resident, _memory("VmHWM"), imbalance)
    except BaseException:
        barrier.abort()  # or the others would wait for ever
        raise


def _epochs(config: DataConfig, *, rank: int, world_size: int, number: int) -> tuple[list[Turn], float]:
    """Each of the first epochs, and the imbalance of all of them."""
    sampler = NextItemSampler(LONGEST_HISTORY)
    turns, events, loads, begin = [], 0, NO_LOADS, time.perf_counter()
    # Without end: the last epoch of a loader decodes no window ahead, a third of the work on 48 row groups.
    for batch in Loader(config, sampler, split="train", rank=rank, world_size=world_size, epochs=None):
        events, loads = events + batch.timestamps.numel(), loads + batch.loads
        if batch.state.consumed == 0:
            now = time.perf_counter()
            turns.append(Turn(events, now - begin))
            events, begin = 0, now
        if len(turns) == number:
            break
    return turns, loads.largest / loads.mean


Places = list[tuple[Path, int]]
"""Row groups, each by file and number."""


def _row_groups(path: str) -> Places:
    files = DatasetInfo.load(path).history_paths
    return [(file, group) for file in files for group in range(_num_row_groups_of(file))]


def _num_row_groups_of(file: Path) -> int:
    try:
        return pq.read_metadata(file).num_row_groups
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read ({first_line(error)}); restore it, or prepare the dataset again"
        ) from error


def num_row_groups(root: Path) -> int:
    """How many row groups a dataset has. Raises UserError if it is none, or has a file without a whole footer."""
    return len(_row_groups(str(root)))


def _timed_scans(scan: Callable[[], Iterator[int]], number: int, barrier: Barrier) -> list[Turn]:
    turns = []
    for _ in range(number):
        barrier.wait()
        begin = time.perf_counter()
        events = sum(scan())
        turns.append(Turn(events, time.perf_counter() - begin))
    return turns


def _scan(places: Places, threads: int) -> Iterator[int]:
    """Events of each row group, columns spread over pyarrow's threads."""
    del threads  # set for the whole process
    for place in places:
        yield _scan_group(place, use_threads=True)


def _scan_spread(places: Places, threads: int) -> Iterator[int]:
    """Events of each row group, row groups spread over threads."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(partial(_scan_group, use_threads=False), places)


def _scan_group(place: tuple[Path, int], *, use_threads: bool) -> int:
    file, group = place
    try:
        with pq.ParquetFile(file) as opened:
            return _num_events(opened.read_row_group(group, columns=list(EVENT_COLUMNS), use_threads=use_threads))
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file}, row group {group}, cannot be read ({first_line(error)}); restore it, or prepare the dataset again"
        ) from error


def _num_events(table: pa.Table) -> int:
    return sum(len(chunk.values) for chunk in table["items"].chunks)


def _forget_peak() -> None:
    """Let the kernel count the peak of resident memory from here (Linux; see proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """Bytes, by their name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def write_histories(
    root: Path, *, mean_events: int, row_groups: int, group_events: int = EVENTS_PER_ROW_GROUP, seed: int = 0
) -> None:
    """A prepared dataset of log-normal lengths, Zipf items and rising times, as `prepare` writes them."""
    random = np.random.default_rng(seed)
    root.mkdir()
    writer = HistoryWriter(root)
    rows = events = 0
    for _ in range(row_groups):
        table = _row_group(random, mean_events, group_events)
        writer.write(table)
        rows, events = rows + table.num_rows, events + _num_events(table)
    writer.close()
    pq.write_table(pa.table({"id": [1], "item_id": [1], "count": [1]}), root / ITEMS_FILE)
    DatasetInfo(
        root=root,
        roles=Roles(user="user_id", item="item_id", time="timestamp"),
        columns={},
        vocabularies={"items": Vocabulary(size=NUM_ITEMS, path=ITEMS_FILE, sha256=file_sha256(root / ITEMS_FILE))},
        counts=Counts(
            users=rows,
            events=events,
            items=NUM_ITEMS,
            train_events=events,
            validation_events=0,
            test_events=0,
            unknown_item_events=0,
        ),
        split=Split(kind="none"),
        files=tuple(writer.files),
        sources=(),
        created_by="ultrarec bench loader",
    ).write()


def _row_group(random: np.random.Generator, mean_events: int, group_events: int) -> pa.Table:
    lengths = random.lognormal(np.log(mean_events) - 0.5, 1.0, max(group_events // mean_events, 1))
    lengths = np.maximum(lengths, 2).astype(np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    total = int(lengths.sum())
    lists = {
        "items": np.minimum((random.pareto(1.1, total) * 100).astype(np.int64) + 1, NUM_ITEMS),
        "timestamps": np.cumsum(random.integers(0, 100_000, total)) + 1_600_000_000_000,
        "actions": random.integers(0, 8, total),
    }
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    counts = {"num_events": lengths, "num_train": lengths, "num_validation": np.zeros_like(lengths)}
    return pa.table({"user_id": np.arange(len(lengths)), **columns, **counts})
