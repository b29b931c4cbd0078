"""DuckDB in a file beside the output: sorts within the memory limit, spills what does not fit."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from ..errors import UserError, first_line
from .conversion import Part
from .log_files import LogFiles
from .options import MEMORY_LIMIT
from .sources import PROTOCOL, Log, quote_name
from .streams import ROWS_PER_BATCH, Stream

SECONDS_BETWEEN_REPORTS = 5.0
RESERVED_BYTES = 500_000_000
LEAST_SHARE = 0.75
Config = dict[str, str | bool | int | float | list[str]]


class DuckDbEngine:
    """See `engine.Engine`."""

    def __init__(self, database: duckdb.DuckDBPyConnection, report: Callable[[str], None]) -> None:
        self.database = database
        self._report = report
        self._files: LogFiles | None = None

    def stage(self, log: Log, parts: list[Part]) -> dict[str, str]:
        """Read the log once, in file order: DuckDB's `rowid` is then the place of an event in the log."""
        self._files = LogFiles(log.paths)
        self.database.register_filesystem(self._files)
        try:
            with self._files.watched():
                self.create("staged_rows", f"SELECT {wanted_columns(parts)} FROM {log.relation()}", progress="reading")
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as error:
            raise unreadable(error) from error
        self.define("staged", "SELECT rowid AS row, * FROM staged_rows")
        return {name: kind for name, kind, *_ in self.rows("DESCRIBE staged_rows")}

    def place(self, log: Log, row: int) -> str:
        """Count the rows of one file after the other."""
        assert self._files is not None, "place before stage"
        for name, path in zip(log.names, log.paths, strict=True):
            with self._files.watched():
                [(rows,)] = self.rows(f"SELECT count(*) FROM {log.relation([path])}")
            if row < rows:
                return f"{name}, row {row + 1}"
            row -= rows
        raise RuntimeError(f"row {row} lies behind the last file: the log changed while it was read")

    def create(self, name: str, query: str, *, progress: str = "") -> None:
        """Keep the result in the file."""
        with _shown(self.database, progress, self._report):
            self.database.execute(f"CREATE TABLE {name} AS {query}")

    def create_numbered(self, name: str, query: str, *, number: str, by: str, first: int, progress: str = "") -> None:
        """A window over all rows, which DuckDB sorts within its memory limit."""
        numbered = f"row_number() OVER (ORDER BY {by}) + {first - 1} AS {number}"
        self.create(name, f"SELECT {numbered}, * FROM ({query})", progress=progress)

    def load(self, name: str, batches: pa.RecordBatchReader) -> None:
        """Copied into the file."""
        self.database.register(f"{name}_batches", batches)
        self.create(name, f"SELECT * FROM {name}_batches")
        self.database.unregister(f"{name}_batches")

    def define(self, name: str, query: str) -> None:
        """Make a view."""
        self.database.execute(f"CREATE VIEW {name} AS {query}")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a result."""
        return self.database.execute(query).fetchall()

    def stream(self, query: str, *, progress: str = "", batch_rows: int = ROWS_PER_BATCH) -> Stream:
        """Batches that DuckDB makes as they are taken."""
        # A connection has one open result, so each stream needs a cursor of its own.
        cursor = self.database.cursor()
        with _shown(cursor, progress, self._report):
            reader = cursor.sql(query).to_arrow_reader(batch_rows)
        return Stream(reader.schema, reader)


@contextmanager
def open_duckdb(
    work: Path, *, memory_limit: str, threads: int | None, report: Callable[[str], None]
) -> Iterator[DuckDbEngine]:
    """A DuckDB file in `work`, which also takes what exceeds the memory limit."""
    config: Config = {
        "memory_limit": _left_for_duckdb(memory_limit),
        "temp_directory": str(work / "spill"),
        "preserve_insertion_order": True,
        "autoinstall_known_extensions": False,
    }
    if threads is not None:
        config["threads"] = threads
    try:
        database = duckdb.connect(str(work / "stage.duckdb"), config=config)
    except duckdb.ParserException as error:
        raise UserError(f"--memory-limit {memory_limit}: {first_line(error)}; give less, like 4GB") from error
    try:
        yield DuckDbEngine(database, report)
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"--memory-limit {memory_limit} is too little for this log ({first_line(error)}); "
            "raise it, lower --threads, or free disk space beside --out"
        ) from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
    finally:
        database.close()


def _left_for_duckdb(memory_limit: str) -> str:
    """What the rest of the process leaves of the limit.

    Of 50 million events in 2 GB, Python, Arrow and what DuckDB itself does not count were seen to take 350 MB.
    """
    found = MEMORY_LIMIT.fullmatch(memory_limit.strip())
    assert found is not None, memory_limit
    unit = found["unit"].upper()
    total = float(found["size"]) * (1024 if "I" in unit else 1000) ** (1 + "KMGT".index(unit[0]))
    return f"{int(max(total - RESERVED_BYTES, total * LEAST_SHARE))}B"


def types_of(log: Log, parts: list[Part]) -> dict[str, str]:
    """DuckDB's names for the types of the staged columns; reads the footers of the files only."""
    with duckdb.connect() as database:
        try:
            described = database.execute(f"DESCRIBE SELECT {wanted_columns(parts)} FROM {log.relation()}").fetchall()
        except duckdb.Error as error:
            raise unreadable(error) from error
    return {name: kind for name, kind, *_ in described}


def wanted_columns(parts: list[Part]) -> str:
    """The columns of the log under their staged names, as SQL."""
    return ", ".join(f"{quote_name(part.name)} AS {part.staged}" for part in parts)


def unreadable(error: duckdb.Error) -> UserError:
    """DuckDB's message without its advice, which names options of DuckDB."""
    text = str(error).replace(f"{PROTOCOL}://", "").split("Possible ")[0]
    summary = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    file = re.search(r"^\s*file = (.+)$", str(error), re.MULTILINE)
    named = f"{file.group(1).removeprefix(f'{PROTOCOL}://')}: {summary}" if file else summary
    return UserError(f"the log cannot be read: {named}; mend the file or write it again")


@contextmanager
def _shown(database: duckdb.DuckDBPyConnection, what: str, report: Callable[[str], None]) -> Iterator[None]:
    """Report every few seconds how far the connection's query is."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_REPORTS):
            percent = database.query_progress()
            if percent > 0:  # -1 before DuckDB knows
                report(f"{what}: {percent:.0f}%")

    if not what:
        yield
        return
    # DuckDB counts only where it would draw a bar of its own.
    database.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
