"""The engine that the options ask for, and the log in a form that it reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from .conversion import parts_of
from .engine import Engine
from .options import PrepareOptions
from .sources import Log, quote_name, quote_text
from .staging import stage

Report = Callable[[str], None]


def open_engine(options: PrepareOptions, work: Path, report: Report) -> AbstractContextManager[Engine]:
    """The engine, with `work` for what it keeps."""
    if options.engine == "spark":
        from .spark_engine import open_spark

        return open_spark(work, master=options.spark_master)
    from .duckdb_engine import open_duckdb

    return open_duckdb(work, memory_limit=options.memory_limit, threads=options.threads, report=report)


def readable(log: Log, options: PrepareOptions, work: Path, report: Report) -> Log:
    """The log, for Spark in one Parquet file if it is CSV, checked and typed.

    What the fields of a CSV file mean, and which value in which row means nothing, is for DuckDB to say: Spark reads
    numbers and times by other rules, and does not tell the number of a row.
    """
    if options.engine != "spark" or log.format != "csv":
        return log
    from .duckdb_engine import open_duckdb

    folder, path = work / "csv", work / "log.parquet"
    folder.mkdir()
    with open_duckdb(folder, memory_limit=options.memory_limit, threads=options.threads, report=report) as engine:
        readings = stage(engine, log, options, report=report).readings
        values = ", ".join(
            f"{readings[part.staged].value.format(x=part.staged)} AS {quote_name(part.name)}"
            for part in parts_of(options)
        )
        rows = f"SELECT {values} FROM staged ORDER BY row"
        engine.database.execute(f"COPY ({rows}) TO {quote_text(str(path))} (FORMAT parquet)")
    return Log(names=log.names[:1], paths=(path,), format="parquet")
