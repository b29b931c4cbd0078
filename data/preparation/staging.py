"""The log in a DuckDB file: read once, in file order, then checked and typed.

Staging keeps the order of the files and of their rows, so DuckDB's `rowid` is the place of an event in the log: it
breaks ties, and leads from a bad value back to its file and row.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow

from ..errors import UserError, counted
from ..schema import Column, ColumnKind
from .conversion import KINDS, Conversion, Kind, Reading
from .options import PrepareOptions
from .sources import Log, quote_name

Connection = duckdb.DuckDBPyConnection


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One column of the log and the part it plays."""

    option: str
    name: str
    """As the log calls it."""
    staged: str
    """As the table `staged` and the view `log` call it; names of our own cannot collide."""

    @property
    def kind(self) -> Kind:
        """What the option expects."""
        return KINDS[self.option]


@contextmanager
def open_database(work: Path, *, memory_limit: str, threads: int | None) -> Iterator[Connection]:
    """A DuckDB file in `work`, which also takes what exceeds the memory limit."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory_limit,
        "temp_directory": str(work / "spill"),
        "preserve_insertion_order": True,
        "autoinstall_known_extensions": False,
    }
    if threads is not None:
        config["threads"] = threads
    try:
        database = duckdb.connect(str(work / "stage.duckdb"), config=config)
    except duckdb.ParserException as error:
        raise UserError(f"--memory-limit {memory_limit}: {_first_line(error)}; give less, like 4GB") from error
    try:
        yield database
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"--memory-limit {memory_limit} is too little for this log ({_first_line(error)}); "
            "raise it, lower --threads, or free disk space beside --out"
        ) from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
    finally:
        database.close()


def stage(
    database: Connection, log: Log, options: PrepareOptions, *, report: Callable[[str], None]
) -> dict[str, Column]:
    """Create the view `log` and return the declared columns.

    log: row, user_id, item_id, time, moment, tie, actions and the declared columns, one row per event, in file order.
    `time` is what the dataset keeps; `moment` orders, and is finer than `time` for timestamps below the millisecond.
    """
    parts = _parts(options)
    report("reading")
    _read(database, log, parts)
    _check_nulls(database, log, parts, report=report)
    types = {name: kind for name, kind, *_ in database.execute("DESCRIBE staged").fetchall()}
    readings = _readings(database, parts) if log.format == "csv" else {}
    conversions = {part.staged: _convert(part, types[part.staged], readings.get(part.staged)) for part in parts}
    for part in parts:
        _check_values(database, log, part, conversions[part.staged])
    _create_view(database, conversions, num_actions=len(options.actions))
    return _declared_columns(database, declared_parts(options))


def declared_parts(options: PrepareOptions) -> list[Part]:
    """The further columns: those of events first, then those of users."""
    return [part for part in _parts(options) if part.option in ("--column", "--user-column")]


def _parts(options: PrepareOptions) -> list[Part]:
    parts = []
    for position, (option, name) in enumerate(options.parts()):
        kind = KINDS[option]
        staged = f"{kind.prefix}_{position}" if kind.repeated else kind.prefix
        parts.append(Part(option=option, name=name, staged=staged))
    return parts


def _read(database: Connection, log: Log, parts: list[Part]) -> None:
    wanted = ", ".join(f"{quote_name(part.name)} AS {part.staged}" for part in parts)
    try:
        database.execute(f"CREATE TABLE staged AS SELECT {wanted} FROM {log.relation()}")
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error as error:
        raise UserError(f"the log cannot be read: {_explain(error)}; mend the file or write it again") from error


def _check_nulls(database: Connection, log: Log, parts: list[Part], *, report: Callable[[str], None]) -> None:
    required = [part for part in parts if not part.kind.may_be_null]
    nulls = ", ".join(f"count(*) - count({part.staged})" for part in required)
    total, *counts = _one_row(database, f"SELECT count(*), {nulls} FROM staged")
    if not total:
        raise UserError(
            f"the log has no events: {', '.join(log.names)} hold{'s' * (len(log.names) == 1)} no rows; check the export"
        )
    report(f"{counted(total, 'event')} read")
    for part, count in zip(required, counts, strict=True):
        if count:
            where, _ = _first(database, log, part, f"{part.staged} IS NULL")
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


def _readings(database: Connection, parts: list[Part]) -> dict[str, Reading]:
    """For every part of a CSV log, the first of the readings that fit the most fields."""
    tests = [(part.staged, reading) for part in parts for reading in part.kind.readings]
    counts = ", ".join(f"count(*) FILTER (WHERE {reading.fits.format(x=staged)})" for staged, reading in tests)
    fitting = _one_row(database, f"SELECT {counts} FROM staged")
    best: dict[str, tuple[int, Reading]] = {}
    for (staged, reading), count in zip(tests, fitting, strict=True):
        if staged not in best or count > best[staged][0]:
            best[staged] = (count, reading)
    return {staged: reading for staged, (_, reading) in best.items()}


def _check_values(database: Connection, log: Log, part: Part, conversion: Conversion) -> None:
    if conversion.is_bad is None:
        return
    is_bad = f"{part.staged} IS NOT NULL AND {conversion.is_bad}"
    (count,) = _one_row(database, f"SELECT count(*) FROM staged WHERE {is_bad}")
    if count:
        where, value = _first(database, log, part, is_bad)
        raise UserError(
            f"{part.option} {part.name!r} is {value!r} in {where} ({counted(count, 'such row')}); {part.kind.rule}: "
            "convert the column, or drop those rows"
        )


def _create_view(database: Connection, conversions: dict[str, Conversion], *, num_actions: int) -> None:
    flags = [conversion.value for staged, conversion in conversions.items() if staged.startswith("action_")]
    bits = [f"CASE WHEN {flag} THEN {1 << k} ELSE 0 END" for k, flag in enumerate(flags)]
    values = {staged: c.value for staged, c in conversions.items() if not staged.startswith("action_")}
    values["moment"] = conversions["time"].moment or values["time"]
    values.setdefault("tie", "0")
    values["actions"] = f"CAST({' | '.join(bits) or '0'} AS BIGINT)"
    selected = ", ".join(f"{value} AS {name}" for name, value in values.items())
    database.execute(f"CREATE VIEW log AS SELECT rowid AS row, {selected} FROM staged")


def _declared_columns(database: Connection, declared: list[Part]) -> dict[str, Column]:
    if not declared:
        return {}
    names = ", ".join(part.staged for part in declared)
    schema: pyarrow.Schema = database.sql(f"SELECT {names} FROM log LIMIT 0").to_arrow_table().schema
    kinds: dict[str, ColumnKind] = {"--column": "event", "--user-column": "user"}
    return {part.name: Column(kind=kinds[part.option], type=str(schema.field(part.staged).type)) for part in declared}


def _first(database: Connection, log: Log, part: Part, condition: str) -> tuple[str, object]:
    """("FILE, row N", value) of the first row that meets the condition; rows count from 1, a header does not."""
    value_row = f"SELECT rowid, CAST({part.staged} AS VARCHAR) FROM staged WHERE {condition} ORDER BY rowid LIMIT 1"
    row, value = _one_row(database, value_row)
    for name, path in zip(log.names, log.paths, strict=True):
        (rows,) = _one_row(database, f"SELECT count(*) FROM {log.relation([path])}")
        if row < rows:
            return f"{name}, row {row + 1}", value
        row -= rows
    raise RuntimeError(f"row {row} lies behind the last file: the log changed while it was read")


def _one_row(database: Connection, query: str) -> tuple[Any, ...]:
    row = database.execute(query).fetchone()
    assert row is not None, query
    return row


def _explain(error: duckdb.Error) -> str:
    """DuckDB's message without its advice, which names options of DuckDB."""
    text = str(error).split("Possible ")[0]
    summary = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    file = re.search(r"^\s*file = (.+)$", str(error), re.MULTILINE)
    return f"{file.group(1)}: {summary}" if file else summary


def _first_line(error: duckdb.Error) -> str:
    return str(error).splitlines()[0]
