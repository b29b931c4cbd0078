"""The sorted streams, written as Parquet: one row per user, and one row per item.

Users and events arrive as two streams in the same order, so a chunk of histories is the next users and the next
`sum(num_events)` events: memory holds one row group and one count per item, whatever the size of the log.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schema import HISTORIES_FOLDER, UNKNOWN_ITEM, Column, HistoryFile, Vocabulary, file_sha256
from .statistics import Integers, ItemCounter, LengthCounter
from .streams import USER_ROW, RowStream, Stream
from .user_columns import value_of_each_user

USERS_PER_ROW_GROUP = 2048
MOST_USERS_PER_ROW_GROUP = 16384
ENOUGH_ROW_GROUPS = 1024
"""A row group is the unit of reading and of shuffling. A thousand of them shuffle well; datasets of more users have
larger ones, since very many small ones are slow to plan and to fetch from an object store."""
BYTES_PER_ROW_GROUP = 12 << 20
"""Of the decoded lists; a longer history has a row group to itself."""
BYTES_PER_EVENT = 24
"""Of items, timestamps and actions."""
BYTES_PER_OFFSET = 4
"""Of a string, besides its text."""
ROW_GROUPS_PER_FILE = 64
SECONDS_BETWEEN_REPORTS = 5.0


@dataclass
class _OpenFile:
    path: str
    writer: pq.ParquetWriter
    rows: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    train_events: list[int] = field(default_factory=list)


class HistoryWriter:
    """Writes row groups into numbered files and remembers what it wrote."""

    def __init__(self, root: Path, *, first_number: int = 0) -> None:
        self._root = root
        self._number = first_number
        self._open: _OpenFile | None = None
        self.files: list[HistoryFile] = []
        (root / HISTORIES_FOLDER).mkdir()

    def write(self, histories: pa.Table) -> None:
        """Append one row group."""
        if self._open is None:
            path = f"{HISTORIES_FOLDER}/part-{self._number:05d}.parquet"
            self._open = _OpenFile(path, _writer(self._root / path, histories.schema))
            self._number += 1
        self._open.writer.write_table(histories, row_group_size=histories.num_rows)
        self._open.rows.append(histories.num_rows)
        self._open.events.append(int(histories["num_events"].to_numpy().sum()))
        self._open.train_events.append(int(histories["num_train"].to_numpy().sum()))
        if len(self._open.rows) == ROW_GROUPS_PER_FILE:
            self.close()

    def close(self) -> None:
        """Finish the open file, if there is one."""
        if self._open is None:
            return
        done, self._open = self._open, None
        done.writer.close()
        path = self._root / done.path
        self.files.append(
            HistoryFile(
                path=done.path,
                rows=sum(done.rows),
                row_groups=len(done.rows),
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
                group_rows=tuple(done.rows),
                group_events=tuple(done.events),
                group_train_events=tuple(done.train_events),
            )
        )


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # The checksums of pages tell a reader of some columns that these are whole, that of the file cannot. Pages of
    # version 2 are decoded a third faster (`flat`).
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True, data_page_version="2.0")


@dataclass(frozen=True)
class Written:
    """What came of the streams."""

    files: tuple[HistoryFile, ...]
    lengths: LengthCounter
    items: ItemCounter
    unknown_item_events: int


def write_histories(
    users: RowStream,
    events: RowStream,
    columns: Mapping[str, Column],
    root: Path,
    *,
    text_bytes: Mapping[str, int],
    num_users: int,
    num_items: int,
    report: Callable[[str], None],
) -> Written:
    """Write histories to `root`/histories, in the order of the two streams.

    The streams are those of `split.users_in_order` and `split.events_in_order`, `text_bytes` is as in `Staged`.
    """
    writer = HistoryWriter(root)
    lengths, items = LengthCounter(), ItemCounter(np.zeros(num_items, np.int64))
    unknown = 0
    users_per_group, most_events = users_per_row_group(num_users), events_per_row_group(columns, text_bytes)
    progress = Progress(report, noun="users", total=num_users)
    for start in range(0, num_users, users_per_group):
        portion = users.take(users_per_group)
        lengths.add(portion["num_events"].to_numpy())
        for group in row_groups(portion["num_events"].to_numpy(), most_events):
            chunk = portion.slice(group.start, len(group))
            histories = _histories(chunk, events.take(sum(chunk["num_events"].to_pylist())), columns)
            items.add(training_items(histories))
            unknown += int((histories["items"].combine_chunks().flatten().to_numpy() == UNKNOWN_ITEM).sum())
            writer.write(histories)
        progress.show(start + portion.num_rows)
    writer.close()
    return Written(tuple(writer.files), lengths, items, unknown)


class Progress:
    """Reports a count every few seconds."""

    def __init__(self, report: Callable[[str], None], *, noun: str, total: int) -> None:
        self._report, self._noun, self._total = report, noun, total
        self._last = time.monotonic()

    def show(self, done: int) -> None:
        """Say so if the last time was a while ago."""
        if time.monotonic() - self._last > SECONDS_BETWEEN_REPORTS:
            self._last = time.monotonic()
            self._report(f"written: {done:,} of {self._total:,} {self._noun}")


def write_items(items: Stream, counts: Integers, path: Path, *, relative_to: Path) -> Vocabulary:
    """Write `path`: id int64 (1..size), item_id, count int64; the stream holds `item_id` in the order of the ids."""
    schema = pa.schema([("id", pa.int64()), items.schema.field("item_id"), ("count", pa.int64())])
    size = 0
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for batch in items.batches:
            end = size + batch.num_rows
            ids = pa.array(np.arange(size + 1, end + 1))
            writer.write_table(pa.table([ids, batch["item_id"], pa.array(counts[size:end])], schema=schema))
            size = end
    assert size == len(counts), (size, len(counts))
    return Vocabulary(size=size, path=str(path.relative_to(relative_to)), sha256=file_sha256(path))


def users_per_row_group(num_users: int) -> int:
    """How many users a row group holds at most, in a dataset of so many."""
    return min(max(USERS_PER_ROW_GROUP, num_users // ENOUGH_ROW_GROUPS), MOST_USERS_PER_ROW_GROUP)


def events_per_row_group(columns: Mapping[str, Column], text_bytes: Mapping[str, int]) -> int:
    """How many events a row group holds at most; further columns make events larger.

    `text_bytes` is how long the strings of each column are on average. Those of users count too: until the newest of a
    user is taken, every event has one.
    """
    fixed = [each for name, each in columns.items() if each.kind == "event" and name not in text_bytes]
    widths = [max(pa.type_for_alias(each.type).bit_width // 8, 1) for each in fixed]
    texts = [BYTES_PER_OFFSET + length for length in text_bytes.values()]
    return max(BYTES_PER_ROW_GROUP // (BYTES_PER_EVENT + sum(widths) + sum(texts)), 1)


def row_groups(num_events: Integers, most_events: int) -> list[range]:
    """Cut consecutive users into row groups of at most this many events, or of one user."""
    ends = np.cumsum(num_events)
    groups = []
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + most_events, side="right"))
        groups.append(range(start, max(stop, start + 1)))
        start = groups[-1].stop
    return groups


def training_items(histories: pa.Table) -> Integers:
    """The dense ids of all training events of these rows."""
    lengths, num_train = (histories[name].to_numpy().astype(np.int64) for name in ("num_events", "num_train"))
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return histories["items"].combine_chunks().flatten().to_numpy()[place < np.repeat(num_train, lengths)]


def _histories(users: pa.Table, events: pa.Table, columns: Mapping[str, Column]) -> pa.Table:
    """One row group: `events` holds the events of `users`, in their order."""
    lengths = users["num_events"].to_numpy()
    if not np.array_equal(events[USER_ROW].to_numpy(), np.repeat(users[USER_ROW].to_numpy(), lengths)):
        raise RuntimeError("users and events came out of the engine in different orders; nothing was written")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def as_lists(name: str) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, events[name].combine_chunks())

    def per_user(name: str) -> pa.Array:
        values, num_train = events[name].combine_chunks(), users["num_train"].to_numpy()
        return value_of_each_user(name, values, users["user_id"], num_events_R=lengths, num_train_R=num_train)

    table = {"user_id": users["user_id"]}
    table |= {"items": as_lists("items"), "timestamps": as_lists("timestamps"), "actions": as_lists("actions")}
    for name, column in columns.items():
        table[name] = as_lists(name) if column.kind == "event" else per_user(name)
    for name in ("num_events", "num_train", "num_validation"):
        table[name] = users[name].cast(pa.int32())
    return pa.table(table)
