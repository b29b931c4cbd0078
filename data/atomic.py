"""Folders that are there whole or not at all, also after Ctrl-C, SIGTERM and a full disk."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .errors import UserError


@contextmanager
def temporary_beside(out: Path) -> Iterator[Path]:
    """A folder on the file system of `out`, removed at the end whatever happens.

    Raises UserError if `out` exists, if the folder cannot be made, and when the disk is full.
    """
    if os.path.lexists(out):  # unlike Path.exists, it takes a name of any length
        raise UserError(f"--out {out} exists already; nothing is overwritten: give a new folder, or remove that one")
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    new_parents = [parent for parent in folder.parents if not os.path.lexists(parent)]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        _remove_empty(new_parents)
        raise UserError(f"--out {out}: {folder} cannot be made ({error.strerror}); give another place") from error
    try:
        with full_disk_explained(out):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(new_parents)


@contextmanager
def full_disk_explained(out: Path) -> Iterator[None]:
    """Raise UserError in place of whatever a library makes of a full disk."""
    try:
        yield
    except Exception as error:
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise UserError(
                f"--out {out}: the disk is full; sorting needs several times the size of the log beside the output: "
                "free some, or give another place"
            ) from error
        raise


@contextmanager
def termination_as_interruption() -> Iterator[None]:
    """Let SIGTERM, as job schedulers and `kill` send it, end the work as Ctrl-C does: cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_empty(folders: list[Path]) -> None:
    """Remove what is empty, innermost first; a folder that holds the complete output stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
