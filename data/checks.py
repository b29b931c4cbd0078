"""What stored data must be: the columns of a file, the lists of a row, the events of a history.

Legend: R = rows of a row group, E = events of all these rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .config import FeatureConfig
from .errors import UserError
from .samples import Integers
from .schema import DatasetInfo

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
    # One pass each over what is right, which nearly always is all of it; ids below 0 are the largest without a sign.
    if len(items) and items.view(np.uint64).max() > num_items:
        outside = np.flatnonzero((items < 0) | (items > num_items))
        for row, place in _first_of_rows(outside, offsets):
            found[row] = ("items", f"id {items[place]}, but ids reach from 0 to {num_items}")
    is_fall = times[1:] < times[:-1]
    is_fall[offsets[(offsets > 0) & (offsets < len(times))] - 1] = False
    for row, place in _first_of_rows(np.flatnonzero(is_fall) + 1, offsets) if is_fall.any() else ():
        found.setdefault(row, ("timestamps", f"{times[place]} after {times[place - 1]}"))
    return {row: fault for row, fault in found.items() if row not in known}


def _first_of_rows(places: Integers, offsets: Integers) -> list[tuple[int, int]]:
    """(row, place) of the first of these places, which ascend, in each row that has one."""
    rows, first = np.unique(np.searchsorted(offsets, places, side="right") - 1, return_index=True)
    return list(zip(rows.tolist(), places[first].tolist(), strict=True))


def column_types(info: DatasetInfo, columns: Iterable[str], *, user_id: str | None) -> dict[str, str]:
    """By name of a column that is read, the type that every file must have it in; user ids have one of two.

    Args:
        columns: those that are read beside the built-in ones.
    """
    types = dict(_BUILT_IN_TYPES)
    for name in columns:
        if name in info.columns:
            types[name] = f"{'list of ' * (info.columns[name].kind == 'event')}{info.columns[name].type}"
        elif user_id is not None:
            types[name] = user_id
    return types


def misfit_column(schema: pa.Schema, types: Mapping[str, str]) -> tuple[str, str] | None:
    """The first column that a file lacks or has in another type, and what is wrong. Further columns do no harm."""
    for name, expected in types.items():
        if name not in schema.names:
            return name, f"the file has no such column, and the dataset says {expected}"
        if (held := type_name(schema, name)) != expected:
            return name, f"{held}, but the dataset says {expected}"
    return None


def type_name(schema: pa.Schema, name: str) -> str:
    """A column's type, without what lists call their elements."""
    held = schema.field(name).type
    return f"list of {held.value_type}" if pa.types.is_list(held) else str(held)


def check_numbers(info: DatasetInfo, numbers: Iterable[str]) -> None:
    """Raises UserError if the dataset does not hold, for each event, what a regression predicts."""
    events = {name: column.type for name, column in info.columns.items() if column.kind == "event"}
    for name in numbers:
        if name not in events:
            raise UserError(
                f"objective.regressions.{name}: the dataset has no such column of events; choose one of "
                f"{list(events)}, or prepare the dataset with it"
            )
        if events[name] not in (*_WHOLE, *_FLOATS):
            raise UserError(
                f"objective.regressions.{name} predicts numbers, but the column holds {events[name]}; remove it, or "
                "prepare the dataset with numbers in this column"
            )


def check_features(types: Mapping[str, str], info: DatasetInfo, features: Mapping[str, FeatureConfig]) -> None:
    """Raises UserError if the dataset, whose columns have these types, does not hold what a feature reads."""
    for name, feature in features.items():
        if name not in info.columns and name != "user_id":
            raise UserError(
                f"data.features.{name}: {info.root} has no such column; choose one of {['user_id', *info.columns]}, "
                "or prepare the dataset with it"
            )
        if name in types:
            _check_role(name, feature, is_list=types[name].startswith("list of "))
            _check_kind(name, feature, types[name].removeprefix("list of "))


_BUILT_IN_TYPES = {
    **dict.fromkeys(("items", "timestamps", "actions"), "list of int64"),
    **dict.fromkeys(("num_events", "num_train", "num_validation"), "int32"),
}
_WHOLE = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_FLOATS = ("halffloat", "float", "double")


def _check_role(name: str, feature: FeatureConfig, *, is_list: bool) -> None:
    if is_list == (feature.role == "user"):
        holds, roles = ("event", "'event' or 'outcome'") if is_list else ("user", "'user'")
        raise UserError(
            f"data.features.{name}.role={feature.role!r}, but the column holds one value per {holds}; "
            f"set the role to {roles}"
        )


def _check_kind(name: str, feature: FeatureConfig, value: str) -> None:
    if value in _WHOLE or (feature.kind == "bucket" and value in _FLOATS):
        return
    reads = "numbers" if feature.kind == "bucket" else "integers or booleans"
    raise UserError(
        f"data.features.{name}.kind={feature.kind!r} reads {reads}, but the column holds {value}; "
        f"drop the feature, or prepare the dataset with {reads} in this column"
    )
