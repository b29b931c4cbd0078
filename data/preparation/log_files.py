"""The remote files of a log as DuckDB reads them: a file system of our own, with our retries and our errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import duckdb
import fsspec

from ..atomic import waking
from .remote import Ranges, RemoteFile, check_unchanged
from .sources import PROTOCOL, LogPath


class LogFiles(fsspec.AbstractFileSystem):
    """What DuckDB asks of an fsspec file system; paths are addresses behind `PROTOCOL`, and none is a pattern."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, paths: Sequence[LogPath]) -> None:
        super().__init__()
        self._files = {f"{PROTOCOL}://{path}": path for path in paths if isinstance(path, RemoteFile)}
        self._failure: BaseException | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let DuckDB read. Raises what failed here, of which DuckDB would keep but the text, and UserError if a file is
        not what it was.
        """
        try:
            with waking(self._close):
                yield
        except duckdb.Error:
            if self._failure is not None:
                raise self._failure from None
            raise
        if self._failure is not None:
            raise self._failure
        check_unchanged(self._files.values())

    def open(self, path: str, mode: str = "rb", **options: Any) -> "_Reader":
        """A file, for reading."""
        with self._remembered():
            return _Reader(self, self._files[path])

    def size(self, path: str) -> int:
        """Of a file, in bytes."""
        return self._files[path].size

    def modified(self, path: str) -> datetime:
        """When a file was written."""
        return datetime.fromtimestamp(self._files[path].listed.modified, timezone.utc)

    def isfile(self, path: str) -> bool:
        """Whether there is such a file."""
        return path in self._files

    def glob(self, path: str, **options: Any) -> list[str]:
        """The file of that name."""
        return [path]

    def unstrip_protocol(self, name: str) -> str:
        """As it is."""
        return name

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._failure = self._failure or error
            raise

    def _close(self) -> None:
        for file in self._files.values():
            file.storage.close()


class _Reader(Ranges):
    """A file whose failures its file system remembers."""

    def __init__(self, files: LogFiles, file: RemoteFile) -> None:
        super().__init__(file)
        self._files = files

    def readinto(self, buffer: Any) -> int:
        with self._files._remembered():
            return super().readinto(buffer)
