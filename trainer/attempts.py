"""Errors that a restart does not mend: torchrun starts failed processes again, whatever they failed of."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_FINAL = "final_exit_code"


def remember_final(exit_code: int) -> None:
    """Let this job's later attempts on this node end at once with the same code."""
    folder = _own_folder()
    if folder is not None:
        with suppress(OSError):  # without room for it, the next attempt finds the same error
            (folder / _FINAL).write_text(str(exit_code))


def final_exit_code() -> int | None:
    """The code with which an earlier attempt of this job ended for good, if one did."""
    folder = _own_folder()
    earlier = folder.parents[1].glob(f"attempt_*/*/{_FINAL}") if folder is not None else iter(())
    return next((int(text) for path in earlier if (text := path.read_text())), None)


def _own_folder() -> Path | None:
    """The log folder `.../attempt_N/LOCAL_RANK` that torchrun gave this process; None without torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(error_file).parent if error_file else None
    return folder if folder is not None and folder.parent.name.startswith("attempt_") else None
