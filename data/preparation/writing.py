"""The sorted tables, streamed into Parquet: one row per user, and one row per item.

Users and events arrive as two streams in the same order, so a chunk of histories is the next users and the next
`sum(num_events)` events: memory holds one row group, whatever the size of the log.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schema import HISTORIES_FOLDER, ITEMS_FILE, HistoryFile, Vocabulary, file_sha256
from .staging import Connection, Part

USERS_PER_ROW_GROUP = 2048
"""A row group is the unit of reading: small enough to shuffle well, large enough for one request."""
EVENTS_PER_ROW_GROUP = 1 << 19
"""12 MiB of items, times and actions; a longer history has a row group to itself."""
ROW_GROUPS_PER_FILE = 64
ROWS_PER_BATCH = 1 << 17
SECONDS_BETWEEN_REPORTS = 5.0


class RowStream:
    """Takes rows off a query result in portions of any size; memory holds one portion and one batch."""

    def __init__(self, database: Connection, query: str) -> None:
        # A connection has one open result, so each stream needs a cursor of its own.
        self._cursor = database.cursor()
        self._reader: pa.RecordBatchReader = self._cursor.sql(query).to_arrow_reader(ROWS_PER_BATCH)
        self._rest = self._reader.schema.empty_table()

    def take(self, num_rows: int) -> pa.Table:
        """The next `num_rows` rows, fewer at the end."""
        parts = [self._rest]
        available = self._rest.num_rows
        while available < num_rows:
            batch = next(self._reader, None)
            if batch is None:
                break
            parts.append(pa.Table.from_batches([batch]))
            available += batch.num_rows
        table = pa.concat_tables(parts)
        self._rest = table.slice(num_rows)
        return table.slice(0, num_rows)


class HistoryWriter:
    """Writes row groups into numbered files and remembers what it wrote."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._writer: pq.ParquetWriter | None = None
        self._path = ""
        self._rows = self._row_groups = 0
        self.files: list[HistoryFile] = []
        (root / HISTORIES_FOLDER).mkdir()

    def write(self, histories: pa.Table) -> None:
        """Append one row group."""
        if self._writer is None:
            self._path = f"{HISTORIES_FOLDER}/part-{len(self.files):05d}.parquet"
            self._writer = pq.ParquetWriter(self._root / self._path, histories.schema, compression="zstd")
        self._writer.write_table(histories, row_group_size=histories.num_rows)
        self._rows += histories.num_rows
        self._row_groups += 1
        if self._row_groups == ROW_GROUPS_PER_FILE:
            self.close()

    def close(self) -> None:
        """Finish the open file, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        path = self._root / self._path
        self.files.append(
            HistoryFile(
                path=self._path,
                rows=self._rows,
                row_groups=self._row_groups,
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
            )
        )
        self._writer, self._rows, self._row_groups = None, 0, 0


def write_histories(
    database: Connection, declared: list[Part], root: Path, *, num_users: int, report: Callable[[str], None]
) -> tuple[HistoryFile, ...]:
    """Write the tables `users` and `events` to `root`/histories, in their order; return the files."""
    users = RowStream(database, "SELECT rowid AS user_row, user_id, num_events, num_train, num_validation FROM users")
    events = RowStream(database, "SELECT * FROM events")
    writer = HistoryWriter(root)
    last_report = time.monotonic()
    for start in range(0, num_users, USERS_PER_ROW_GROUP):
        portion = users.take(USERS_PER_ROW_GROUP)
        for group in row_groups(portion["num_events"].to_numpy()):
            chunk = portion.slice(group.start, len(group))
            writer.write(_histories(chunk, events.take(sum(chunk["num_events"].to_pylist())), declared))
        if time.monotonic() - last_report > SECONDS_BETWEEN_REPORTS:
            last_report = time.monotonic()
            report(f"written: {start + portion.num_rows:,} of {num_users:,} users")
    writer.close()
    return tuple(writer.files)


def write_items(database: Connection, root: Path) -> Vocabulary:
    """Write `root`/items.parquet: id int64 (1..size), item_id, count int64 (training events)."""
    stream = RowStream(
        database,
        """
        SELECT items.rowid + 1 AS id, item_id, coalesce(train_events, 0) AS count
        FROM items LEFT JOIN (
            SELECT item, count(*) AS train_events FROM events JOIN users ON user_row = users.rowid
            WHERE events.rowid - users.start < users.num_train GROUP BY item
        ) ON item = items.rowid + 1
        ORDER BY id
        """,
    )
    size = 0
    table = stream.take(ROWS_PER_BATCH)
    with pq.ParquetWriter(root / ITEMS_FILE, table.schema, compression="zstd") as writer:
        while table.num_rows:
            writer.write_table(table)
            size += table.num_rows
            table = stream.take(ROWS_PER_BATCH)
    return Vocabulary(size=size, path=ITEMS_FILE, sha256=file_sha256(root / ITEMS_FILE))


def row_groups(num_events: np.ndarray) -> list[range]:
    """Cut consecutive users into row groups of at most EVENTS_PER_ROW_GROUP events, or of one user."""
    ends = np.cumsum(num_events)
    groups = []
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + EVENTS_PER_ROW_GROUP, side="right"))
        groups.append(range(start, max(stop, start + 1)))
        start = groups[-1].stop
    return groups


def _histories(users: pa.Table, events: pa.Table, declared: list[Part]) -> pa.Table:
    """One row group: `events` holds the events of `users`, in their order."""
    lengths = users["num_events"].to_numpy()
    if not np.array_equal(events["user_row"].to_numpy(), np.repeat(users["user_row"].to_numpy(), lengths)):
        raise RuntimeError("users and events came out of DuckDB in different orders; nothing was written")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def as_lists(name: str) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, events[name].combine_chunks())

    num_train = users["num_train"].to_numpy()
    newest_train = pa.array(offsets[:-1] + num_train - 1, mask=num_train == 0)
    columns = {"user_id": users["user_id"]}
    columns |= {"items": as_lists("item"), "timestamps": as_lists("time"), "actions": as_lists("actions")}
    for part in declared:
        per_event = part.option == "--column"
        columns[part.name] = as_lists(part.staged) if per_event else events[part.staged].take(newest_train)
    for name in ("num_events", "num_train", "num_validation"):
        columns[name] = users[name].cast(pa.int32())
    return pa.table(columns)
