"""Histories and newer events of the same users, as one.

Legend: R = rows, O = their old events, N = their new ones, M = O + N in their new order.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import UserError
from ..schema import Column, Split
from .split import train_end
from .statistics import Integers
from .user_columns import value_of_each_user

LISTS = ("items", "timestamps", "actions")


def merge(
    old: pa.Table,
    events: pa.Table,
    num_new: Integers,
    *,
    columns: Mapping[str, Column],
    split: Split,
    ties_need_the_log: bool,
) -> pa.Table:
    """[R] rows `old` with `num_new[r]` of the `events` (a table of `streams.event_schema`) for row r, split anew.

    Of equal times, old events come first: their logs are read first. Raises UserError where such a tie would be
    decided by something that histories do not keep (`ties_need_the_log`), and for user columns that change in training.
    """
    num_old = old["num_events"].to_numpy().astype(np.int64)
    rows_M = np.concatenate([np.repeat(np.arange(len(num_old)), lengths) for lengths in (num_old, num_new)])
    old_times_O = _values(old, "timestamps").to_numpy()
    times_M = np.concatenate([old_times_O, events["timestamps"].to_numpy()])
    order_M = np.lexsort((times_M, rows_M))  # stable
    if ties_need_the_log:
        _check_ties(old, rows_M[order_M], times_M[order_M], is_new=order_M >= len(old_times_O))
    num_events = num_old + num_new
    num_train, num_validation = _split(num_events, rows_M, times_M, split)
    offsets = np.concatenate([[0], np.cumsum(num_events)]).astype(np.int32)
    merged = {}
    for name in old.column_names:
        if name in LISTS or (name in columns and columns[name].kind == "event"):
            values = pa.concat_arrays([_values(old, name), events[name].combine_chunks()])
            merged[name] = pa.ListArray.from_arrays(offsets, values.take(pa.array(order_M)))
        elif name in columns:
            merged[name] = _user_values(
                old, events, name, rows_M=rows_M, order_M=order_M, num_events=num_events, num_train=num_train
            )
    counts = {"num_events": num_events, "num_train": num_train, "num_validation": num_validation}
    merged |= {name: pa.array(values.astype(np.int32)) for name, values in counts.items()}
    return pa.table([merged.get(name, old[name]) for name in old.column_names], names=old.column_names)


def _values(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks().flatten()


def _check_ties(old: pa.Table, rows: Integers, times: Integers, *, is_new: npt.NDArray[np.bool_]) -> None:
    tied = (rows[1:] == rows[:-1]) & (times[1:] == times[:-1]) & (is_new[1:] != is_new[:-1])
    if tied.any():
        place = int(np.argmax(tied))
        user = old["user_id"][int(rows[place])].as_py()
        raise UserError(
            f"user {user!r} has events at the time {times[place]} both in the dataset and in the new log; what orders "
            "them, the order column or a finer time, is not kept: prepare all logs together instead"
        )


def _split(num_events: Integers, rows_M: Integers, times_M: Integers, split: Split) -> tuple[Integers, Integers]:
    """[R] num_train and num_validation."""
    if split.kind == "leave_last":
        assert split.num_events is not None
        last = np.where(num_events > 2 * split.num_events, split.num_events, 0)
        return num_events - 2 * last, last
    end = train_end(split)
    if end is None or split.time is None:
        return num_events, np.zeros_like(num_events)
    num_train, before_test = (
        np.bincount(rows_M[times_M < limit], minlength=len(num_events)) for limit in (end, split.time)
    )
    return num_train, before_test - num_train


def _user_values(
    old: pa.Table,
    events: pa.Table,
    name: str,
    *,
    rows_M: Integers,
    order_M: Integers,
    num_events: Integers,
    num_train: Integers,
) -> pa.Array:
    """[R] of the user's training events, where the row's value stands for all of its old ones."""
    num_old = len(order_M) - events.num_rows
    places_M = np.concatenate([rows_M[:num_old], old.num_rows + np.arange(events.num_rows)])[order_M]
    values = pa.concat_arrays([old[name].combine_chunks(), events[name].combine_chunks()]).take(pa.array(places_M))
    return value_of_each_user(name, values, old["user_id"], num_events_R=num_events, num_train_R=num_train)
