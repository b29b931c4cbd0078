"""What runs the SQL of the preparation: the statements are the same for every engine, in `staging` and `split`.

They keep to what DuckDB and Spark understand alike. Nothing relies on the order of a table: what has an order says so.
"""

from __future__ import annotations

from typing import Any, Protocol

import pyarrow as pa

from .conversion import Part
from .sources import Log
from .streams import ROWS_PER_BATCH, Stream


class Engine(Protocol):
    """One connection to an engine, with tables and views that others do not see."""

    def stage(self, log: Log, parts: list[Part]) -> dict[str, str]:
        """Make `staged`: row BIGINT, which ascends over the files and rows of the log, and a column for each part.

        Returns:
            DuckDB's name for the type of each staged column.

        Raises:
            UserError: a file cannot be read.
        """

    def place(self, log: Log, row: int) -> str:
        """The "FILE, row N" of a value of `row`; rows count from 1, a header does not."""

    def create(self, name: str, query: str, *, progress: str = "") -> None:
        """Compute a table and keep it; `progress` says what takes long."""

    def create_numbered(self, name: str, query: str, *, number: str, by: str, first: int, progress: str = "") -> None:
        """Compute a table and keep it, with a BIGINT column `number` that counts from `first` in the order of `by`, of
        which no two rows have the same.
        """

    def load(self, name: str, batches: pa.RecordBatchReader) -> None:
        """Keep rows that come from elsewhere as a table."""

    def define(self, name: str, query: str) -> None:
        """Make a view."""

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The few rows of a result."""

    def stream(self, query: str, *, progress: str = "", batch_rows: int = ROWS_PER_BATCH) -> Stream:
        """The rows of a query that ends in ORDER BY, in that order, about `batch_rows` of them in memory at once."""


def row_of(engine: Engine, query: str) -> tuple[Any, ...]:
    """The only row of a result."""
    (row,) = engine.rows(query)
    return row
