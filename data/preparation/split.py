"""Who and what stays, which events train, validate and test, and the sorted tables that are written out.

Counts for the minimums are taken once, on the log as it is, users and items at the same time, as the public
preparation of Amazon Books does (meta-recsys/generative-recommenders): items may therefore end below their minimum.
Users who fall below theirs by the loss of items are left out; the catalogue keeps the items it had before that.

With a split by time nothing of the validation and test periods reaches training: minimums and vocabulary know
training events only. An event whose item is not in the vocabulary stays, as an exposure of an unknown item.
"""

from collections.abc import Callable

import pyarrow as pa

from ..errors import UserError, counted
from ..schema import Split
from .conversion import declared_parts
from .engine import Engine, row_of
from .options import PrepareOptions
from .staging import Staged
from .streams import RowStream, Stream, event_schema, rows_per_batch, typed, user_schema


def describe(options: PrepareOptions) -> Split:
    """The split as `dataset.json` states it."""
    if options.leave_last is not None:
        return Split(kind="leave_last", num_events=options.leave_last)
    if options.split_time is not None:
        return Split(kind="split_time", time=options.split_time, validation_time=options.validation_time)
    return Split(kind="none")


def build_tables(engine: Engine, options: PrepareOptions, *, report: Callable[[str], None]) -> dict[str, int]:
    """From the view `log` make `items` and `users`; return the totals by name.

    items: id (dense, from 1 in the order of item_id), item_id.
    users: user_row (from 0 in the order of user_id), user_id, num_events, num_train, num_validation.
    """
    report("counting users and items")
    _make_items(engine, options)
    _make_users(engine, options)
    counts = _counts(engine)
    _check_parts(engine, options, counts)
    report(f"sorting {counted(counts['events'], 'event')} of {counted(counts['users'], 'user')}")
    return counts


def users_in_order(engine: Engine, staged: Staged) -> RowStream:
    """The table `users`."""
    query = "SELECT user_row, user_id, num_events, num_train, num_validation FROM users ORDER BY user_row"
    return RowStream(typed(engine.stream(query), user_schema(staged.user_id)))


def items_in_order(engine: Engine, staged: Staged) -> Stream:
    """The original ids, by dense id."""
    return typed(engine.stream("SELECT item_id FROM items ORDER BY id"), pa.schema([("item_id", staged.item_id)]))


def events_in_order(engine: Engine, options: PrepareOptions, staged: Staged) -> RowStream:
    """Each user's events in true order, for the users as in `users_in_order`; items are dense."""
    batch_rows = rows_per_batch(staged.text_bytes)
    stream = engine.stream(_sorted_events(options), progress="sorting", batch_rows=batch_rows)
    return RowStream(typed(stream, event_schema(staged.columns)))


def train_end(split: Split) -> int | None:
    """Training events are those before this time; None where the split does not go by time."""
    return split.time if split.validation_time is None else split.validation_time


def num_train_and_validation(split: Split) -> tuple[str, str]:
    """SQL for both, of a user with num_events events, before_train_end and before_test of them by time."""
    if split.kind == "leave_last":
        n = split.num_events
        assert n is not None
        train = f"CASE WHEN num_events > {2 * n} THEN num_events - {2 * n} ELSE num_events END"
        return train, f"CASE WHEN num_events > {2 * n} THEN {n} ELSE 0 END"
    if split.kind == "split_time":
        return "before_train_end", "before_test - before_train_end"
    return "num_events", "0"


def _sorted_events(options: PrepareOptions) -> str:
    declared = "".join(f", log.{part.staged}" for part in declared_parts(options))
    items = "JOIN items" if options.split_time is None else "LEFT JOIN items"
    return f"""
        SELECT users.user_row, coalesce(items.id, 0) AS item, log.time, log.actions{declared}
        FROM log JOIN users ON log.user_id = users.user_id {items} ON log.item_id = items.item_id
        ORDER BY users.user_row, log.moment, log.tie, log.row
    """


def _make_items(engine: Engine, options: PrepareOptions) -> None:
    """`kept_users`, where there is a minimum for them, and `items`, both from the events that count."""
    end = train_end(describe(options))
    counted = "log" if end is None else f"(SELECT * FROM log WHERE time < {end})"
    kept = "true"
    if options.min_user_events:
        engine.create(
            "kept_users",
            f"SELECT user_id FROM {counted} GROUP BY user_id HAVING count(*) >= {options.min_user_events}",
        )
        counted = f"{counted} AS counted LEFT JOIN kept_users ON counted.user_id = kept_users.user_id"
        kept = "count(kept_users.user_id) > 0"
    engine.create_numbered(
        "items",
        f"SELECT item_id FROM {counted} GROUP BY item_id HAVING count(*) >= {options.min_item_events} AND {kept}",
        number="id",
        by="item_id",
        first=1,
        progress="counting items",
    )


def _kept_events(options: PrepareOptions) -> str:
    """The log without the users and items that a minimum leaves out."""
    events = "log"
    if options.min_user_events:
        events += " SEMI JOIN kept_users ON log.user_id = kept_users.user_id"
    if options.split_time is None and (options.min_user_events or options.min_item_events):
        events += " SEMI JOIN items ON log.item_id = items.item_id"
    return events


def _make_users(engine: Engine, options: PrepareOptions) -> None:
    split = describe(options)
    train, validation = num_train_and_validation(split)
    before = f"count(*) FILTER (WHERE time < {train_end(split)}) AS before_train_end, "
    before += f"count(*) FILTER (WHERE time < {split.time}) AS before_test, "
    engine.create_numbered(
        "users",
        f"""
        SELECT user_id, num_events,
            CAST({train} AS BIGINT) AS num_train, CAST({validation} AS BIGINT) AS num_validation
        FROM (
            SELECT user_id, {before if split.kind == "split_time" else ""} count(*) AS num_events
            FROM {_kept_events(options)} GROUP BY user_id
        )
        {_second_minimum(options)}
        """,
        number="user_row",
        by="user_id",
        first=0,
        progress="counting users",
    )


def _second_minimum(options: PrepareOptions) -> str:
    return f"WHERE num_events >= {options.min_user_events}" if options.split_time is None else ""


def _counts(engine: Engine) -> dict[str, int]:
    names = ("users", "events", "train_events", "validation_events", "test_events")
    row = row_of(
        engine,
        """
        SELECT count(*), sum(num_events), sum(num_train), sum(num_validation),
            sum(num_events - num_train - num_validation) FROM users
        """,
    )
    (items,) = row_of(engine, "SELECT count(*) FROM items")
    return {name: int(value or 0) for name, value in zip(names, row, strict=True)} | {"items": items}


def _check_parts(engine: Engine, options: PrepareOptions, counts: dict[str, int]) -> None:
    """Every part that the options ask for must have events."""
    if not counts["events"]:
        raise UserError(
            f"no events are left after --min-user-events {options.min_user_events} and --min-item-events "
            f"{options.min_item_events}; lower them"
        )
    if options.leave_last is not None and not counts["test_events"]:
        raise UserError(
            f"--leave-last {options.leave_last} leaves nothing to test: no user has the {2 * options.leave_last + 1} "
            "events that it needs (test, validation and one to train on); lower it"
        )
    if options.split_time is None:
        return
    first, last = row_of(engine, "SELECT min(time), max(time) FROM log")
    for part, needed in (("train", True), ("validation", options.validation_time is not None), ("test", True)):
        if needed and not counts[f"{part}_events"]:
            validation = f" --validation-time {options.validation_time}" if options.validation_time is not None else ""
            raise UserError(
                f"--split-time {options.split_time}{validation} leaves no {part} events: the log's times run from "
                f"{first} to {last}; give a time in between, in the same unit"
            )
