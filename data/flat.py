"""Values of list columns of a Parquet file, decoded without the levels that say where each list begins.

Of three int64 columns in lists of 500, pyarrow decodes an event in 25 ns of CPU, of the same values in flat columns in
16; and how long each list is, the dataset says in a column of its own. So the reader is handed a footer that declares
the columns flat. It then takes the levels of a data page of version 2, which lie apart in front of the values, for
those of a writer that gives flat columns some, and skips them (https://github.com/apache/arrow/pull/13982); the
checksum of a page covers them all the same. Pages of version 1 keep levels and values in one piece, and cannot be read
so.

Footers are Thrift structures in its compact protocol (https://github.com/apache/parquet-format).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PHYSICAL = {pa.bool_(): 0, pa.int32(): 1, pa.int64(): 2, pa.float32(): 4, pa.float64(): 5}
"""Types that Parquet stores as they are, without a note how to read them."""
_CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "BROTLI": 4, "ZSTD": 6, "LZ4": 7}
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_REQUIRED = 0
_BEGINS_PAGE_V2 = b"\x15\x06"
"""Field 1 of a page's header, which is a 32-bit integer and here 3."""
_MAGIC = b"PAR1"


def is_flat(chunk: pq.ColumnChunkMetaData, value_type: pa.DataType, num_values: int) -> bool:
    """Whether the lists of a chunk are values and nothing else, `num_values` of them: no null, no empty list."""
    statistics = chunk.statistics
    return (
        value_type in _PHYSICAL
        and chunk.compression in _CODECS
        and chunk.num_values == num_values
        and statistics is not None
        and statistics.has_null_count
        and statistics.null_count == 0
    )


def read_flat(
    data: pa.Buffer, chunks: Sequence[pq.ColumnChunkMetaData], types: Sequence[pa.DataType], *, begin: int
) -> list[pa.ChunkedArray] | None:
    """The values of chunks that are flat and equally long; None if their pages do not allow it.

    Args:
        data: what lies in the file from `begin` on, which is before the first chunk, to the end of the last.
    """
    for chunk in chunks:
        place = chunk.data_page_offset - begin
        if data[place : place + len(_BEGINS_PAGE_V2)].to_pybytes() != _BEGINS_PAGE_V2:
            return None
    footer = _footer(chunks, types, begin)
    source = pa.BufferReader(_MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC)
    with pq.ParquetFile(
        pa.BufferReader(data), metadata=pq.read_metadata(source), page_checksum_verification=True
    ) as file:
        return file.read_row_group(0, use_threads=False).columns


def _footer(chunks: Sequence[pq.ColumnChunkMetaData], types: Sequence[pa.DataType], begin: int) -> bytes:
    """FileMetaData of one row group in which every value is a row; its columns are numbered."""
    num_values = chunks[0].num_values
    names = [str(column).encode() for column in range(len(chunks))]
    physical = [_PHYSICAL[each] for each in types]
    root = [(4, _BINARY, b"schema"), (5, _I32, len(chunks))]
    leaves = [
        [(1, _I32, kind), (3, _I32, _REQUIRED), (4, _BINARY, name)] for kind, name in zip(physical, names, strict=True)
    ]
    columns = [
        [(2, _I64, 0), (3, _STRUCT, _column(chunk, kind, name, begin))]
        for chunk, kind, name in zip(chunks, physical, names, strict=True)
    ]
    total = sum(chunk.total_uncompressed_size for chunk in chunks)
    group = [(1, _LIST, (_STRUCT, columns)), (2, _I64, total), (3, _I64, num_values)]
    version = 2
    return _struct(
        [
            (1, _I32, version),
            (2, _LIST, (_STRUCT, [root, *leaves])),
            (3, _I64, num_values),
            (4, _LIST, (_STRUCT, [group])),
        ]
    )


_Fields = Sequence[tuple[int, int, Any]]
"""Number, type and value of each field, by rising number."""


def _column(chunk: pq.ColumnChunkMetaData, kind: int, name: bytes, begin: int) -> _Fields:
    """ColumnMetaData. Its encodings are for planners; a reader finds those of each page in the page."""
    fields = [
        (1, _I32, kind),
        (2, _LIST, (_I32, [])),
        (3, _LIST, (_BINARY, [name])),
        (4, _I32, _CODECS[chunk.compression]),
        (5, _I64, chunk.num_values),
        (6, _I64, chunk.total_uncompressed_size),
        (7, _I64, chunk.total_compressed_size),
        (9, _I64, chunk.data_page_offset - begin),
    ]
    if chunk.has_dictionary_page:
        fields.append((11, _I64, chunk.dictionary_page_offset - begin))
    return fields


def _struct(fields: _Fields) -> bytes:
    parts, last = [], 0
    for number, kind, value in fields:
        parts += [bytes([number - last << 4 | kind]), _encoded(kind, value)]
        last = number
    return b"".join([*parts, b"\0"])


def _encoded(kind: int, value: Any) -> bytes:
    if kind in (_I32, _I64):
        return _varint(value << 1)  # zigzag; none is negative
    if kind == _BINARY:
        return _varint(len(value)) + value
    if kind == _STRUCT:
        return _struct(value)
    element, values = value
    few = 15
    size = bytes([len(values) << 4 | element]) if len(values) < few else bytes([0xF0 | element]) + _varint(len(values))
    return size + b"".join(_encoded(element, each) for each in values)


def _varint(number: int) -> bytes:
    """Seven bits per byte, the lowest first; all bytes but the last have the eighth set."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
