"""Parquet files, fetched and decoded apart: what fails to arrive is asked for again, what fails to decode is faulty."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import first_line
from .flat import is_flat, read_flat
from .storage import MissingFileError, Storage, StoredFile

_TAIL = 1 << 16
"""Bytes at the end of a file that are read at once: mostly the whole footer."""
_SMALL_GAP = 1 << 16
"""Columns nearer to each other than this are read in one request."""


class Damaged(Exception):
    """The bytes are here, and are not what was written."""

    def __init__(self, problem: str, *, column: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.column = problem, column


class ParquetFile:
    """One file with its footer; any thread may read any row group."""

    def __init__(self, storage: Storage, relative: str) -> None:
        """Raises Damaged if the file is missing or has no readable footer, UserError if the store refuses or fails."""
        try:
            self._file = storage.open(relative)
        except MissingFileError as error:
            raise Damaged("there is no such file") from error
        try:
            self.metadata = _footer(self._file)
            self.schema: pa.Schema = self.metadata.schema.to_arrow_schema()
        except (OSError, EOFError, pa.ArrowException) as error:
            raise Damaged(f"not a whole Parquet file ({first_line(error)})") from error

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._file.size

    def read_values(self, group: int, columns: Sequence[str], num_values: int) -> dict[str, pa.ChunkedArray]:
        """The values of lists, row after row; of those of the columns that can be read without their levels (`flat`).

        Left out is also what is damaged: `read` says how.

        Args:
            num_values: of each column; another number is left out as well.
        """
        values: dict[str, pa.ChunkedArray] = {}
        types = {name: self.schema.field(name).type for name in columns}
        chunks = [
            (name, chunk)
            for name, chunk in self._chunks(group, columns)
            if pa.types.is_list(types[name]) and is_flat(chunk, types[name].value_type, num_values)
        ]
        for begin, end, stretch in _stretches(chunks):
            names = [name for name, _ in stretch]
            value_types = [types[name].value_type for name in names]
            # From the byte before, as a dictionary at place 0 would be taken for none.
            first = begin - 1
            try:
                data = self._file.read(first, end - first, f", row group {group}")
                found = read_flat(data, [chunk for _, chunk in stretch], value_types, begin=first)
            except (OSError, EOFError, pa.ArrowException):
                continue
            if found is not None:
                values.update(zip(names, found, strict=True))
        return values

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of a row group. Raises Damaged, with the column, if one cannot be decoded."""
        try:
            return self._decode(group, columns)
        except Damaged as damaged:
            if len(columns) == 1:
                raise Damaged(damaged.problem, column=columns[0]) from damaged
        for column in columns:
            self.read(group, [column])
        raise Damaged("undecodable")

    def _decode(self, group: int, columns: Sequence[str]) -> pa.Table:
        try:
            ranges = [(begin, end) for begin, end, _ in _stretches(self._chunks(group, columns))]
            source = _Fetched(self._file, ranges, f", row group {group}")
            with pq.ParquetFile(
                pa.PythonFile(source, mode="r"),
                metadata=self.metadata,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as file:
                return file.read_row_group(group, columns=list(columns), use_threads=False)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise Damaged(first_line(error)) from error

    def _chunks(self, group: int, columns: Sequence[str]) -> list[_Chunk]:
        """What stores these columns."""
        wanted, found = set(columns), self.metadata.row_group(group)
        chunks = [found.column(number) for number in range(found.num_columns)]
        named = [(chunk.path_in_schema.partition(".")[0], chunk) for chunk in chunks]
        return [(name, chunk) for name, chunk in named if name in wanted]


_Chunk = tuple[str, pq.ColumnChunkMetaData]
"""With the name of the column."""


def _stretches(chunks: Sequence[_Chunk]) -> list[tuple[int, int, list[_Chunk]]]:
    """[begin, end) of the bytes of these chunks, and which lie there, neighbours joined."""
    stretches: list[tuple[int, int, list[_Chunk]]] = []
    for (begin, end), name, chunk in sorted(
        ((_bytes_of(chunk), name, chunk) for name, chunk in chunks), key=lambda each: each[0]
    ):
        if stretches and begin - stretches[-1][1] <= _SMALL_GAP:
            first, last, joined = stretches[-1]
            stretches[-1] = (first, max(end, last), [*joined, (name, chunk)])
        else:
            stretches.append((begin, end, [(name, chunk)]))
    return stretches


def _bytes_of(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    begin = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        begin = min(begin, chunk.dictionary_page_offset)
    return begin, begin + chunk.total_compressed_size


def _footer(file: StoredFile) -> pq.FileMetaData:
    """A footer says at its very end how long it is, and places of the file count from its beginning."""
    tail = file.read(max(file.size - _TAIL, 0), min(file.size, _TAIL), ", footer")
    if bytes(tail[-4:]) != b"PAR1":
        raise EOFError(f"its {file.size} bytes do not end in PAR1, as those of Parquet do: cut off, or of another kind")
    length = int.from_bytes(tail[-8:-4].to_pybytes(), "little") + 8
    if length > file.size:
        raise EOFError(f"it has {file.size} bytes, and ends with a footer of {length}")
    if length > len(tail):
        tail = file.read(file.size - length, length, ", footer")
    return pq.read_metadata(pa.BufferReader(tail))


class _Fetched(io.RawIOBase):
    """A file of which some ranges have been fetched; pyarrow asks for these only."""

    def __init__(self, file: StoredFile, ranges: list[tuple[int, int]], what: str) -> None:
        self._size = file.size
        self._ranges = [(begin, file.read(begin, end - begin, what)) for begin, end in ranges]
        self._place = 0

    def read(self, size: int = -1) -> pa.Buffer:
        for begin, data in self._ranges:
            if begin <= self._place and self._place + size <= begin + len(data):
                found = data[self._place - begin : self._place - begin + size]
                self._place += size
                return found
        raise EOFError(f"bytes {self._place} to {self._place + size} belong to none of the columns")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
