"""Sorted rows on their way from an engine to the files: batches of Arrow, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from ..schema import Column

ROWS_PER_BATCH = 1 << 17
TEXT_PER_BATCH = 32 << 20
"""Bytes of strings in a batch. Of 1,500 each, 131,072 are 197 MB, and several batches are on their way at once."""
USER_ROW = ""
"""Name of the column that numbers the users; empty, since a further column may have any other name."""


@dataclass(frozen=True)
class Stream:
    """Record batches of one schema, in order."""

    schema: pa.Schema
    batches: Iterable[pa.RecordBatch]


class RowStream:
    """Takes rows off a stream in portions of any size; memory holds one portion and one batch."""

    def __init__(self, stream: Stream) -> None:
        self._batches: Iterator[pa.RecordBatch] = iter(stream.batches)
        self._rest = stream.schema.empty_table()

    def take(self, num_rows: int) -> pa.Table:
        """The next `num_rows` rows, fewer at the end."""
        parts = [self._rest]
        available = self._rest.num_rows
        while available < num_rows:
            batch = next(self._batches, None)
            if batch is None:
                break
            parts.append(pa.Table.from_batches([batch]))
            available += batch.num_rows
        table = pa.concat_tables(parts)
        self._rest = table.slice(num_rows)
        return table.slice(0, num_rows)


def rows_per_batch(text_bytes: Mapping[str, int]) -> int:
    """Rows of which the strings, as long on average as `text_bytes` says of each column, are not too many bytes."""
    return min(ROWS_PER_BATCH, max(TEXT_PER_BATCH // max(sum(text_bytes.values()), 1), 1))


def typed(stream: Stream, schema: pa.Schema) -> Stream:
    """The columns, by place, under the names and types of `schema`: engines call some types by other names."""

    def convert(batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = [array.cast(field.type) for array, field in zip(batch.columns, schema, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    return Stream(schema, (convert(batch) for batch in stream.batches))


def user_schema(user_id: pa.DataType) -> pa.Schema:
    """Of the stream of users."""
    counts = [(name, pa.int64()) for name in ("num_events", "num_train", "num_validation")]
    return pa.schema([(USER_ROW, pa.int64()), ("user_id", user_id), *counts])


def event_schema(columns: Mapping[str, Column]) -> pa.Schema:
    """Of the stream of events; `columns` are the declared ones."""
    built_in = [(name, pa.int64()) for name in (USER_ROW, "items", "timestamps", "actions")]
    return pa.schema(built_in + [(name, pa.type_for_alias(column.type)) for name, column in columns.items()])
