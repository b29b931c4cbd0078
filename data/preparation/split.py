"""Who and what stays, which events train, validate and test, and the sorted tables that are written out.

Counts for the minimums are taken once, on the log as it is, users and items at the same time, as the public
preparation of Amazon Books does (meta-recsys/generative-recommenders): items may therefore end below their minimum.
Users who fall below theirs by the loss of items are left out; the catalogue keeps the items it had before that.

With a split by time nothing of the validation and test periods reaches training: minimums and vocabulary know
training events only. An event whose item is not in the vocabulary stays, as an exposure of an unknown item.
"""

from collections.abc import Callable

from ..errors import UserError, counted
from ..schema import Counts, Split
from .options import PrepareOptions
from .staging import Connection, declared_parts


def describe(options: PrepareOptions) -> Split:
    """The split as `dataset.json` states it."""
    if options.leave_last is not None:
        return Split(kind="leave_last", num_events=options.leave_last)
    if options.split_time is not None:
        return Split(kind="split_time", time=options.split_time, validation_time=options.validation_time)
    return Split(kind="none")


def build_tables(database: Connection, options: PrepareOptions, *, report: Callable[[str], None]) -> Counts:
    """From the view `log` make `items`, `users` and `events`, each in its final order; return the totals.

    items: item_id; the dense id is rowid + 1, in the order of item_id.
    users: user_id, num_events, num_train, num_validation, start (the rowid of the first event), ordered by user_id.
    events: user_row, item (dense), time, actions and the declared columns, ordered by user and true time.
    """
    report("counting users and items")
    _make_items(database, options)
    _make_users(database, options)
    counts = _count_users(database)
    _check_parts(database, options, counts)
    report(f"sorting {counted(counts['events'], 'event')} of {counted(counts['users'], 'user')}")
    _make_events(database, options)
    (items,) = database.execute("SELECT count(*) FROM items").fetchall()[0]
    (unknown,) = database.execute("SELECT count(*) FROM events WHERE item = 0").fetchall()[0]
    return Counts(**counts, items=items, unknown_item_events=unknown)


def _train_end(options: PrepareOptions) -> int | None:
    return options.split_time if options.validation_time is None else options.validation_time


def _make_items(database: Connection, options: PrepareOptions) -> None:
    """`kept_users`, where there is a minimum for them, and `items`, both from the events that count."""
    end = _train_end(options)
    counted = "log" if end is None else f"(SELECT * FROM log WHERE time < {end})"
    if options.min_user_events:
        database.execute(
            f"CREATE TABLE kept_users AS SELECT user_id FROM {counted} "
            f"GROUP BY user_id HAVING count(*) >= {options.min_user_events}"
        )
    database.execute(
        f"CREATE TABLE items AS SELECT item_id FROM {counted} GROUP BY item_id "
        f"HAVING count(*) >= {options.min_item_events} AND bool_or({_user_is_kept(options)}) ORDER BY item_id"
    )


def _user_is_kept(options: PrepareOptions) -> str:
    return "user_id IN (SELECT user_id FROM kept_users)" if options.min_user_events else "true"


def _item_is_kept(options: PrepareOptions) -> str:
    filtered = options.split_time is None and (options.min_user_events or options.min_item_events)
    return "item_id IN (SELECT item_id FROM items)" if filtered else "true"


def _make_users(database: Connection, options: PrepareOptions) -> None:
    n = options.leave_last
    if n is not None:
        train = f"CASE WHEN num_events > {2 * n} THEN num_events - {2 * n} ELSE num_events END"
        validation = f"CASE WHEN num_events > {2 * n} THEN {n} ELSE 0 END"
    elif options.split_time is not None:
        train, validation = "before_train_end", "before_test - before_train_end"
    else:
        train, validation = "num_events", "0"
    before = f"count(*) FILTER (WHERE time < {_train_end(options)}) AS before_train_end, "
    before += f"count(*) FILTER (WHERE time < {options.split_time}) AS before_test, "
    database.execute(f"""
        CREATE TABLE users AS
        SELECT user_id, num_events,
            CAST({train} AS BIGINT) AS num_train, CAST({validation} AS BIGINT) AS num_validation,
            CAST(sum(num_events) OVER (ORDER BY user_id ROWS UNBOUNDED PRECEDING) AS BIGINT) - num_events AS start
        FROM (
            SELECT user_id, {before if options.split_time is not None else ""} count(*) AS num_events
            FROM log WHERE {_user_is_kept(options)} AND {_item_is_kept(options)} GROUP BY user_id
        )
        {_second_minimum(options)}
        ORDER BY user_id
    """)


def _second_minimum(options: PrepareOptions) -> str:
    return f"WHERE num_events >= {options.min_user_events}" if options.split_time is None else ""


def _make_events(database: Connection, options: PrepareOptions) -> None:
    declared = "".join(f", log.{part.staged}" for part in declared_parts(options))
    items = "JOIN items" if options.split_time is None else "LEFT JOIN items"
    database.execute(f"""
        CREATE TABLE events AS
        SELECT users.rowid AS user_row, coalesce(items.rowid + 1, 0) AS item, log.time, log.actions{declared}
        FROM log JOIN users ON log.user_id = users.user_id {items} ON log.item_id = items.item_id
        ORDER BY users.rowid, log.moment, log.tie, log.row
    """)


def _count_users(database: Connection) -> dict[str, int]:
    names = ("users", "events", "train_events", "validation_events", "test_events")
    row = database.execute("""
        SELECT count(*), sum(num_events), sum(num_train), sum(num_validation),
            sum(num_events - num_train - num_validation) FROM users
    """).fetchall()[0]
    return {name: int(value or 0) for name, value in zip(names, row, strict=True)}


def _check_parts(database: Connection, options: PrepareOptions, counts: dict[str, int]) -> None:
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
    first, last = database.execute("SELECT min(time), max(time) FROM log").fetchall()[0]
    for part, needed in (("train", True), ("validation", options.validation_time is not None), ("test", True)):
        if needed and not counts[f"{part}_events"]:
            validation = f" --validation-time {options.validation_time}" if options.validation_time is not None else ""
            raise UserError(
                f"--split-time {options.split_time}{validation} leaves no {part} events: the log's times run from "
                f"{first} to {last}; give a time in between, in the same unit"
            )
