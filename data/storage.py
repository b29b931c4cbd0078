"""Files on a disk or an object store, read in ranges, patiently: what fails for a while is tried again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from .config import RETRY_SECONDS
from .errors import UserError, first_line
from .locations import is_uri, redacted, shown
from .patience import Patience, is_refusal
from .schema import DATASET_FILE, DatasetInfo

T = TypeVar("T")


class MissingFileError(UserError):
    """There is no such file, and the store is sure of it."""


class Storage:
    """The folder of a dataset: a local path, or a URI that pyarrow knows (s3://, gs://, hdfs://, file://).

    Credentials and endpoints come from the URI (`?endpoint_override=…&region=…`) or from where the store's own tools
    take them, such as AWS_* variables; messages never repeat them.
    """

    def __init__(self, path: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._path, self._shown = path, shown(path)
        self._patience = Patience(retry_seconds)
        if not is_uri(path):
            self._files, self._base = fs.LocalFileSystem(), path
            return
        try:
            self._files, self._base = fs.FileSystem.from_uri(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"data.path={self._shown} cannot be opened ({redacted(first_line(error), known=path)}); give a "
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

    def close(self) -> None:
        """Wake whoever waits for the store, and give up."""
        self._patience.end()

    def native(self, relative: str) -> pa.NativeFile:
        """What pyarrow opens; OSError where that fails."""
        return self._files.open_input_file(f"{self._base}/{relative}")

    def patiently(self, action: Callable[[], T], what: str) -> T:
        """What `action` returns; one that fails is repeated with growing pauses, for `retry_seconds`.

        Raises UserError, which names `what`, at once if the store says that another attempt is no use, else
        StorageError at the end.
        """
        return self._patience.patiently(action, what, known=self._path, refuse=_raise_if_final)


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
        # Not `read_buffer` after a seek: threads share the file.
        data = self._file.read_at(length, begin)
        if len(data) != length:
            raise EOFError(f"the file ends at byte {begin + len(data)}, and had {self.size} when it was opened")
        return pa.py_buffer(data)


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


def _opened(file: pa.NativeFile) -> tuple[pa.NativeFile, int]:
    return file, file.size()


def _raise_if_final(failure: OSError, reason: str, what: str) -> None:
    if isinstance(failure, FileNotFoundError) and not is_refusal(reason):
        raise MissingFileError(
            f"{what} cannot be read: there is no such file; restore it, or prepare the dataset again"
        ) from None
    if isinstance(failure, (IsADirectoryError, NotADirectoryError)):
        raise UserError(f"{what} cannot be read ({reason}); restore it, or prepare the dataset again") from None
    if isinstance(failure, (FileNotFoundError, PermissionError)) or is_refusal(reason):
        raise UserError(
            f"{what} cannot be read ({reason}); check the path and its permissions, and, of a store, the keys: no file "
            "of a run keeps those of an address, so give them as the store's own tools take them, or in data.path"
        ) from None
