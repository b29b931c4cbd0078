"""A prepared dataset and the events of a newer log: which files change, and what they then hold."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, counted
from ..schema import UNKNOWN_ITEM, Counts, DatasetInfo, HistoryFile
from .engine import Engine
from .merging import merge
from .options import PrepareOptions
from .sources import Log
from .split import events_in_order, items_in_order, train_end
from .staging import Staged, stage
from .statistics import Integers, ItemCounter, LengthCounter
from .streams import ROWS_PER_BATCH, USER_ROW, RowStream
from .writing import (
    HistoryWriter,
    Progress,
    events_per_row_group,
    row_groups,
    training_items,
    users_per_row_group,
    write_items,
)


def grow(
    engine: Engine,
    info: DatasetInfo,
    log: Log,
    options: PrepareOptions,
    root: Path,
    *,
    first_number: int,
    report: Callable[[str], None],
) -> DatasetInfo:
    """Write the files that change or are new to `root`, numbered from `first_number`; what the whole is with them.

    `log` is as the engine reads it; that it is a source now is for the caller to state.
    """
    staged = stage(engine, log, options, report=report)
    schema = _check_types(info, staged)
    _make_items(engine, info)
    _make_users(engine, info)
    touched = dict(engine.rows("SELECT file, count(*) FROM users GROUP BY file"))
    num_files = len(info.files)
    new_users = touched.get(num_files, 0)
    report(f"{counted(sum(touched.values()) - new_users, 'user')} with new events, {counted(new_users, 'new user')}")
    report(f"{counted(len(touched) - (num_files in touched), 'file')} of {num_files:,} to write again")
    users = RowStream(engine.stream("SELECT row, user_id, num_new FROM users ORDER BY user_row"))
    events = events_in_order(engine, options, staged)
    writer = HistoryWriter(root, first_number=first_number)
    growth = _Growth(info, events, writer, staged)
    growth.items.counts = _item_counts(engine, info)
    progress = Progress(report, noun="users with new events", total=sum(touched.values()))
    for number, file in enumerate(info.files):
        if number in touched:
            growth.rewrite(_row_groups_of(info.locate(file.path)), users.take(touched[number]))
        else:
            growth.keep(file)
        progress.show(growth.users_done)
    most_events = events_per_row_group(info.columns, staged.text_bytes)
    for chunk in _chunks(users, new_users, most_users=users_per_row_group(info.counts.users), most_events=most_events):
        growth.add(_without_events(schema, chunk["user_id"]), chunk["num_new"].to_numpy())
        progress.show(growth.users_done)
    growth.finish_file()
    items = items_in_order(engine, staged)
    path = root / f"items-{first_number}.parquet"
    vocabulary = write_items(items, growth.items.counts, path, relative_to=root)
    return replace(
        info,
        vocabularies={**info.vocabularies, "items": vocabulary},
        counts=Counts(**{**growth.totals, "items": vocabulary.size}),
        files=tuple(growth.files),
        lengths=growth.lengths.summary(),
        created_by=f"ultrarec {version('ultrarec')}",
    )


class _Growth:
    """The files of the dataset to be, and all that is counted over them."""

    def __init__(self, info: DatasetInfo, events: RowStream, writer: HistoryWriter, staged: Staged) -> None:
        self.files: list[HistoryFile] = []
        self.totals: dict[str, int] = asdict(info.counts)
        self.lengths = LengthCounter()
        self.items = ItemCounter(np.zeros(0, np.int64))
        self.users_done = 0
        self._info = info
        self._events = events
        self._writer = writer
        self._ties_need_the_log = staged.ties_need_the_log
        self._most_events = events_per_row_group(info.columns, staged.text_bytes)

    def keep(self, file: HistoryFile) -> None:
        """Leave the file as it is."""
        self.files.append(file)
        for table in _row_groups_of(self._info.locate(file.path), columns=["num_events"]):
            self.lengths.add(table["num_events"].to_numpy())

    def rewrite(self, row_groups_of_file: Iterable[pa.Table], touched: pa.Table) -> None:
        """Write a file again, with the new events of the users that have some: `touched` names them by row."""
        rows, num_new = (touched[name].to_numpy() for name in ("row", "num_new"))
        first = 0
        for old in row_groups_of_file:
            begin, end = np.searchsorted(rows, [first, first + old.num_rows])
            lengths = np.zeros(old.num_rows, np.int64)
            lengths[rows[begin:end] - first] = num_new[begin:end]
            self._write(old, lengths, self._take_events(num_new[begin:end]))
            first += old.num_rows
        self.finish_file()

    def add(self, newcomers: pa.Table, num_new: Integers) -> None:
        """Write users who have no events but their `num_new` new ones."""
        self.totals["users"] += newcomers.num_rows
        self._write(newcomers, num_new, self._take_events(num_new))

    def finish_file(self) -> None:
        """Close what is open, and list it."""
        self._writer.close()
        self.files += self._writer.files
        self._writer.files = []

    def _take_events(self, num_new: Integers) -> pa.Table:
        events = self._events.take(int(num_new.sum()))
        users = np.repeat(np.arange(self.users_done, self.users_done + len(num_new)), num_new)
        if not np.array_equal(events[USER_ROW].to_numpy(), users):
            raise RuntimeError("users and events came out of the engine in different orders; nothing was changed")
        self.users_done += len(num_new)
        return events

    def _write(self, old: pa.Table, num_new: Integers, events: pa.Table) -> None:
        histories = old
        if events.num_rows:
            histories = merge(
                old,
                events,
                num_new,
                columns=self._info.columns,
                split=self._info.split,
                ties_need_the_log=self._ties_need_the_log,
            )
        self._count(old, sign=-1)
        self._count(histories, sign=1)
        self.lengths.add(histories["num_events"].to_numpy())
        for group in row_groups(histories["num_events"].to_numpy(), self._most_events):
            self._writer.write(histories.slice(group.start, len(group)))

    def _count(self, table: pa.Table, *, sign: int) -> None:
        events, train, validation = (
            int(table[name].to_numpy().sum()) for name in ("num_events", "num_train", "num_validation")
        )
        unknown = int((table["items"].combine_chunks().flatten().to_numpy() == UNKNOWN_ITEM).sum())
        counts = (events, train, validation, events - train - validation, unknown)
        names = ("events", "train_events", "validation_events", "test_events", "unknown_item_events")
        for name, count in zip(names, counts, strict=True):
            self.totals[name] += sign * count
        self.items.add(training_items(table), sign=sign)


def _check_types(info: DatasetInfo, staged: Staged) -> pa.Schema:
    """The schema of the history files, which the new log has to meet."""
    schema = pq.read_schema(info.history_paths[0])
    item_id = pq.read_schema(info.locate(info.vocabularies["items"].path)).field("item_id").type
    pairs = [
        ("--user", info.roles.user, schema.field("user_id").type, staged.user_id),
        ("--item", info.roles.item, item_id, staged.item_id),
    ]
    pairs += [("--column", name, column.type, staged.columns[name].type) for name, column in info.columns.items()]
    for option, name, was, now in pairs:
        if was != now:
            raise UserError(
                f"{option} {name!r} is {now} in the new log and {was} in {info.root}; convert the log's column"
            )
    return schema


def _make_items(engine: Engine, info: DatasetInfo) -> None:
    """`items`: id, item_id; the known ones, and those new in training, in the order of item_id."""
    path = info.locate(info.vocabularies["items"].path)
    engine.load("old_items", _read(path, ["id", "item_id"]))
    end = train_end(info.split)
    training = "log" if end is None else f"(SELECT * FROM log WHERE time < {end}) AS log"
    engine.create_numbered(
        "new_items",
        f"SELECT DISTINCT item_id FROM {training} ANTI JOIN old_items ON log.item_id = old_items.item_id",
        number="id",
        by="item_id",
        first=info.num_items + 1,
        progress="counting items",
    )
    found = engine.rows("SELECT item_id FROM new_items ORDER BY id LIMIT 1")
    if found and info.counts.unknown_item_events:
        raise UserError(
            f"the new log has the item {found[0][0]!r} in the training period, and {info.root} has "
            f"{counted(info.counts.unknown_item_events, 'test event')} of unknown items, which might be of that one: "
            "append logs from the test period only, or prepare all logs together instead"
        )
    engine.define("items", "SELECT * FROM old_items UNION ALL SELECT * FROM new_items")


def _make_users(engine: Engine, info: DatasetInfo) -> None:
    """`users` of the new log: user_row (from 0), file and row (in it), user_id, num_new; new users in a last file."""
    user_id = pq.read_schema(info.history_paths[0]).field("user_id")
    known = pa.schema([user_id, ("file", pa.int64()), ("row", pa.int64())])
    engine.load("known_users", pa.RecordBatchReader.from_batches(known, _known_users(info, known)))
    engine.create(
        "new_users", "SELECT user_id, count(*) AS num_new FROM log GROUP BY user_id", progress="counting users"
    )
    engine.create("old_users", "SELECT known_users.* FROM known_users SEMI JOIN new_users USING (user_id)")
    old = "SELECT new_users.user_id, num_new, file, row FROM new_users JOIN old_users USING (user_id)"
    engine.create_numbered(
        "newcomers",
        f"SELECT user_id, num_new, CAST({len(info.files)} AS BIGINT) AS file FROM new_users ANTI JOIN old_users "
        "USING (user_id)",
        number="row",
        by="user_id",
        first=0,
    )
    engine.create_numbered(
        "users",
        f"{old} UNION ALL SELECT user_id, num_new, file, row FROM newcomers",
        number="user_row",
        by="file, row",
        first=0,
    )


def _read(path: Path, columns: list[str]) -> pa.RecordBatchReader:
    fields = pq.read_schema(path)
    schema = pa.schema([fields.field(name) for name in columns])

    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns):
                yield batch.select(columns)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _known_users(info: DatasetInfo, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for number, path in enumerate(info.history_paths):
        first = 0
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=["user_id"]):
                places = np.full(batch.num_rows, number), np.arange(first, first + batch.num_rows)
                yield pa.RecordBatch.from_arrays([batch["user_id"], *map(pa.array, places)], schema=schema)
                first += batch.num_rows


def _item_counts(engine: Engine, info: DatasetInfo) -> Integers:
    """[items] training events of each item until now, 0 of the new ones."""
    [(new,)] = engine.rows("SELECT count(*) FROM new_items")
    path = info.locate(info.vocabularies["items"].path)
    old = pq.read_table(path, columns=["count"], page_checksum_verification=True)["count"].to_numpy()
    return np.concatenate([old, np.zeros(new, np.int64)])


def _row_groups_of(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=columns)


def _chunks(users: RowStream, num_users: int, *, most_users: int, most_events: int) -> Iterator[pa.Table]:
    """The next `num_users` users in portions that make a row group each."""
    for start in range(0, num_users, most_users):
        portion = users.take(min(most_users, num_users - start))
        for group in row_groups(portion["num_new"].to_numpy(), most_events):
            yield portion.slice(group.start, len(group))


def _without_events(schema: pa.Schema, user_ids: pa.ChunkedArray) -> pa.Table:
    """Rows of users who have no history yet."""
    size = len(user_ids)
    columns = []
    for field in schema:
        if field.name == "user_id":
            columns.append(user_ids.combine_chunks().cast(field.type))
        elif pa.types.is_list(field.type):
            empty = pa.array([], field.type.value_type)
            columns.append(pa.ListArray.from_arrays(pa.array(np.zeros(size + 1, np.int32)), empty))
        elif field.name in ("num_events", "num_train", "num_validation"):
            columns.append(pa.array(np.zeros(size, np.int32)))
        else:
            columns.append(pa.nulls(size, field.type))
    return pa.table(columns, schema=schema.remove_metadata())
