"""Row groups of a prepared dataset as flat arrays; only the columns that the features name are read.

Legend: R = rows of a row group, E = events of all these rows, G = row groups of the dataset.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from .checks import check_columns, first_faults, misfits
from .config import FeatureConfig
from .errors import UserError
from .faults import Fault
from .features import encode, number_bits
from .memory import Memory
from .parquet import Damaged, ParquetFile
from .samples import Integers, RowCounts, Sampler, Split
from .schema import DatasetInfo
from .storage import Storage

T = TypeVar("T")

EVENT_COLUMNS = ("items", "timestamps", "actions")
COUNT_COLUMNS = ("num_events", "num_train", "num_validation")
OPEN_FILES = 32
"""Files whose footers stay in memory; windows of row groups touch few at a time."""
OPENING_THREADS = 16
"""Opening a file waits for the store far more than it computes."""
_PORTION = 1024
_BROKEN = -1


def number_key(column: str) -> str:
    """Where the bits of a column that is read as numbers stand, beside the ids that it may have as a feature."""
    return f"number of {column}"


@dataclass(frozen=True)
class Histories:
    """The rows of a row group, and their events one row after the other."""

    first_row: int
    """Number of the first row, over all files."""
    offsets: Integers
    """[R+1], where each row's events begin and end."""
    events: dict[str, Integers]
    """[E] each: items, timestamps, actions, the ids of every `event` and `outcome` feature, and under `number_key` the
    bits of every number that is read."""
    users: dict[str, Integers]
    """[R] each: the ids of every `user` feature."""
    faults: dict[int, Fault]
    """Rows, by their number in this group, that must not be used; -1 stands for all of them."""


class Reader:
    """The history files of a dataset as one sequence of rows and row groups.

    Raises UserError if a feature's column is missing or of a kind that the feature cannot read, if a file is missing,
    has other columns than the dataset says, or cannot be fetched; and for damaged data if `bad_data` is "error".
    """

    def __init__(
        self,
        info: DatasetInfo,
        features: Mapping[str, FeatureConfig],
        *,
        storage: Storage,
        memory: Memory,
        bad_data: Literal["error", "skip"] = "error",
        numbers: Sequence[str] = (),
    ) -> None:
        self._info, self._features, self._storage, self._memory = info, dict(features), storage, memory
        self._numbers = tuple(numbers)
        self._fails = bad_data == "error"
        self._open = lru_cache(maxsize=OPEN_FILES)(self._open_file)
        self.faults: list[Fault] = []
        """What opening the dataset found damaged."""
        rows_of_groups: list[list[int]] = []
        files: list[int] = []
        for file, found in enumerate(_in_parallel(self._groups_of, len(info.files), "opening")):
            if isinstance(found, Fault):
                self.faults.append(found)
            rows_of_groups.append([info.files[file].rows] if isinstance(found, Fault) else found)
            files += [_BROKEN if isinstance(found, Fault) else file] * len(rows_of_groups[-1])
        self._file = np.array(files, np.int64)
        """[G] the file of each row group. One without a footer counts as one row group, of which nothing is read, so
        that the rows of the others keep their numbers."""
        self._group = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(rows)) for rows in rows_of_groups)])
        self.group_begin: Integers = np.cumsum([0, *itertools.chain.from_iterable(rows_of_groups)])
        """[G+1] first row of each row group, over all files."""
        self.file_begin: Integers = np.cumsum([0, *(file.rows for file in info.files)])
        """[files + 1] first row of each file."""

    def num_samples(self, sampler: Sampler, split: Split) -> Integers:
        """[G] samples that each row group gives; reads three small columns of the whole dataset, and keeps no row.

        With `bad_data="skip"`, what cannot be counted gives none and is added to `faults`.
        """

        def samples_of(group: int) -> tuple[int, list[Fault]]:
            counts, faults = self._counts(group)
            return int(sampler.num_samples(counts, split).sum()), faults

        samples = np.zeros(len(self._group), np.int64)
        for group, (number, faults) in enumerate(_in_parallel(samples_of, len(samples), "counting")):
            samples[group] = number
            self.faults += faults
        return samples

    def counts_of(self, groups: Integers) -> RowCounts:
        """The counts of all rows of these row groups, one group after the other."""
        parts = [self._counts(group)[0] for group in groups.tolist()]
        return RowCounts(*(np.concatenate([getattr(part, name) for part in parts]) for name in COUNT_COLUMNS))

    def read(self, group: int) -> Histories:
        """The rows of a row group."""
        first, num_rows = int(self.group_begin[group]), self._num_rows(group)
        columns = list(dict.fromkeys([*EVENT_COLUMNS, *self._features, *self._numbers, "num_events"]))
        try:
            table = self._file_of(group).read(int(self._group[group]), columns)
        except Damaged as damaged:
            fault = self._fault(group, damaged.problem, column=damaged.column)
            self._refuse(fault)
            return Histories(first, np.zeros(num_rows + 1, np.int64), {}, {}, {-1: fault})
        return self._decode(group, first, table)

    def _decode(self, group: int, first: int, table: pa.Table) -> Histories:
        lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
        num_events = _numbers(_whole(table["num_events"]))[0].astype(np.int64)
        found = misfits({name: _whole(table[name]) for name in lists}, num_events, required=EVENT_COLUMNS)
        if found:
            # The lists of the other rows must lie one after the other in all columns alike.
            is_fit = np.ones(len(num_events), bool)
            is_fit[list(found)] = False
            num_events = np.where(is_fit, num_events, 0)
            table = table.filter(pa.array(is_fit))
        offsets = np.concatenate([[0], np.cumsum(num_events)])
        events, users = self._columns(table, lists)
        if found:
            users = {name: _at(ids, np.flatnonzero(is_fit), len(is_fit)) for name, ids in users.items()}
        found |= first_faults(events, offsets, num_items=self._info.num_items, known=found)
        faults = {
            row: self._fault(group, problem, row=row, column=column) for row, (column, problem) in sorted(found.items())
        }
        for fault in faults.values():
            self._refuse(fault)
        return Histories(first, offsets, events, users, faults)

    def _columns(self, table: pa.Table, lists: list[str]) -> tuple[dict[str, Integers], dict[str, Integers]]:
        events: dict[str, Integers] = {}
        users: dict[str, Integers] = {}
        for name in EVENT_COLUMNS:
            # Out of Arrow's memory, which the next row group is decoded into.
            events[name] = self._memory.copy(_numbers(_whole(table[name]).flatten())[0])
        for name, feature in self._features.items():
            column = _whole(table[name])
            ids = encode(feature, *_numbers(column.flatten() if name in lists else column))
            (users if feature.role == "user" else events)[name] = self._memory.copy(ids)
        for name in self._numbers:
            events[number_key(name)] = self._memory.copy(number_bits(*_numbers(_whole(table[name]).flatten())))
        return events, users

    def _counts(self, group: int) -> tuple[RowCounts, list[Fault]]:
        """The counts of a row group; zeros for what is damaged."""
        zeros = RowCounts(*(np.zeros(self._num_rows(group), np.int32) for _ in COUNT_COLUMNS))
        if self._file[group] == _BROKEN:
            return zeros, []
        try:
            table = self._file_of(group).read(int(self._group[group]), COUNT_COLUMNS)
        except Damaged as damaged:
            fault = self._fault(group, damaged.problem, column=damaged.column)
            self._refuse(fault)
            return zeros, [fault]
        columns, is_valid = zip(*(_numbers(_whole(table[name])) for name in COUNT_COLUMNS), strict=True)
        num_events, num_train, num_validation = columns
        is_right = np.logical_and.reduce(is_valid) & (np.minimum(num_train, num_validation) >= 0)
        is_right &= num_train.astype(np.int64) + num_validation <= num_events
        faults = [
            self._fault(
                group,
                f"{num_train[row]} training and {num_validation[row]} validation events of {num_events[row]}",
                row=row,
                column="num_events",
            )
            for row in np.flatnonzero(~is_right).tolist()
        ]
        for fault in faults:
            self._refuse(fault)
        return RowCounts(*(np.where(is_right, column, 0).astype(np.int32) for column in columns)), faults

    def _groups_of(self, file: int) -> list[int] | Fault:
        """Rows of each row group of a file, whose columns are those of the dataset."""
        declared = self._info.files[file]
        try:
            opened = self._open(file)
        except Damaged as damaged:
            fault = Fault(self._storage.name_of(declared.path), damaged.problem)
            self._refuse(fault)
            return fault
        name, metadata = self._storage.name_of(declared.path), opened.metadata
        check_columns(name, opened.schema, self._info, self._features, self._numbers)
        if metadata.num_rows != declared.rows:
            raise UserError(
                f"{name} has {metadata.num_rows} rows, dataset.json says {declared.rows}; prepare the dataset again"
            )
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _open_file(self, file: int) -> ParquetFile:
        return ParquetFile(self._storage, self._info.files[file].path)

    def _file_of(self, group: int) -> ParquetFile:
        return self._open(int(self._file[group]))

    def _num_rows(self, group: int) -> int:
        return int(self.group_begin[group + 1] - self.group_begin[group])

    def _fault(self, group: int, problem: str, *, row: int | None = None, column: str | None = None) -> Fault:
        file, first = int(self._file[group]), int(self.group_begin[group] - self.file_begin[self._file[group]])
        name = self._storage.name_of(self._info.files[file].path)
        number = int(self._group[group])
        return Fault(name, problem, row_group=number, row=None if row is None else first + row, column=column)

    def _refuse(self, fault: Fault) -> None:
        if self._fails:
            raise fault.error()


def _in_parallel(work: Callable[[int], T], number: int, verb: str) -> Iterator[T]:
    """What `work` gives for 0, 1, …, in order; shows progress if that takes a while."""
    pool = ThreadPoolExecutor(OPENING_THREADS, thread_name_prefix="ultrarec-opening")
    with pool, tqdm(total=number, desc=verb, leave=False, delay=2, disable=None) as bar:
        # In portions: the queue of a pool has no bound, and a dataset may have millions of row groups.
        for begin in range(0, number, _PORTION):
            for result in pool.map(work, range(begin, min(begin + _PORTION, number))):
                yield result
                bar.update()


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, copied only if it is in pieces."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(array: pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Values, with 0 in place of nulls, and which of them are not null."""
    if not array.null_count:
        return array.to_numpy(zero_copy_only=False), np.ones(len(array), bool)
    # Filled before the conversion: numpy would turn integers with nulls into floats, and large ids into others.
    filled = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    return filled.to_numpy(zero_copy_only=False), array.is_valid().to_numpy(zero_copy_only=False)


def _at(values: Integers, places: Integers, length: int) -> Integers:
    """These values at these places, zeros elsewhere."""
    whole = np.zeros(length, np.int64)
    whole[places] = values
    return whole
