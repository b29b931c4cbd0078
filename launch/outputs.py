"""Folders for what a benchmark finds, made before it measures: it takes minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..data.errors import UserError


def make_folder(path: Path) -> None:
    """Make a folder, and make sure that files can be written to it.

    Raises:
        UserError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror or error}; choose a folder that can be written to") from None
