"""Row groups of a prepared dataset as flat arrays; only the columns that the features name are read.

Legend: R = rows of a row group, E = events of all these rows, G = row groups of the dataset.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from .checks import check_features, check_numbers, column_types, first_faults, misfit_column, misfits, type_name
from .config import FeatureConfig
from .errors import UserError, counted
from .faults import Fault
from .features import encode, number_bits
from .memory import Memory
from .parquet import Damaged, ParquetFile
from .samples import Integers, RowCounts, Sampler, Split
from .schema import DatasetInfo, HistoryFile
from .storage import Storage

T = TypeVar("T")

EVENT_COLUMNS = ("items", "timestamps", "actions")
COUNT_COLUMNS = ("num_events", "num_train", "num_validation")
OPEN_FILES = 32
"""Files whose footers stay in memory; windows of row groups touch few at a time."""
OPENING_THREADS = 16
"""Opening a file waits for the store far more than it computes."""
KEPT_COUNTS = 64
"""Row groups whose counts stay in memory from the planning of a window to the decoding of its row groups."""
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


@dataclass(frozen=True)
class _Footer:
    """What is kept of a file's footer."""

    rows_of_groups: list[int]
    user_id: str
    """The type of the user ids."""


class Reader:
    """The history files of a dataset as one sequence of rows and row groups.

    Raises UserError if the dataset has no column for a feature or one that the feature cannot read, and if a file
    cannot be fetched; if `bad_data` is "error", also for data that is damaged: files that are missing, broken off, or
    of other columns, numbers of rows or row groups than the dataset says, row groups that fail their checksums, rows
    that break a rule.
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
        self._planned: dict[int, RowCounts] = {}
        """Counts of the row groups that were asked for last."""
        self.faults: list[Fault] = []
        """What opening the dataset found damaged."""
        check_features(column_types(info, features, user_id=None), info, features)
        check_numbers(info, numbers)
        rows_of_groups: list[list[int]] = []
        files: list[int] = []
        for file, found in enumerate(self._footers()):
            if isinstance(found, Fault):
                self._refuse(found)
                self.faults.append(found)
            rows_of_groups.append([info.files[file].rows] if isinstance(found, Fault) else found.rows_of_groups)
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
        """The counts of all rows of these row groups, one group after the other.

        Raises UserError for damage that `num_samples` did not find, whatever `bad_data` says: ranks that saw the file
        before and after it was damaged would not agree on the order of the samples.
        """
        parts, known = [], {str(fault) for fault in self.faults}
        for group in groups.tolist():
            counts, faults = self._counts(group)
            if new := [fault for fault in faults if str(fault) not in known]:
                raise UserError(
                    f"{new[0]}: {new[0].problem}; it was whole when the run opened the dataset, and the order of "
                    "samples follows from it: restore the file and start again to continue"
                )
            parts.append(counts)
            self._keep(group, counts)
        return RowCounts(*(np.concatenate([getattr(part, name) for part in parts]) for name in COUNT_COLUMNS))

    def read(self, group: int) -> Histories:
        """The rows of a row group."""
        first, num_rows = int(self.group_begin[group]), self._num_rows(group)
        try:
            return self._decode(group, first, self._read_values(group))
        except Damaged as damaged:
            fault = self._fault(group, damaged.problem, column=damaged.column, num_rows=num_rows)
            self._refuse(fault)
            return Histories(first, np.zeros(num_rows + 1, np.int64), {}, {}, {-1: fault})

    def _read_values(self, group: int) -> dict[str, pa.Array]:
        """The values of those lists of events that need not be looked at as lists.

        That each list is as long as `num_events` says is then known from the file being the one that was written.
        """
        file, declared = self._file_of(group), self._info.files[self._file[group]]
        if file.num_bytes != declared.bytes:
            return {}
        num_events = int(self._num_events(group).sum())
        features = [name for name, feature in self._features.items() if feature.role != "user"]
        columns = list(dict.fromkeys([*EVENT_COLUMNS, *features, *self._numbers]))
        values = file.read_values(int(self._group[group]), columns, num_events)
        return {name: _whole(column) for name, column in values.items()}

    def _decode(self, group: int, first: int, values: dict[str, pa.Array]) -> Histories:
        """The row group, of which these values of lists are at hand."""
        table = self._read_rest(group, values)
        lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
        num_events = self._num_events(group) if values else _values(_whole(table["num_events"])).astype(np.int64)
        found = misfits({name: _whole(table[name]) for name in lists}, num_events, required=EVENT_COLUMNS)
        if found and values:
            return self._decode(group, first, {})
        if found:
            # The lists of the other rows must lie one after the other in all columns alike.
            is_fit = np.ones(len(num_events), bool)
            is_fit[list(found)] = False
            num_events = np.where(is_fit, num_events, 0)
            table = table.filter(pa.array(is_fit))
        offsets = np.concatenate([[0], np.cumsum(num_events)])
        values = values | {name: _whole(table[name]).flatten() for name in lists}
        events = self._events(values)
        users = self._users(table)
        if found:
            users = {name: _at(ids, np.flatnonzero(is_fit), len(is_fit)) for name, ids in users.items()}
        found |= first_faults(events, offsets, num_items=self._info.num_items, known=found)
        faults = {
            row: self._fault(group, problem, row=row, column=column) for row, (column, problem) in sorted(found.items())
        }
        for fault in faults.values():
            self._refuse(fault)
        return Histories(first, offsets, events, users, faults)

    def _read_rest(self, group: int, values: Mapping[str, pa.Array]) -> pa.Table:
        """The columns that are needed beside those of these values."""
        columns = dict.fromkeys([*EVENT_COLUMNS, *self._features, *self._numbers, *(() if values else ("num_events",))])
        rest = [name for name in columns if name not in values]
        return self._file_of(group).read(int(self._group[group]), rest) if rest else pa.table({})

    def _events(self, values: Mapping[str, pa.Array]) -> dict[str, Integers]:
        """From the values of lists, by column."""
        # Out of Arrow's memory, which the next row group is decoded into.
        events = {name: self._memory.copy(_values(values[name])) for name in EVENT_COLUMNS}
        for name, feature in self._features.items():
            if feature.role != "user":
                events[name] = self._memory.copy(encode(feature, *_numbers(values[name])))
        for name in self._numbers:
            events[number_key(name)] = self._memory.copy(number_bits(*_numbers(values[name])))
        return events

    def _users(self, table: pa.Table) -> dict[str, Integers]:
        features = {name: feature for name, feature in self._features.items() if feature.role == "user"}
        return {name: encode(feature, *_numbers(_whole(table[name]))) for name, feature in features.items()}

    def _num_events(self, group: int) -> Integers:
        counts = self._planned.get(group)
        return (self._counts(group)[0] if counts is None else counts).num_events.astype(np.int64)

    def _keep(self, group: int, counts: RowCounts) -> None:
        self._planned.pop(group, None)
        self._planned[group] = counts
        if len(self._planned) > KEPT_COUNTS:
            del self._planned[next(iter(self._planned))]

    def _counts(self, group: int) -> tuple[RowCounts, list[Fault]]:
        """The counts of a row group; zeros for what is damaged."""
        zeros = RowCounts(*(np.zeros(self._num_rows(group), np.int32) for _ in COUNT_COLUMNS))
        if self._file[group] == _BROKEN:
            return zeros, []
        try:
            table = self._file_of(group).read(int(self._group[group]), COUNT_COLUMNS)
        except Damaged as damaged:
            fault = self._fault(group, damaged.problem, column=damaged.column, num_rows=self._num_rows(group))
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

    def _footers(self) -> list[_Footer | Fault]:
        """What the footer of each file says, or what is wrong with the file."""
        found = list(_in_parallel(self._footer, len(self._info.files), "opening"))
        if "user_id" not in self._features:
            return found
        # dataset.json does not say which type user ids have: a file that differs from most is taken for the wrong one.
        held = Counter(each.user_id for each in found if isinstance(each, _Footer))
        user_id = held.most_common(1)[0][0] if held else None
        check_features(column_types(self._info, self._features, user_id=user_id), self._info, self._features)
        for file, each in enumerate(found):
            if isinstance(each, _Footer) and each.user_id != user_id:
                found[file] = self._file_fault(file, f"{each.user_id}, but other files hold {user_id}", "user_id")
        return found

    def _footer(self, file: int) -> _Footer | Fault:
        try:
            opened = self._open(file)
        except Damaged as damaged:
            return self._file_fault(file, damaged.problem)
        schema, metadata, declared = opened.schema, opened.metadata, self._info.files[file]
        types = column_types(self._info, [*self._features, *self._numbers], user_id=None)
        if misfit := misfit_column(schema, types):
            return self._file_fault(file, misfit[1], misfit[0])
        if metadata.num_rows != declared.rows:
            return self._file_fault(file, f"{metadata.num_rows} rows, but dataset.json says {declared.rows}")
        rows_of_groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if misfit_groups := _misfit_groups(rows_of_groups, declared):
            return self._file_fault(file, misfit_groups)
        return _Footer(
            rows_of_groups=rows_of_groups,
            user_id=type_name(schema, "user_id") if "user_id" in schema.names else "no such column",
        )

    def _open_file(self, file: int) -> ParquetFile:
        return ParquetFile(self._storage, self._info.files[file].path)

    def _file_of(self, group: int) -> ParquetFile:
        return self._open(int(self._file[group]))

    def _num_rows(self, group: int) -> int:
        return int(self.group_begin[group + 1] - self.group_begin[group])

    def _file_fault(self, file: int, problem: str, column: str | None = None) -> Fault:
        declared = self._info.files[file]
        return Fault(self._storage.name_of(declared.path), problem, column=column, num_rows=declared.rows)

    def _fault(
        self, group: int, problem: str, *, row: int | None = None, column: str | None = None, num_rows: int = 1
    ) -> Fault:
        file, first = int(self._file[group]), int(self.group_begin[group] - self.file_begin[self._file[group]])
        name = self._storage.name_of(self._info.files[file].path)
        number = int(self._group[group])
        place = None if row is None else first + row
        return Fault(name, problem, row_group=number, row=place, column=column, num_rows=num_rows)

    def _refuse(self, fault: Fault) -> None:
        if self._fails:
            raise fault.error()


def _misfit_groups(rows_of_groups: list[int], declared: HistoryFile) -> str | None:
    """How a file is cut otherwise than when it was prepared.

    The order of samples follows from the row groups: a run that went on with others would lose samples and repeat some.
    """
    if len(rows_of_groups) != declared.row_groups:
        return f"{counted(len(rows_of_groups), 'row group')}, but dataset.json says {declared.row_groups}"
    for group, (held, stated) in enumerate(zip(rows_of_groups, declared.group_rows, strict=False)):  # none in version 1
        if held != stated:
            return f"row group {group} has {counted(held, 'row')}, but dataset.json says {stated}"
    return None


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
    is_valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else np.ones(len(array), bool)
    return _values(array), is_valid


def _values(array: pa.Array) -> npt.NDArray[Any]:
    """Values, with 0 in place of nulls."""
    if array.null_count:
        # Filled before the conversion: numpy would turn integers with nulls into floats, and large ids into others.
        array = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    return array.to_numpy(zero_copy_only=False)


def _at(values: Integers, places: Integers, length: int) -> Integers:
    """These values at these places, zeros elsewhere."""
    whole = np.zeros(length, np.int64)
    whole[places] = values
    return whole
