"""Where benchmarks leave their figures: a folder that is tried before minutes are spent, and files that are whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.errors import UserError


def check_folder(folder: Path) -> None:
    """Make the folder of `--out` and write to it; UserError unless that works."""
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files are in `folder` once all are written; UserError, and none, if that fails."""
    with _naming(folder), tempfile.TemporaryDirectory(prefix="figures-", dir=folder) as scratch:
        yield Path(scratch)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {folder} cannot be written to: {reason}; give a folder of yours with room") from error
