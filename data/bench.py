"""How fast batches come out of a prepared dataset, against pyarrow reading the same columns of the same files."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .config import DataConfig
from .loader import Loader
from .reader import EVENT_COLUMNS
from .samples import NextItemSampler
from .schema import (
    HISTORIES_FOLDER,
    ITEMS_FILE,
    Counts,
    DatasetInfo,
    HistoryFile,
    Roles,
    Split,
    Vocabulary,
    file_sha256,
)

LONGEST_HISTORY = 2**20
EVENTS_PER_ROW_GROUP = 1 << 19
NUM_ITEMS = 1_000_000


@dataclass(frozen=True)
class Figures:
    """One measurement; rates are events per second, medians over the turns."""

    threads: int
    world_size: int
    scan: float
    """Of the bare scan: the faster of pyarrow's own threads and of row groups spread over as many."""
    loader: float
    """Of the batches of rank 0, in epochs after the first."""
    first_epoch: float
    """Of the batches of the first epoch, whose memory is new to the process."""
    peak_bytes: int
    """Largest resident memory of the process while the loader ran."""

    @property
    def share(self) -> float:
        """Of the scan's rate."""
        return self.loader / self.scan


def measure(root: Path, *, threads: int, world_size: int, batch_tokens: int, turns: int) -> Figures:
    """Read the dataset whole, `turns` times bare, and as often through the loader, after one turn that warms up."""
    pa.set_cpu_count(threads)
    files = DatasetInfo.load(root).history_paths
    scans = {how: [_rate(how(files, threads)) for _ in range(turns + 1)][1:] for how in (_scan, _scan_spread)}
    _forget_peak()
    first, *later = _epochs(root, threads=threads, world_size=world_size, batch_tokens=batch_tokens, number=turns + 1)
    scan = max(statistics.median(rates) for rates in scans.values())
    return Figures(threads, world_size, scan, statistics.median(later), first, _peak_bytes())


def _epochs(root: Path, *, threads: int, world_size: int, batch_tokens: int, number: int) -> list[float]:
    """Events per second of each epoch."""
    config = DataConfig(path=str(root), batch_tokens=batch_tokens, threads=threads)
    sampler = NextItemSampler(LONGEST_HISTORY)
    loader = Loader(config, sampler, split="train", rank=0, world_size=world_size, epochs=number)
    rates, events, begin = [], 0, time.perf_counter()
    for batch in loader:
        events += batch.timestamps.numel()
        if batch.state.consumed == 0:
            now = time.perf_counter()
            rates.append(events / (now - begin))
            events, begin = 0, now
    return rates


def _rate(portions: Iterator[int]) -> float:
    begin = time.perf_counter()
    return sum(portions) / (time.perf_counter() - begin)


def _scan(files: list[Path], threads: int) -> Iterator[int]:
    """Events of each row group, columns spread over pyarrow's threads."""
    for path in files:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield _num_events(file.read_row_group(group, columns=list(EVENT_COLUMNS)))


def _scan_spread(files: list[Path], threads: int) -> Iterator[int]:
    """Events of each row group, row groups spread over threads."""

    def read(place: tuple[Path, int]) -> int:
        with pq.ParquetFile(place[0]) as file:
            return _num_events(file.read_row_group(place[1], columns=list(EVENT_COLUMNS), use_threads=False))

    places = [(path, group) for path in files for group in range(pq.read_metadata(path).num_row_groups)]
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, places)


def _num_events(table: pa.Table) -> int:
    return sum(len(chunk.values) for chunk in table["items"].chunks)


def _forget_peak() -> None:
    """Let the kernel count the peak of resident memory from here (Linux; see proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def write_histories(root: Path, *, mean_events: int, row_groups: int, seed: int = 0) -> None:
    """A prepared dataset of log-normal lengths, Zipf items and rising times, as `prepare` writes them."""
    random = np.random.default_rng(seed)
    path = root / HISTORIES_FOLDER / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    tables = (_row_group(random, mean_events) for _ in range(row_groups))
    first = next(tables)
    rows = events = 0
    with pq.ParquetWriter(path, first.schema, compression="zstd", write_page_checksum=True) as writer:
        for table in (first, *tables):
            writer.write_table(table)
            rows, events = rows + table.num_rows, events + _num_events(table)
    pq.write_table(pa.table({"id": [1], "item_id": [1], "count": [1]}), root / ITEMS_FILE)
    file = HistoryFile(
        path=f"{HISTORIES_FOLDER}/{path.name}",
        rows=rows,
        row_groups=row_groups,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )
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
        files=(file,),
        sources=(),
        created_by="ultrarec bench loader",
    ).write()


def _row_group(random: np.random.Generator, mean_events: int) -> pa.Table:
    lengths = random.lognormal(np.log(mean_events) - 0.5, 1.0, max(EVENTS_PER_ROW_GROUP // mean_events, 1))
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
