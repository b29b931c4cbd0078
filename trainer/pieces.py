"""What checkpoints are made of: pieces of named tensors, one file of them per rank, and the index that finds them.

A rank's file has the public safetensors format: 8 bytes with the length of the header, a JSON header, the values. The
index says of every tensor which part of it lies where; the manifest covers every byte with checksums.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from .manifest import Block, DamagedError, FileRecord, Manifest, size_problem, wrong_checksum
from .storage import Location, Reading, put
from .writer import Writer

INDEX = "index.json"
BLOCK_BYTES = 1 << 24
"""Bytes of rows with one checksum: few enough that a reader of some rows reads little else."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that this rank holds: `tensor` begins at `origin` of the whole, which has `shape`."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    origin: tuple[int, ...]

    @staticmethod
    def whole(name: str, tensor: Tensor) -> Piece:
        """A tensor that is not cut."""
        return Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a piece lies: in which file, from which byte on, and which part of its tensor it is."""

    file: str
    offset: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint, and all pieces of it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return _numel(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class Image:
    """The content of a rank's file in host memory, laid out once for pieces of given names, types and shapes; a process
    of its own writes it.

    Args:
        file: name of the file.
        pieces: what it holds.
        pin: lock the memory's pages, so that a GPU can copy to it at full speed.
    """

    def __init__(self, file: str, pieces: Sequence[Piece], *, pin: bool) -> None:
        self.file = file
        # Wide types first: every piece then begins at a multiple of its element size, without holes between pieces.
        self.order = sorted(range(len(pieces)), key=lambda k: -pieces[k].tensor.dtype.itemsize)
        self.signature = signature(pieces)
        header = self._header(pieces)
        size = len(header) + sum(piece.tensor.nbytes for piece in pieces)
        self._writer = Writer(size)
        self.buffer = torch.frombuffer(self._writer.memory, dtype=torch.uint8)[:size]
        self._is_pinned = pin
        if pin:
            _check_cuda(_cudart().cudaHostRegister(self.buffer.data_ptr(), size, 0))
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self.chunks: dict[str, Entry] = {}
        self.ends = [len(header)]
        self._places: list[Tensor] = []
        self._lay_out(pieces)

    def _header(self, pieces: Sequence[Piece]) -> bytes:
        entries: dict[str, Any] = {}
        offset = 0
        for piece in (pieces[k] for k in self.order):
            tensor = piece.tensor
            entries[_key(piece)] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _lay_out(self, pieces: Sequence[Piece]) -> None:
        """Find each piece's place in the buffer, the ends of its blocks, and its entry in the index."""
        offset = self.ends[0]
        for piece in (pieces[k] for k in self.order):
            tensor = piece.tensor
            place = self.buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._places.append(place)
            entry = self.chunks.setdefault(piece.name, Entry(DTYPES[tensor.dtype], piece.shape, []))
            entry.chunks.append(Chunk(self.file, offset, piece.origin, tuple(tensor.shape)))
            self.ends += [offset + end for end in _block_ends(tuple(tensor.shape), tensor.dtype.itemsize)]
            offset += tensor.nbytes

    def stage(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces' present values; when this returns they may change."""
        self._writer.revive()
        for k, place in zip(self.order, self._places, strict=True):
            place.copy_(pieces[k].tensor.detach(), non_blocking=True)
        if self._is_pinned:
            torch.cuda.current_stream().synchronize()

    def write(self, folder: Location) -> FileRecord:
        """Write the file, and make it survive the machine.

        Raises:
            WriteError: the storage failed, or the process that writes died.
        """
        checksums = self._writer.write(folder / self.file, self.ends)
        return FileRecord(self.file, [Block(end, crc) for end, crc in zip(self.ends, checksums, strict=True)])

    def close(self) -> None:
        """End the process that writes, and give up the memory, whoever may still hold this object."""
        self._writer.close()
        if self._is_pinned:
            _check_cuda(_cudart().cudaHostUnregister(self.buffer.data_ptr()))
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._places.clear()
        del self._writer.memory

    @property
    def has_ended(self) -> bool:
        """Whether the process that wrote is gone; one that hangs in its storage goes, and frees its memory, later."""
        return self._writer.has_ended


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check_cuda(code: Any) -> None:
    if int(code) != 0:
        raise RuntimeError(f"CUDA could not lock or unlock host memory for checkpoints: error {int(code)}")


def signature(pieces: Sequence[Piece]) -> list[tuple[Any, ...]]:
    """What an image is laid out for."""
    return [(p.name, p.tensor.dtype, p.tensor.shape, p.shape, p.origin) for p in pieces]


def write_index(folder: Location, parts: Sequence[dict[str, Entry]]) -> FileRecord:
    """Merge what the ranks' files hold into the index of the checkpoint."""
    merged: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.items():
            merged.setdefault(name, Entry(entry.dtype, entry.shape, [])).chunks.extend(entry.chunks)
    content = json.dumps({name: dataclasses.asdict(entry) for name, entry in merged.items()}).encode()
    put(folder / INDEX, content)
    return FileRecord(INDEX, [Block(len(content), zlib.crc32(content))])


class Source:
    """A complete checkpoint to read from; every byte is checked as it is read.

    Args:
        reading: how patient to be with its storage; default: not at all.

    Raises:
        DamagedError: here and from `read`, when a file is not as it was written.
        StorageError: likewise, when the storage does not give it.
    """

    def __init__(self, folder: Location, reading: Reading | None = None) -> None:
        self.folder = folder
        self._reading = reading or Reading()
        self.manifest = Manifest.read(folder, self._reading)
        self._records = {record.name: record for record in self.manifest.files}
        self._ends = {record.name: [block.end for block in record.blocks] for record in self.manifest.files}
        self._files: dict[str, Any] = {}
        self.entries = self._read_index()

    def _read_index(self) -> dict[str, Entry]:
        record = self._records.get(INDEX)
        if record is None:
            raise DamagedError(f"checkpoint {self.folder} is damaged: {INDEX} is missing")
        if problem := self._size_problem(record):
            raise self._damaged(problem)
        content = self._reading((self.folder / INDEX).read_bytes, f"{self.folder}/{INDEX}")
        if zlib.crc32(content) != record.blocks[0].crc32:
            raise self._damaged(wrong_checksum(record))
        try:
            return TypeAdapter(dict[str, Entry]).validate_json(content)
        except ValidationError as error:
            raise self._damaged(f"{INDEX} is no index: {error.errors()[0]['msg']}") from None

    def _damaged(self, problem: str) -> DamagedError:
        return DamagedError(f"checkpoint {self.folder} is damaged: {problem}")

    def size_problems(self, *, part: int, parts: int) -> list[str]:
        """Files that are missing or have another size; `part` of `parts` looks at its share of them."""
        return [problem for record in self.manifest.files[part::parts] if (problem := self._size_problem(record))]

    def _size_problem(self, record: FileRecord) -> str | None:
        return self._reading(lambda: size_problem(self.folder, record), f"{self.folder}/{record.name}")

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole, in host memory."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.read(name, out, origin=(0,) * out.dim())
        return out

    def read(self, name: str, out: Tensor, *, origin: tuple[int, ...]) -> None:
        """Fill `out` with the region of a tensor that begins at `origin`, in place."""
        filled = 0
        for chunk in self.entries[name].chunks:
            low = tuple(max(a, b) for a, b in zip(origin, chunk.origin, strict=True))
            high = tuple(
                min(a + n, b + m) for a, n, b, m in zip(origin, out.shape, chunk.origin, chunk.shape, strict=True)
            )
            if all(a < b for a, b in zip(low, high, strict=True)):
                target = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))]
                within = tuple(a - o for a, o in zip(low, chunk.origin, strict=True))
                self._copy(chunk, target, within)
                filled += target.numel()
        if filled != out.numel():
            raise self._damaged(f"{INDEX} gives {filled} of {out.numel()} values of {name}")

    def _copy(self, chunk: Chunk, target: Tensor, within: tuple[int, ...]) -> None:
        """Fill `target` with the part of a chunk that begins at `within`, block by block."""
        if not chunk.shape:
            chunk, target, within = dataclasses.replace(chunk, shape=(1,)), target.view(1), (0,)
        row_bytes = _numel(chunk.shape[1:]) * target.element_size()
        first, last = within[0], within[0] + target.size(0)
        for start, block in self._blocks(chunk.file, chunk.offset + first * row_bytes, chunk.offset + last * row_bytes):
            begin, end = ((byte - chunk.offset) // row_bytes for byte in (start, block.end))
            low, high = max(begin, first), min(end, last)
            part = target[low - first : high - first]
            rows_shape = (end - begin, *chunk.shape[1:])
            if part.shape == rows_shape and part.is_contiguous() and part.device.type == "cpu":
                self._read_block(chunk.file, start, block, part)
                continue
            rows = torch.empty(rows_shape, dtype=target.dtype)
            self._read_block(chunk.file, start, block, rows)
            columns = (slice(a, a + n) for a, n in zip(within[1:], target.shape[1:], strict=True))
            part.copy_(rows[(slice(low - begin, high - begin), *columns)])

    def _blocks(self, file: str, start: int, end: int) -> Iterator[tuple[int, Block]]:
        """The blocks that overlap the bytes from `start` to `end`, each with its first byte."""
        ends = self._ends[file]
        for k in range(bisect_right(ends, start), len(ends)):
            begin = ends[k - 1] if k else 0
            if begin >= end:
                return
            yield begin, self._records[file].blocks[k]

    def _read_block(self, file: str, start: int, block: Block, out: Tensor) -> None:
        view = out.reshape(-1).view(torch.uint8).numpy().data
        if self._fill(file, start, view) != len(view):
            raise self._damaged(self._size_problem(self._records[file]) or f"{file} ends early")
        if zlib.crc32(view) != block.crc32:
            raise self._damaged(wrong_checksum(self._records[file]))

    def _fill(self, file: str, start: int, view: memoryview) -> int:
        """Read bytes of a file into memory; how many there were."""
        try:
            return self._reading(lambda: self._fill_at_once(file, start, view), f"{self.folder}/{file}")
        except FileNotFoundError:
            raise self._damaged(f"{file} is missing") from None

    def _fill_at_once(self, file: str, start: int, view: memoryview) -> int:
        if file not in self._files:
            self._files[file] = (self.folder / file).open("rb")
        try:
            self._files[file].seek(start)
            return int(self._files[file].readinto(view))
        except OSError:
            self._files.pop(file).close()  # what has failed once may not serve again
            raise


def _key(piece: Piece) -> str:
    """Name of a piece in its file: the tensor's, and the part where it is one."""
    if tuple(piece.tensor.shape) == piece.shape:
        return piece.name
    part = ",".join(f"{o}:{o + n}" for o, n in zip(piece.origin, piece.tensor.shape, strict=True))
    return f"{piece.name}[{part}]"


def _block_ends(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Where the blocks of a piece end, in bytes from its beginning: groups of whole rows."""
    total = _numel(shape) * itemsize
    if total == 0:
        return []
    row = total // shape[0] if shape else total
    step = max(BLOCK_BYTES // row, 1) * row
    return [min(end, total) for end in range(step, total + step, step)]


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
