"""Row groups of a prepared dataset as flat arrays; only the columns that the features name are read.

Legend: R = rows read, E = events of all these rows, G = row groups of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .config import FeatureConfig
from .errors import UserError
from .features import encode
from .samples import Integers, RowCounts
from .schema import BUILT_IN_COLUMNS, DatasetInfo

_EVENT_COLUMNS = ("items", "timestamps", "actions")
_COUNT_COLUMNS = ("num_events", "num_train", "num_validation")


@dataclass(frozen=True)
class Histories:
    """Rows, and their events one row after the other."""

    rows: Integers
    """[R] numbers over all files, ascending."""
    offsets: Integers
    """[R+1], where each row's events begin and end."""
    events: dict[str, Integers]
    """[E] each: items, timestamps, actions, and the ids of every `event` and `outcome` feature."""
    users: dict[str, Integers]
    """[R] each: the ids of every `user` feature."""

    def positions(self, rows: Integers) -> Integers:
        """Where in this object each of the given rows is."""
        return np.searchsorted(self.rows, rows)


class Reader:
    """The history files of a dataset as one sequence of rows and row groups.

    Raises UserError if a feature's column is missing or of a kind that the feature cannot read, or if a file is
    missing or damaged.
    """

    def __init__(self, info: DatasetInfo, features: Mapping[str, FeatureConfig]) -> None:
        self._paths = info.history_paths
        self._features = dict(features)
        self._num_rows = [file.rows for file in info.files]
        self.counts, self._groups, self.group_begin = self._read_counts()
        self.file_begin = np.cumsum([0, *self._num_rows])
        """[files + 1] first row of each file."""

    def _read_counts(self) -> tuple[RowCounts, list[tuple[Path, int]], Integers]:
        """Counts of all rows, (file, row group in it) of every row group, and [G+1] the first row of each."""
        columns: list[list[npt.NDArray[np.int32]]] = [[np.zeros(0, np.int32)] for _ in _COUNT_COLUMNS]
        groups: list[tuple[Path, int]] = []
        group_rows: list[int] = []
        for path, rows in zip(self._paths, self._num_rows, strict=True):
            with _open(path) as file:
                _check_columns(path, file.schema_arrow, self._features)
                if file.metadata.num_rows != rows:
                    raise UserError(
                        f"{path} has {file.metadata.num_rows} rows, dataset.json says {rows}; prepare the dataset again"
                    )
                table = file.read(columns=list(_COUNT_COLUMNS))
                for column, name in zip(columns, _COUNT_COLUMNS, strict=True):
                    column.append(table[name].to_numpy().astype(np.int32, copy=False))
                groups += [(path, group) for group in range(file.num_row_groups)]
                group_rows += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        counts = RowCounts(*(np.concatenate(column) for column in columns))
        return counts, groups, np.cumsum([0, *group_rows])

    def read(self, groups: Integers) -> Histories:
        """The rows of these row groups (ascending)."""
        tables = []
        for path in dict.fromkeys(self._groups[group][0] for group in groups):
            with _open(path) as file:
                wanted = [self._groups[group][1] for group in groups if self._groups[group][0] == path]
                tables.append(file.read_row_groups(wanted, columns=[*_EVENT_COLUMNS, *self._features]))
        rows = np.concatenate([np.arange(self.group_begin[group], self.group_begin[group + 1]) for group in groups])
        return self._decode(pa.concat_tables(tables), rows)

    def _decode(self, table: pa.Table, rows: Integers) -> Histories:
        offsets = np.concatenate([[0], np.cumsum(self.counts.num_events[rows], dtype=np.int64)])
        events, users = {}, {}
        for name in _EVENT_COLUMNS:
            events[name] = _numbers(self._flat(table, name, offsets))[0].astype(np.int64, copy=False)
        for name, feature in self._features.items():
            if feature.role == "user":
                users[name] = encode(feature, *_numbers(table[name].combine_chunks()))
            else:
                events[name] = encode(feature, *_numbers(self._flat(table, name, offsets)))
        return Histories(rows, offsets, events, users)

    def _flat(self, table: pa.Table, name: str, offsets: Integers) -> pa.Array:
        """The values of a list column, all rows' one after the other."""
        column = table[name].combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        if not np.array_equal(lengths, np.diff(offsets)):
            row = int(np.argmax(lengths != np.diff(offsets)))
            raise UserError(
                f"{self._paths[0].parent}: a row has {int(lengths[row])} values in {name!r} but "
                f"{int(offsets[row + 1] - offsets[row])} events in num_events; prepare the dataset again"
            )
        return column.flatten()


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or prepare the dataset again") from error


def _numbers(array: pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Values, with 0 in place of nulls, and which of them are not null."""
    is_valid = array.is_valid().to_numpy(zero_copy_only=False)
    # Filled before the conversion: numpy would turn integers with nulls into floats, and large ids into others.
    filled = array.fill_null(False if pa.types.is_boolean(array.type) else 0) if array.null_count else array
    return filled.to_numpy(zero_copy_only=False), is_valid


def _check_columns(path: Path, schema: pa.Schema, features: Mapping[str, FeatureConfig]) -> None:
    if missing := [name for name in BUILT_IN_COLUMNS if name not in schema.names]:
        raise UserError(f"{path} has no column {missing[0]!r}; prepare the dataset again")
    for name, feature in features.items():
        if name not in schema.names or (name in BUILT_IN_COLUMNS and name != "user_id"):
            declared = [column for column in schema.names if column not in BUILT_IN_COLUMNS]
            raise UserError(
                f"data.features.{name}: {path} has no such column; choose one of {['user_id', *declared]}, "
                "or prepare the dataset with it"
            )
        _check_role(name, feature, schema.field(name).type)
        _check_type(name, feature, schema.field(name).type)


def _check_role(name: str, feature: FeatureConfig, column: pa.DataType) -> None:
    if pa.types.is_list(column) == (feature.role == "user"):
        holds, roles = ("event", "'event' or 'outcome'") if pa.types.is_list(column) else ("user", "'user'")
        raise UserError(
            f"data.features.{name}.role={feature.role!r}, but the column holds one value per {holds}; "
            f"set the role to {roles}"
        )


def _check_type(name: str, feature: FeatureConfig, column: pa.DataType) -> None:
    value = column.value_type if pa.types.is_list(column) else column
    is_whole = pa.types.is_integer(value) or pa.types.is_boolean(value)
    if is_whole or (feature.kind == "bucket" and pa.types.is_floating(value)):
        return
    reads = "numbers" if feature.kind == "bucket" else "integers or booleans"
    raise UserError(
        f"data.features.{name}.kind={feature.kind!r} reads {reads}, but the column holds {value}; "
        f"drop the feature, or prepare the dataset with {reads} in this column"
    )
