"""Files of a log that lie in an object store: which an address stands for, and how they are read in ranges."""

import io
import threading
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

from ..errors import UserError
from ..locations import shown, split
from ..storage import LOG, Found, Storage, StoredFile

READ_AHEAD = 1 << 20
"""Bytes fetched at least where a file is read from one end to the other: DuckDB asks for 32 KB of a .gz at a time."""


class RemoteFile:
    """A file of a store, as it was listed."""

    def __init__(self, storage: Storage, listed: Found) -> None:
        self.storage, self.listed = storage, listed

    def __str__(self) -> str:
        return self.storage.name_of(self.listed.relative)

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.listed.relative).name

    @property
    def size(self) -> int:
        """In bytes."""
        return self.listed.size

    @cached_property
    def content(self) -> StoredFile:
        """The file, opened once. Raises UserError if it has changed since it was listed."""
        opened = self.storage.open(self.listed.relative)
        if opened.size != self.size:
            raise _changed(self, f"has {opened.size:,} bytes now and had {self.size:,}")
        return opened

    def open(self) -> "Ranges":
        """Read it as others read files; each reader has a place of its own."""
        return Ranges(self)


class Ranges(io.RawIOBase):
    """A remote file as Python calls files.

    Threads may share it as DuckDB's do: they read either all in turn, or each what it has just sought.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._content = file.content
        self._place = 0
        self._sought = threading.local()
        self._ahead = 0, pa.py_buffer(b"")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, for the next read of this thread or, if it reads in turn with others, of all."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._sought.place = self._place
        return self._place

    def tell(self) -> int:
        """Where the next read begins."""
        return vars(self._sought).get("place", self._place)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; less only at the end of the file.

        Raises UserError if the store refuses, StorageError if it does not answer.
        """
        in_turn = "place" not in vars(self._sought)
        place = self._place if in_turn else vars(self._sought).pop("place")
        length = max(min(len(buffer), self._file.size - place), 0)
        try:
            data = self._in_turn(place, length) if in_turn else self._content.read(place, length, "")
        except EOFError as error:
            raise _changed(self._file, f"is shorter: {error}") from None
        buffer[:length] = memoryview(data).cast("B")
        self._place = place + length
        if in_turn:
            self._sought = threading.local()  # what others sought is behind
        return length

    def _in_turn(self, place: int, length: int) -> pa.Buffer:
        begin, data = self._ahead
        if not begin <= place <= place + length <= begin + len(data):
            fetched = min(max(length, READ_AHEAD), self._file.size - place)
            begin, data = self._ahead = place, self._content.read(place, fetched, "")
        return data[place - begin : place - begin + length]

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True


def remote_files(address: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    """The files that an address stands for, sorted: a file, what a folder holds with these suffixes, or a pattern.

    In a folder, names that begin with "_" or a dot are left out, with all below them. `*` and `[…]` match within a
    name, `**` any folders; a name that begins with a dot is matched by a pattern that does only.

    Raises UserError if there is none, or the store refuses to tell; StorageError if it does not answer.
    """
    folder, below = split(address)
    storage = Storage(folder, purpose=LOG)
    is_pattern = "*" in below or "[" in below  # escaped, they are part of a name
    below = unquote(below)
    pattern = below.split("/")
    found = storage.find("" if is_pattern else below, recursive=not is_pattern or len(pattern) > 1 or below == "**")
    if is_pattern:
        found = [file for file in found if _matches(file.relative.split("/"), pattern)]
    elif found and found[0].relative != below:
        found = [file for file in found if _is_part(file.relative[len(below) :].lstrip("/"), suffixes)]
        if not found:
            raise UserError(
                f"{shown(address)}: no file in the folder ends in {', '.join(suffixes)}; name the files themselves"
            )
    if not found:
        raise UserError(f"{shown(address)}: no such file, and no file matches; check the address")
    return [RemoteFile(storage, file) for file in found]


def check_unchanged(files: Iterable[RemoteFile]) -> None:
    """Raise UserError if one of the files is another, or gone, since it was listed."""
    listed: dict[Storage, list[RemoteFile]] = {}
    for file in files:
        listed.setdefault(file.storage, []).append(file)
    for storage, group in listed.items():
        now = {found.relative: found for found in storage.look_up([file.listed.relative for file in group])}
        for file in group:
            found = now.get(file.listed.relative)
            if found != file.listed:
                raise _changed(file, "is gone" if found is None else "was written again")


def _is_part(relative: str, suffixes: tuple[str, ...]) -> bool:
    is_hidden = any(part.startswith(("_", ".")) for part in relative.split("/"))
    return relative.lower().endswith(suffixes) and not is_hidden


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        depth = next((n for n, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(_matches(parts[n:], rest) for n in range(depth + 1)) if rest else depth == len(parts)
    is_hidden = bool(parts) and parts[0].startswith(".") and not first.startswith(".")
    return bool(parts) and not is_hidden and fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def _changed(file: RemoteFile, how: str) -> UserError:
    return UserError(f"{file} changed while it was read (it {how}); wait until the log is written, then prepare again")
