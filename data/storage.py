"""Files on a disk or an object store, read in ranges, patiently: what fails for a while is tried again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from .config import RETRY_SECONDS
from .errors import UserError, first_line
from .locations import is_uri, redacted, shown
from .patience import LONGEST_PAUSE, Patience, is_refusal
from .schema import DATASET_FILE, DatasetInfo

T = TypeVar("T")


class MissingFileError(UserError):
    """There is no such file, and the store is sure of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Purpose:
    """What a store is read for, as far as messages differ."""

    argument: str
    """Stands before the address that was given."""
    restore: str
    """What to do about a file that is not there."""
    keys: str
    """Where to give them."""
    again: str
    """How to go on when the store is back."""


DATASET = Purpose(
    argument="data.path=",
    restore="restore it, or prepare the dataset again",
    keys="no file of a run keeps those of an address, so give them as the store's own tools take them, or in data.path",
    again="start again to continue; data.retry_seconds says how long to try",
)
LOG = Purpose(
    argument="LOG ",
    restore="restore it, or leave it out of the log",
    keys="give them as the store's own tools take them, or in the address",
    again="prepare again: nothing was written",
)


class Found(NamedTuple):
    """A file as a store lists it."""

    relative: str
    size: int
    modified: int
    """Seconds since 1970; 0 where the store does not say. Some tell more when they list than when they are asked."""


class Storage:
    """A folder, by default that of a dataset: a local path, or a URI that pyarrow knows (s3://, gs://, hdfs://, file://).

    Credentials and endpoints come from the URI (`?endpoint_override=…&region=…`) or from where the store's own tools
    take them, such as AWS_* variables; messages never repeat them.
    """

    def __init__(self, path: str, *, retry_seconds: float = RETRY_SECONDS, purpose: Purpose = DATASET) -> None:
        self._path, self._shown, self._purpose = path, shown(path), purpose
        self._patience = Patience(retry_seconds)
        if not is_uri(path):
            self._files, self._base = fs.LocalFileSystem(), path
            return
        try:
            self._files, self._base = fs.FileSystem.from_uri(_impatient(path, retry_seconds))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{purpose.argument}{self._shown} cannot be opened ({redacted(first_line(error), known=path)}); give a "
                "folder, or a URI with one of s3://, gs://, hdfs://, in which special characters of a key are escaped"
            ) from None

    def name_of(self, relative: str) -> str:
        """How messages call a file: its path, or its URI without credentials and options."""
        return f"{self._shown.rstrip('/')}/{relative}"

    def open(self, relative: str) -> StoredFile:
        """A file of the dataset.

        Raises MissingFileError if there is none, UserError if the store refuses it, StorageError if it stays silent.
        """
        return StoredFile(self, relative)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file of a folder, by its path in the dataset; empty if there is no such folder.

        Raises UserError if the store refuses, StorageError if it stays silent.
        """
        selector = fs.FileSelector(f"{self._base}/{folder}", allow_not_found=True)
        found = self.patiently(lambda: self._files.get_file_info(selector), self.name_of(folder))
        return {f"{folder}/{each.base_name}": each.size for each in found if each.is_file}

    def close(self) -> None:
        """Wake whoever waits for the store, and give up."""
        self._patience.end()

    def find(self, relative: str, *, recursive: bool) -> list[Found]:
        """The file of that name, or all files in the folder of that name, sorted; none if there is neither.

        Raises as `open` does.
        """

        def search() -> list[fs.FileInfo]:
            place = f"{self._base}/{relative}".rstrip("/")
            [info] = self._files.get_file_info([place])
            if info.type != fs.FileType.Directory:
                return [info]
            return self._files.get_file_info(fs.FileSelector(place, recursive=recursive))

        return sorted(self._found(self.patiently(search, self.name_of(relative).rstrip("/"))))

    def look_up(self, relative: Sequence[str]) -> list[Found]:
        """What is there now of these files, in their order. Raises as `open` does."""
        places = [f"{self._base}/{each}" for each in relative]
        return self._found(self.patiently(lambda: self._files.get_file_info(places), self._shown))

    def _found(self, infos: Sequence[fs.FileInfo]) -> list[Found]:
        begin = len(self._base.rstrip("/")) + 1
        files = [each for each in infos if each.type == fs.FileType.File]
        return [Found(each.path[begin:], each.size, (each.mtime_ns or 0) // 10**9) for each in files]

    def native(self, relative: str) -> pa.NativeFile:
        """What pyarrow opens; OSError where that fails."""
        return self._files.open_input_file(f"{self._base}/{relative}")

    def patiently(self, action: Callable[[], T], what: str) -> T:
        """What `action` returns; one that fails is repeated with growing pauses, for `retry_seconds`.

        Raises UserError, which names `what`, at once if the store says that another attempt is no use, else
        StorageError at the end.
        """
        refuse = partial(_raise_if_final, purpose=self._purpose)
        return self._patience.patiently(action, what, known=self._path, refuse=refuse, again=self._purpose.again)


class StoredFile:
    """An open file, of which any thread may read any range."""

    def __init__(self, storage: Storage, relative: str) -> None:
        self.name = storage.name_of(relative)
        self._storage = storage
        self._file: pa.NativeFile
        self.size: int
        self._file, self.size = storage.patiently(lambda: _opened(storage.native(relative)), self.name)

    def read(self, begin: int, length: int, what: str) -> pa.Buffer:
        """`length` bytes from `begin`; `what` names them in errors.

        Raises EOFError if the file ends before, StorageError if the store does not answer.
        """
        if begin + length > self.size:
            raise EOFError(f"the file ends at byte {self.size}, before byte {begin + length}")
        return self._storage.patiently(lambda: self._read(begin, length), f"{self.name}{what}")

    def _read(self, begin: int, length: int) -> pa.Buffer:
        # Not `read_buffer` after a seek: threads share the file. Not `read_at`, which copies into memory of Python.
        data = self._file.get_stream(begin, length).read_buffer(length)
        if len(data) != length:
            raise EOFError(f"the file ends at byte {begin + len(data)}, and had {self.size} when it was opened")
        return data


def load_dataset(path: str, *, retry_seconds: float = RETRY_SECONDS) -> DatasetInfo:
    """What `dataset.json` of a dataset says, wherever it is. Raises UserError if there is none, or it is damaged."""
    if not is_uri(path):
        return DatasetInfo.load(path)
    file = Storage(path, retry_seconds=retry_seconds).open(DATASET_FILE)
    content = file.read(0, file.size, "").to_pybytes()
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file.name} is damaged ({error}); prepare the dataset again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file.name} holds no JSON object; prepare the dataset again")
    return DatasetInfo.parse(raw, shown(path))


def _impatient(address: str, seconds: float) -> str:
    """The address, with a limit to what Google's client spends on attempts of its own, 15 minutes if it is not told.

    It says nothing meanwhile, and is deaf to Ctrl-C and to the end of the run: pauses between attempts are ours.
    """
    scheme, query = address.partition("://")[0].lower(), address.partition("?")[2]
    if scheme not in ("gs", "gcs") or "retry_limit_seconds=" in query:
        return address
    return f"{address}{'&' if query else '?'}retry_limit_seconds={min(seconds, LONGEST_PAUSE)}"


def _opened(file: pa.NativeFile) -> tuple[pa.NativeFile, int]:
    return file, file.size()


def _raise_if_final(failure: OSError, reason: str, what: str, *, purpose: Purpose) -> None:
    if isinstance(failure, FileNotFoundError) and not is_refusal(reason):
        raise MissingFileError(f"{what} cannot be read: there is no such file; {purpose.restore}") from None
    if isinstance(failure, (IsADirectoryError, NotADirectoryError)):
        raise UserError(f"{what} cannot be read ({reason}); {purpose.restore}") from None
    if isinstance(failure, (FileNotFoundError, PermissionError)) or is_refusal(reason):
        raise UserError(
            f"{what} cannot be read ({reason}); check the path and its permissions, and, of a store, the keys: "
            f"{purpose.keys}"
        ) from None
