"""Files on a disk or an object store, read in ranges, patiently: what fails for a moment is tried again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from .errors import UserError
from .schema import DATASET_FILE, DatasetInfo

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE = 0.25
"""Seconds before the second attempt; each further one is twice as long. Busy object stores recover within seconds."""

_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_REFUSED = re.compile("ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET")


class Storage:
    """The folder of a dataset: a local path, or a URI that pyarrow knows (s3://, gs://, hdfs://, file://).

    Credentials and endpoints come from the URI (`?endpoint_override=…&region=…`) or from where the store's own tools
    take them, such as AWS_* variables; messages never repeat them.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        if not is_uri(path):
            self._files, self._base = fs.LocalFileSystem(), path
            return
        try:
            self._files, self._base = fs.FileSystem.from_uri(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"data.path={self.name_of('')} cannot be opened ({_first_line(error)}); give a folder, or a URI with "
                "one of s3://, gs://, hdfs://"
            ) from None

    def name_of(self, relative: str) -> str:
        """How messages call a file: its path, or its URI without credentials and options."""
        folder = re.sub(r"://[^/@]*@", "://", self._path.partition("?")[0]).rstrip("/")
        return f"{folder}/{relative}" if relative else folder

    def open(self, relative: str) -> StoredFile:
        """A file of the dataset. Raises UserError if there is none, or the store does not answer."""
        name = self.name_of(relative)
        return patiently(lambda: StoredFile(name, self._files.open_input_file(f"{self._base}/{relative}")), name)


class StoredFile:
    """An open file, of which any thread may read any range."""

    def __init__(self, name: str, file: pa.NativeFile) -> None:
        self.name = name
        self._file = file
        self.size: int = file.size()

    def read(self, begin: int, length: int, what: str) -> pa.Buffer:
        """`length` bytes from `begin`; `what` names them in errors.

        Raises EOFError if the file ends before, UserError if the store does not answer.
        """
        if begin < 0 or begin + length > self.size:
            raise EOFError(f"the file ends at byte {self.size}, before byte {begin + length}")
        return patiently(lambda: self._read(begin, length), f"{self.name}{what}")

    def _read(self, begin: int, length: int) -> pa.Buffer:
        # Not `read_buffer` after a seek: threads share the file.
        data = self._file.read_at(length, begin)
        if len(data) != length:
            raise EOFError(f"the file ends at byte {begin + len(data)}, and had {self.size} when it was opened")
        return pa.py_buffer(data)


def patiently(action: Callable[[], T], what: str) -> T:
    """What `action` returns; an action that fails is repeated with growing pauses.

    Raises UserError, which names `what`, at once if the store says that another attempt is no use, else at the end.
    """
    begin = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except OSError as error:
            failure = error
        if isinstance(failure, _FINAL) or _REFUSED.search(str(failure)):
            raise UserError(
                f"{what} cannot be read ({_first_line(failure)}); restore it and its permissions, "
                "or prepare the dataset again"
            ) from None
        if attempt < ATTEMPTS - 1:
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise UserError(
        f"{what} cannot be read: {ATTEMPTS} attempts in {time.monotonic() - begin:.0f} seconds failed "
        f"({_first_line(failure)}); check the storage and the network, then start again to continue"
    ) from failure


def load_dataset(path: str) -> DatasetInfo:
    """What `dataset.json` of a dataset says, wherever it is. Raises UserError if there is none, or it is damaged."""
    if not is_uri(path):
        return DatasetInfo.load(path)
    file = Storage(path).open(DATASET_FILE)
    content = file.read(0, file.size, "").to_pybytes()
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file.name} is damaged ({error}); prepare the dataset again") from error
    return DatasetInfo.parse(raw, Path(path))


def is_uri(path: str) -> bool:
    """Whether this names a place by its scheme, and is no local path."""
    return "://" in path


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
