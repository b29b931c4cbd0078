"""Small prepared datasets from a seed, with every kind of column and length of history, for tests."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultrarec.data.samples import Integers
from ultrarec.data.schema import (
    BUILT_IN_COLUMNS,
    HISTORIES_FOLDER,
    ITEMS_FILE,
    UNKNOWN_ITEM,
    Column,
    Counts,
    DatasetInfo,
    HistoryFile,
    Roles,
    Split,
    Vocabulary,
    file_sha256,
)

ACTIONS = ("is_click", "long_view")
_START = 1_650_000_000_000
_SPLIT_TIME = _START + 10**9


def random_histories(*, num_users: int, num_items: int, mean_events: float, seed: int) -> pa.Table:
    """Rows of histories: some users have no event, some none to train on, some a single one.

    Beside the built-in columns: `tab` (event, small integers), `play_time` (event, floats with nulls), `author`
    (event, integers over all 64 bits) and `age` (user, integers with nulls).
    """
    random = np.random.default_rng(seed)
    num_events = random.geometric(1 / (mean_events + 1), num_users) - 1
    num_train = random.binomial(num_events, 0.7)
    num_validation = random.binomial(num_events - num_train, 0.5)
    total = int(num_events.sum())
    lists = {
        "items": random.integers(UNKNOWN_ITEM, num_items + 1, total),
        "timestamps": np.cumsum(random.integers(0, 3, total) * 1000) + _START,
        "actions": random.integers(0, 2 ** len(ACTIONS), total),
        "tab": random.integers(0, 5, total),
        "play_time": pa.array(random.exponential(1000.0, total), mask=random.random(total) < 0.2),
        "author": random.integers(-(2**63), 2**63 - 1, total),
    }
    scalars = {
        "user_id": pa.array(random.permutation(num_users) + 1000),
        "num_events": pa.array(num_events, pa.int32()),
        "num_train": pa.array(num_train, pa.int32()),
        "num_validation": pa.array(num_validation, pa.int32()),
        "age": pa.array(random.integers(10, 80, num_users), mask=random.random(num_users) < 0.2),
    }
    offsets = pa.array(np.concatenate([[0], np.cumsum(num_events)]), pa.int32())
    return pa.table(
        {**scalars, **{name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}}
    )


def write_dataset(
    root: Path, histories: pa.Table, *, num_items: int, num_files: int = 1, rows_per_group: int = 16
) -> DatasetInfo:
    """Write these rows as a prepared dataset of `num_files` files, and return what its dataset.json says."""
    (root / HISTORIES_FOLDER).mkdir(parents=True)
    bounds = np.linspace(0, histories.num_rows, num_files + 1).astype(int).tolist()
    files = []
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        path = root / HISTORIES_FOLDER / f"part-{index:05}.parquet"
        rows = histories.slice(begin, end - begin)
        pq.write_table(rows, path, row_group_size=rows_per_group, write_page_checksum=True, data_page_version="2.0")
        groups = [rows.slice(first, rows_per_group) for first in range(0, rows.num_rows, rows_per_group)]
        files.append(
            HistoryFile(
                path=f"{HISTORIES_FOLDER}/{path.name}",
                rows=end - begin,
                row_groups=pq.read_metadata(path).num_row_groups,
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
                group_rows=tuple(group.num_rows for group in groups),
                group_events=tuple(_sum(group, "num_events") for group in groups),
                group_train_events=tuple(_sum(group, "num_train") for group in groups),
            )
        )
    ids = np.arange(1, num_items + 1)
    pq.write_table(pa.table({"id": ids, "item_id": ids, "count": _train_counts(histories, ids)}), root / ITEMS_FILE)
    info = _info(root, histories, num_items, tuple(files))
    info.write()
    return info


def _sum(histories: pa.Table, name: str) -> int:
    return int(histories[name].to_numpy().sum())


def _train_counts(histories: pa.Table, ids: Integers) -> Integers:
    """How often each item occurs in training events."""
    rows = zip(histories["items"].to_pylist(), histories["num_train"].to_pylist(), strict=True)
    seen = np.array([item for items, num_train in rows for item in items[:num_train]], np.int64)
    return np.bincount(seen, minlength=len(ids) + 1)[1:]


def _info(root: Path, histories: pa.Table, num_items: int, files: tuple[HistoryFile, ...]) -> DatasetInfo:
    train, validation, events = (_sum(histories, name) for name in ("num_train", "num_validation", "num_events"))
    counts = Counts(
        users=histories.num_rows,
        events=events,
        items=num_items,
        train_events=train,
        validation_events=validation,
        test_events=events - train - validation,
        unknown_item_events=sum(items.count(UNKNOWN_ITEM) for items in histories["items"].to_pylist()),
    )
    return DatasetInfo(
        root=root,
        roles=Roles(user="user_id", item="item_id", time="timestamp", actions=ACTIONS),
        columns={field.name: _declared(field.type) for field in histories.schema if field.name not in BUILT_IN_COLUMNS},
        vocabularies={"items": Vocabulary(size=num_items, path=ITEMS_FILE, sha256=file_sha256(root / ITEMS_FILE))},
        counts=counts,
        split=Split(kind="split_time", time=_SPLIT_TIME),
        files=files,
        sources=(),
        created_by="tests.random_datasets",
    )


def _declared(column: pa.DataType) -> Column:
    if pa.types.is_list(column):
        return Column(kind="event", type=str(column.value_type))
    return Column(kind="user", type=str(column))
