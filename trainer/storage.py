"""Where checkpoints lie: a folder of this machine, or a place in an object store that is used as if it were one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar, cast

from ..data.atomic import sync
from ..data.errors import StorageError, UserError
from ..data.locations import is_uri, redacted, shown
from ..data.patience import Patience, is_refusal
from .config import CheckpointConfig

T = TypeVar("T")


class UnreadableError(StorageError):
    """A disk cannot give what it holds, or this machine cannot get it; it may be whole."""


class Reading:
    """Reads of checkpoints: what storage fails to give is asked for again, as with the dataset.

    Args:
        seconds: for how long.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._patience = Patience(seconds)

    def __call__(self, action: Callable[[], T], what: str) -> T:
        """What `action` returns; `what` names that in messages.

        Raises:
            FileNotFoundError: there is none.
            UnreadableError: a disk fails for good (EIO).
            StorageError: the storage does not answer.
            UserError: the storage says that another attempt is no use.
        """
        failures: list[OSError] = []

        def attempt() -> T:
            try:
                return action()
            except OSError as error:
                failures.append(error)
                raise

        try:
            return self._patience.patiently(attempt, what, refuse=_refuse)
        except StorageError as error:
            if failures[-1].errno == errno.EIO:
                raise UnreadableError(str(error)) from None
            raise


def _refuse(failure: OSError, reason: str, what: str) -> None:
    if isinstance(failure, (PermissionError, IsADirectoryError, NotADirectoryError)) or is_refusal(reason):
        raise UserError(
            f"{what} cannot be read ({reason}); check the path and its permissions, and, of a store, its keys"
        ) from None
    if isinstance(failure, FileNotFoundError):
        raise failure


class RemotePath:
    """A place in an object store, with as much of pathlib.Path as checkpoints need.

    Args:
        path: what pyarrow's file system calls it, e.g. `bucket/run`.
        shown: how a user writes it, e.g. `s3://bucket/run`.
        filesystem: a pyarrow.fs.FileSystem.
    """

    def __init__(self, path: str, *, shown: str, filesystem: Any) -> None:
        self._path = path
        self._shown = shown
        self.filesystem = filesystem

    @property
    def name(self) -> str:
        """The last part."""
        return self._path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The place without its last part."""
        path, shown = self._path.rpartition("/")[0], self._shown.rpartition("/")[0]
        return RemotePath(path, shown=shown, filesystem=self.filesystem)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._path}/{name}", shown=f"{self._shown}/{name}", filesystem=self.filesystem)

    def __str__(self) -> str:
        return self._shown

    def __repr__(self) -> str:
        return f"RemotePath({self._shown!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._shown == other._shown

    def __hash__(self) -> int:
        return hash(self._shown)

    def __fspath__(self) -> str:
        return self._shown

    @property
    def size(self) -> int | None:
        """Bytes of the object; None if there is none of that name."""
        info = self.filesystem.get_file_info(self._path)
        return int(info.size) if info.is_file else None

    def is_file(self) -> bool:
        """Whether there is an object of that name."""
        return self.size is not None

    def is_dir(self) -> bool:
        """Whether objects lie below it."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below; nothing where nothing does."""
        from pyarrow.fs import FileSelector

        for info in self.filesystem.get_file_info(FileSelector(self._path, allow_not_found=True)):
            yield self / info.base_name

    def open(self, mode: str) -> BinaryIO:
        """A stream for `rb` or `wb`; what is written appears at the end, as a whole."""
        stream = self.filesystem.open_input_file(self._path) if mode == "rb" else self._output()
        return cast(BinaryIO, stream)

    def _output(self) -> Any:
        return self.filesystem.open_output_stream(self._path)

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self.filesystem.open_input_file(self._path) as stream:
            return bytes(stream.read())

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if not missing_ok or self.is_file():
            self.filesystem.delete_file(self._path)


Location: TypeAlias = Path | RemotePath


def location(text: str) -> Location:
    """The place that a path or an address such as `s3://bucket/folder` names.

    Raises:
        UserError: no file system of pyarrow is of that kind.
    """
    if not is_uri(text):
        return Path(text)
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(text)
    except (ArrowInvalid, NotImplementedError, OSError) as error:
        raise UserError(
            f"cannot use {shown(text)!r}: {redacted(str(error), known=text)}; give a folder, or an address such as "
            "s3://bucket/run"
        ) from None
    scheme = text.split("://")[0]
    return RemotePath(path.rstrip("/"), shown=f"{scheme}://{path.rstrip('/')}", filesystem=filesystem)


def checkpoint_home(config: CheckpointConfig, out: Path) -> Location:
    """The folder whose `checkpoints/` holds those of a run."""
    return location(config.path) if config.path is not None else out


def size_of(place: Location) -> int | None:
    """Bytes of a file; None if there is none of that name."""
    if isinstance(place, RemotePath):
        return place.size
    return place.stat().st_size if place.is_file() else None


def entries_of(folder: Location) -> list[Location]:
    """What lies directly in a folder; nothing where there is no folder."""
    if isinstance(folder, Path) and not folder.is_dir():
        return []
    return list(folder.iterdir())


def make_folder(folder: Location) -> None:
    """Make a folder that is not there, and those around it; object stores have none to make."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True)
        sync(folder.parent)


def remove_tree(folder: Location) -> None:
    """Delete a folder and all it holds, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=not folder.exists())
    elif folder.is_dir():
        folder.filesystem.delete_dir(folder._path)


def put(place: Location, content: bytes) -> None:
    """Write a file so that readers see nothing of it or all, also after a power cut."""
    if isinstance(place, RemotePath):
        with place.open("wb") as stream:
            stream.write(content)
        return
    temporary = place.with_name(f".{place.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(place)  # on disk only once the folder is
    sync(place.parent)
