"""What stored data must be: the columns of a file, the lists of a row, the events of a history.

Legend: R = rows of a row group, E = events of all these rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .config import FeatureConfig
from .errors import UserError
from .samples import Integers
from .schema import Column, DatasetInfo

Faults = dict[int, tuple[str, str]]
"""By the number of the row in its row group: the column, and what is wrong with it."""


def misfits(lists: Mapping[str, pa.ListArray], num_events: Integers, *, required: Collection[str]) -> Faults:
    """Rows of which a list has another length than `num_events` says, or, in a required column, holds a null."""
    found: Faults = {}
    for name, column in lists.items():
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lengths != num_events).tolist():
            found.setdefault(row, (name, f"{lengths[row]} values, but {num_events[row]} events in num_events"))
        values = column.flatten()
        if name in required and values.null_count:
            nulls = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            for row in np.unique(np.searchsorted(np.cumsum(lengths), nulls, side="right")).tolist():
                found.setdefault(row, (name, "a null"))
    return found


def first_faults(
    events: Mapping[str, Integers], offsets: Integers, *, num_items: int, known: Collection[int]
) -> Faults:
    """Rows with an item outside the vocabulary or with times out of order, those that are `known` left out."""
    found: Faults = {}
    items, times = events["items"], events["timestamps"]
    # One pass each over what is right, which nearly always is all of it.
    if len(items) and (items.min() < 0 or items.max() > num_items):
        outside = np.flatnonzero((items < 0) | (items > num_items))
        for row, place in _first_of_rows(outside, offsets):
            found[row] = ("items", f"id {items[place]}, but ids reach from 0 to {num_items}")
    falls = np.flatnonzero(times[1:] < times[:-1]) + 1
    falls = falls[~np.isin(falls, offsets)]
    for row, place in _first_of_rows(falls, offsets):
        found.setdefault(row, ("timestamps", f"{times[place]} after {times[place - 1]}"))
    return {row: fault for row, fault in found.items() if row not in known}


def _first_of_rows(places: Integers, offsets: Integers) -> list[tuple[int, int]]:
    """(row, place) of the first of these places, which ascend, in each row that has one."""
    rows, first = np.unique(np.searchsorted(offsets, places, side="right") - 1, return_index=True)
    return list(zip(rows.tolist(), places[first].tolist(), strict=True))


def check_columns(
    file: str, schema: pa.Schema, info: DatasetInfo, features: Mapping[str, FeatureConfig], numbers: Collection[str]
) -> None:
    """Raises UserError if a file lacks a column that is read, has it in another type than the dataset says, or if a
    feature, or what reads the column as `numbers`, cannot. Further columns do no harm.
    """
    for name, expected in _BUILT_IN_TYPES.items():
        _check_type_of(file, schema, name, expected)
    for name, feature in features.items():
        if name in info.columns:
            declared = info.columns[name]
            _check_type_of(file, schema, name, _type_of(declared))
        elif name != "user_id" or name not in schema.names:
            raise UserError(
                f"data.features.{name}: {file} has no such column; choose one of {['user_id', *info.columns]}, "
                "or prepare the dataset with it"
            )
        _check_role(name, feature, schema.field(name).type)
        _check_kind(name, feature, schema.field(name).type)
    events = [name for name, column in info.columns.items() if column.kind == "event"]
    for name in numbers:
        if name not in events:
            raise UserError(
                f"objective.regressions.{name}: the dataset has no such column of events; choose one of {events}, or "
                "prepare the dataset with it"
            )
        _check_type_of(file, schema, name, _type_of(info.columns[name]))
        value = schema.field(name).type.value_type
        if not (pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_boolean(value)):
            raise UserError(
                f"objective.regressions.{name} predicts numbers, but the column holds {value}; remove it, or prepare "
                "the dataset with numbers in this column"
            )


def _type_of(column: Column) -> str:
    return f"{'list of ' * (column.kind == 'event')}{column.type}"


_BUILT_IN_TYPES = {
    **dict.fromkeys(("items", "timestamps", "actions"), "list of int64"),
    **dict.fromkeys(("num_events", "num_train", "num_validation"), "int32"),
}


def _check_type_of(file: str, schema: pa.Schema, name: str, expected: str) -> None:
    if name not in schema.names:
        raise UserError(f"{file} has no column {name!r}; restore the file or prepare the dataset again")
    held = schema.field(name).type
    # Not the name of the whole type, which tells lists apart by what their elements are called.
    held = f"list of {held.value_type}" if pa.types.is_list(held) else str(held)
    if held != expected:
        raise UserError(
            f"{file}, column {name!r}: {held}, but the dataset says {expected}; "
            "restore the file or prepare the dataset again"
        )


def _check_role(name: str, feature: FeatureConfig, column: pa.DataType) -> None:
    if pa.types.is_list(column) == (feature.role == "user"):
        holds, roles = ("event", "'event' or 'outcome'") if pa.types.is_list(column) else ("user", "'user'")
        raise UserError(
            f"data.features.{name}.role={feature.role!r}, but the column holds one value per {holds}; "
            f"set the role to {roles}"
        )


def _check_kind(name: str, feature: FeatureConfig, column: pa.DataType) -> None:
    value = column.value_type if pa.types.is_list(column) else column
    is_whole = pa.types.is_integer(value) or pa.types.is_boolean(value)
    if is_whole or (feature.kind == "bucket" and pa.types.is_floating(value)):
        return
    reads = "numbers" if feature.kind == "bucket" else "integers or booleans"
    raise UserError(
        f"data.features.{name}.kind={feature.kind!r} reads {reads}, but the column holds {value}; "
        f"drop the feature, or prepare the dataset with {reads} in this column"
    )
