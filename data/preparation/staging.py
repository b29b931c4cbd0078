"""The log as the engine reads it, checked and typed: every event has a `row`, its place in the log.

The row breaks ties between events, and leads from a bad value back to its file and row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa

from ..errors import UserError, counted
from ..schema import Column, ColumnKind
from .conversion import ARROW_TYPES, Conversion, Part, Reading, declared_parts, parts_of
from .engine import Engine, row_of
from .options import PrepareOptions
from .sources import Log


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """What the log turned out to hold."""

    columns: dict[str, Column]
    """The declared columns."""
    user_id: pa.DataType
    item_id: pa.DataType
    """int64 or string, both."""
    ties_need_the_log: bool
    """Whether events of equal `time` are ordered by something that the histories do not keep."""
    text_bytes: dict[str, int]
    """How long the strings of a declared column are on average, in bytes, rounded up; for the columns of strings."""
    readings: dict[str, Reading]
    """How the fields of a CSV log are read, by staged name; none where the log has types."""


def stage(engine: Engine, log: Log, options: PrepareOptions, *, report: Callable[[str], None]) -> Staged:
    """Create the view `log`.

    log: row, user_id, item_id, time, moment, tie, actions and the declared columns, one row per event.
    `time` is what the dataset keeps; `moment` orders, and is finer than `time` for timestamps below the millisecond.
    """
    parts = parts_of(options)
    report("reading")
    types = engine.stage(log, parts)
    _check_nulls(engine, log, parts, report=report)
    readings = _readings(engine, parts) if log.format == "csv" else {}
    conversions = {part.staged: _convert(part, types[part.staged], readings.get(part.staged)) for part in parts}
    for part in parts:
        _check_values(engine, log, part, conversions[part.staged])
    _define_log(engine, conversions, num_actions=len(options.actions))
    read_types = types | {staged: reading.type for staged, reading in readings.items()}
    kinds: dict[str, ColumnKind] = {"--column": "event", "--user-column": "user"}
    declared = declared_parts(options)
    return Staged(
        columns={
            part.name: Column(kind=kinds[part.option], type=ARROW_TYPES[read_types[part.staged]]) for part in declared
        },
        text_bytes=_text_bytes(engine, [part for part in declared if read_types[part.staged] == "VARCHAR"]),
        user_id=_id_type(read_types["user_id"]),
        item_id=_id_type(read_types["item_id"]),
        ties_need_the_log=options.order is not None or conversions["time"].moment is not None,
        readings=readings,
    )


def _text_bytes(engine: Engine, parts: list[Part]) -> dict[str, int]:
    if not parts:
        return {}
    sums = ", ".join(f"CAST(sum(strlen({part.staged})) AS BIGINT)" for part in parts)
    total, *lengths = row_of(engine, f"SELECT count(*), {sums} FROM log")
    return {part.name: -(-(length or 0) // total) for part, length in zip(parts, lengths, strict=True)}


def _id_type(type_name: str) -> pa.DataType:
    return pa.string() if type_name == "VARCHAR" else pa.int64()


def _check_nulls(engine: Engine, log: Log, parts: list[Part], *, report: Callable[[str], None]) -> None:
    required = [part for part in parts if not part.kind.may_be_null]
    nulls = ", ".join(f"count(*) - count({part.staged})" for part in required)
    total, *counts = row_of(engine, f"SELECT count(*), {nulls} FROM staged")
    if not total:
        raise UserError(
            f"the log has no events: {', '.join(log.names)} hold{'s' * (len(log.names) == 1)} no rows; check the export"
        )
    report(f"{counted(total, 'event')} read")
    for part, count in zip(required, counts, strict=True):
        if count:
            where, _ = _first(engine, log, part, f"{part.staged} IS NULL")
            raise UserError(
                f"{part.option} {part.name!r} is null in {count:,} of {counted(total, 'row')}, first in {where}; "
                "every event needs a value: fill or drop those rows"
            )


def _convert(part: Part, type_name: str, reading: Reading | None) -> Conversion:
    """How the part becomes a value; `reading` is how its text is read, None where the log has types."""
    if reading is None:
        conversion = part.kind.convert(part.staged, type_name)
        if conversion is None:
            raise UserError(
                f"{part.option} {part.name!r} is of type {type_name}; {part.kind.rule}: convert the column in the log"
            )
        return conversion
    conversion = part.kind.convert(reading.value.format(x=part.staged), reading.type)
    assert conversion is not None, (part, reading)
    misfit = f"NOT {reading.fits.format(x=part.staged)}"
    return replace(conversion, is_bad=f"({misfit} OR {conversion.is_bad})" if conversion.is_bad else misfit)


def _readings(engine: Engine, parts: list[Part]) -> dict[str, Reading]:
    """For every part of a CSV log, the first of the readings that fit the most fields."""
    tests = [(part.staged, reading) for part in parts for reading in part.kind.readings]
    counts = ", ".join(f"count(*) FILTER (WHERE {reading.fits.format(x=staged)})" for staged, reading in tests)
    fitting = row_of(engine, f"SELECT {counts} FROM staged")
    best: dict[str, tuple[int, Reading]] = {}
    for (staged, reading), count in zip(tests, fitting, strict=True):
        if staged not in best or count > best[staged][0]:
            best[staged] = (count, reading)
    return {staged: reading for staged, (_, reading) in best.items()}


def _check_values(engine: Engine, log: Log, part: Part, conversion: Conversion) -> None:
    if conversion.is_bad is None:
        return
    is_bad = f"{part.staged} IS NOT NULL AND {conversion.is_bad}"
    (count,) = row_of(engine, f"SELECT count(*) FROM staged WHERE {is_bad}")
    if count:
        where, value = _first(engine, log, part, is_bad)
        raise UserError(
            f"{part.option} {part.name!r} is {value!r} in {where} ({counted(count, 'such row')}); {part.kind.rule}: "
            "convert the column, or drop those rows"
        )


def _define_log(engine: Engine, conversions: dict[str, Conversion], *, num_actions: int) -> None:
    flags = [conversion.value for staged, conversion in conversions.items() if staged.startswith("action_")]
    bits = [f"CASE WHEN {flag} THEN {1 << k} ELSE 0 END" for k, flag in enumerate(flags)]
    values = {staged: c.value for staged, c in conversions.items() if not staged.startswith("action_")}
    values["moment"] = conversions["time"].moment or values["time"]
    values.setdefault("tie", "0")
    values["actions"] = f"CAST({' | '.join(bits) or '0'} AS BIGINT)"
    selected = ", ".join(f"{value} AS {name}" for name, value in values.items())
    engine.define("log", f"SELECT row, {selected} FROM staged")


def _first(engine: Engine, log: Log, part: Part, condition: str) -> tuple[str, object]:
    """("FILE, row N", value) of the first row that meets the condition."""
    first = f"SELECT row, CAST({part.staged} AS STRING) FROM staged WHERE {condition} ORDER BY row LIMIT 1"
    row, value = row_of(engine, first)
    return engine.place(log, row), value
