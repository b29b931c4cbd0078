"""Spark: the reading, counting and sorting are spread over its executors; the driver writes what comes back sorted.

The statements are DuckDB's. The few functions that Spark lacks are defined in the session, as SQL functions.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, first_line
from .conversion import FLOATS, INTEGERS, NANOSECONDS, TIMESTAMPS, Part
from .duckdb_engine import types_of
from .sources import Log
from .streams import ROWS_PER_BATCH, Stream

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

ROWS_OF_A_FILE = 1 << 40
"""More than a file can have: `row` is the file's number times this, and the place in the file."""

BITS_OF_PLACE = 33
"""Of Spark's monotonically increasing ids, the lower bits count within a partition; the upper ones are its number."""

TYPES = {
    "UTINYINT": "SMALLINT",
    "USMALLINT": "INT",
    "UINTEGER": "BIGINT",
    "UBIGINT": "DECIMAL(20, 0)",
    "VARCHAR": "STRING",
    "TIMESTAMP_S": "TIMESTAMP",
    "TIMESTAMP_MS": "TIMESTAMP",
    "TIMESTAMP WITH TIME ZONE": "TIMESTAMP",
    **dict.fromkeys(NANOSECONDS, "BIGINT"),
}
"""Spark's type for what DuckDB calls by another name; Spark reads nanoseconds as whole numbers only."""

CASTABLE = (*INTEGERS, *FLOATS, *TIMESTAMPS, "VARCHAR", "BOOLEAN")
"""Others are of no use to the preparation, which says so when it has looked at all columns."""

_LARGEST = 2**63 - 1
# DuckDB reads the two ends of 64 bits as infinite, which have no number of microseconds.
FUNCTIONS = (
    "divide(a BIGINT, b BIGINT) RETURNS BIGINT RETURN a DIV b",
    f"epoch_us(x TIMESTAMP) RETURNS BIGINT RETURN IF(abs(unix_micros(x)) = {_LARGEST}, NULL, unix_micros(x))",
    "strlen(x STRING) RETURNS BIGINT RETURN octet_length(x)",
    f"epoch_ns(x BIGINT) RETURNS BIGINT RETURN IF(abs(x) = {_LARGEST}, NULL, x)",
)
SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.parquet.compression.codec": "zstd",
}


class SparkEngine:
    """See `engine.Engine`."""

    def __init__(self, session: SparkSession, work: Path) -> None:
        self._session = session
        self._work = work
        self._kept: list[DataFrame] = []
        self._num_streams = 0

    def stage(self, log: Log, parts: list[Part]) -> dict[str, str]:
        """Read nothing yet: every statement reads the columns it needs."""
        types = types_of(log, parts)
        alike = defaultdict(list)  # Spark reads files of one schema at a time
        for number, path in enumerate(log.local_paths()):
            schema = pq.read_schema(path)
            alike[tuple(str(schema.field(part.name).type) for part in parts)].append((number, path))
        frames = []
        for stored, files in alike.items():
            columns = [_staged(part, types[part.staged], kind) for part, kind in zip(parts, stored, strict=True)]
            frames.append(self._read(files, columns))
        reduce(lambda one, other: one.union(other), frames).createOrReplaceTempView("staged")
        self._check_rows(log)
        return types

    def place(self, log: Log, row: int) -> str:
        """The number of the file is in the row's."""
        file, place = divmod(row, ROWS_OF_A_FILE)
        return f"{log.names[file]}, row {place + 1}"

    def create(self, name: str, query: str, *, progress: str = "") -> None:
        """Keep the result on the executors' disks."""
        from pyspark import StorageLevel

        frame = self._session.sql(query).persist(StorageLevel.DISK_ONLY)
        self._kept.append(frame)
        frame.createOrReplaceTempView(name)

    def create_numbered(self, name: str, query: str, *, number: str, by: str, first: int, progress: str = "") -> None:
        """Each partition of the sorted rows counts its own: a window over all rows would take them to one executor."""
        from pyspark import StorageLevel
        from pyspark.sql import functions

        rows = self._session.sql(f"SELECT * FROM ({query}) ORDER BY {by}")
        placed = rows.withColumn("place", functions.monotonically_increasing_id()).persist(StorageLevel.DISK_ONLY)
        self._kept.append(placed)
        parts = placed.groupBy(functions.shiftright("place", BITS_OF_PLACE).alias("part")).count().collect()
        counts = dict(sorted((row["part"], row["count"]) for row in parts))
        starts = itertools.accumulate(counts.values(), initial=first)
        begin = self._session.createDataFrame(
            [(part, start) for part, start in zip(counts, starts, strict=False)], "part BIGINT, start BIGINT"
        )
        numbered = placed.join(functions.broadcast(begin), functions.expr(f"part = shiftright(place, {BITS_OF_PLACE})"))
        place = functions.expr(f"start + (place & {(1 << BITS_OF_PLACE) - 1}L)").alias(number)
        numbered.select(place, *rows.columns).createOrReplaceTempView(name)

    def load(self, name: str, batches: pa.RecordBatchReader) -> None:
        """By way of a file that the executors read."""
        path = self._work / f"{name}.parquet"
        with pq.ParquetWriter(path, batches.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        self._session.read.parquet(_without_globs(path.absolute())).createOrReplaceTempView(name)

    def define(self, name: str, query: str) -> None:
        """Make a view."""
        self._session.sql(query).createOrReplaceTempView(name)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a result."""
        return [tuple(row) for row in self._session.sql(query).collect()]

    def stream(self, query: str, *, progress: str = "", batch_rows: int = ROWS_PER_BATCH) -> Stream:
        """Sorted files, which Spark numbers in their order, read one after the other and removed at the end."""
        folder = self._work / f"stream-{self._num_streams}"
        self._num_streams += 1
        self._session.sql(query).write.parquet(str(folder))
        files = sorted(folder.glob("part-*.parquet"))
        if not files:
            raise UserError(
                f"{folder} is empty after Spark wrote to it: its executors write to disks of their own; "
                "give an --out on a file system that the driver and the executors share"
            )
        return Stream(pq.read_schema(files[0]), _batches(files, batch_rows))

    def close(self) -> None:
        """Let go of what the executors keep."""
        for frame in self._kept:
            frame.unpersist()

    def _read(self, files: list[tuple[int, Path]], columns: list[Column]) -> DataFrame:
        from pyspark.sql import functions

        if hidden := [path for _, path in files if path.name.startswith(("_", "."))]:
            raise UserError(f"{hidden[0]}: Spark leaves out files whose names begin with _ or a dot; rename it")
        frame = self._session.read.parquet(*(_without_globs(path.absolute()) for _, path in files))
        numbers = {os.path.realpath(path): number for number, path in files}
        # Spark spells the beginning in two ways, file:/ here and file:/// there.
        uris = [re.sub("^file:/*", "/", uri) for uri in frame.inputFiles()]
        found = [(uri, numbers[os.path.realpath(unquote(uri))]) for uri in uris]
        names = self._session.createDataFrame(found, "uri STRING, number BIGINT")
        uri = functions.regexp_replace("_metadata.file_path", "^file:/*", "/").alias("uri")
        place = functions.col("_metadata.row_index").alias("place")
        read = frame.select(uri, place, *columns)
        numbered = read.join(functions.broadcast(names), "uri")
        row = functions.expr(f"number * {ROWS_OF_A_FILE} + place").alias("row")
        return numbered.select(row, *read.columns[2:])

    def _check_rows(self, log: Log) -> None:
        expected = sum(pq.read_metadata(path).num_rows for path in log.local_paths())
        [(rows,)] = self.rows("SELECT count(*) FROM staged")
        if rows != expected:
            raise RuntimeError(f"Spark reads {rows} rows of a log whose files have {expected}; nothing was written")


@contextmanager
def open_spark(work: Path, *, master: str | None) -> Iterator[SparkEngine]:
    """The Spark session that is there, as spark-submit makes one, else one of our own.

    Raises UserError without pyspark or Java, or when Spark does not start.
    """
    if find_spec("pyspark") is None:
        raise UserError("--engine spark needs pyspark; install it with: pip install 'ultrarec[spark]'")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise UserError("--engine spark needs Java 17 or later, as ultrarec[spark] says; install it, or set JAVA_HOME")
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    running = SparkSession.getActiveSession()
    builder = SparkSession.builder.appName("ultrarec prepare")
    try:
        session = (builder.master(master) if master else builder).getOrCreate()
        # Shares the executors, but neither the settings nor the names of views and functions.
        own = session.newSession()
        for name, value in SETTINGS.items():
            own.conf.set(name, value)
        for function in FUNCTIONS:
            own.sql(f"CREATE TEMPORARY FUNCTION {function}")
    except PySparkException as error:
        raise UserError(f"Spark does not start ({first_line(error)}); check --spark-master and Java") from error
    engine = SparkEngine(own, work)
    try:
        yield engine
    finally:
        engine.close()
        if running is None:
            session.stop()


def _staged(part: Part, duckdb_type: str, stored: str) -> Column:
    """A column of the log as `staged` has it: of the one type that fits all files."""
    from pyspark.sql import functions

    column = functions.col("`" + part.name.replace("`", "``") + "`")
    if duckdb_type in NANOSECONDS and not stored.startswith("timestamp[ns"):
        column = functions.unix_micros(column.cast("TIMESTAMP")) * 1000
    if duckdb_type in CASTABLE:
        column = column.cast(TYPES.get(duckdb_type, duckdb_type))
    return column.alias(part.staged)


def _without_globs(path: Path) -> str:
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", str(path))


def _batches(files: list[Path], batch_rows: int) -> Iterator[pa.RecordBatch]:
    for path in files:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_rows)
        path.unlink()
