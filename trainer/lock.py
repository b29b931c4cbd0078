"""One job at a time in a run folder: two would train the same steps, and cut off each other's lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.errors import UserError
from ..data.locks import is_locked, open_lock
from .parallel import World, on_main

PATIENCE_SECONDS = 60.0
"""For a job before this one that is about to end; where storage is shared, for its machine to be found dead."""
POLL_SECONDS = 0.2


@contextmanager
def alone_in(out: Path, world: World, *, timeout_seconds: float) -> Iterator[None]:
    """Hold the run folder as long as rank 0 lives; every rank takes part. File systems without locks do without.

    Args:
        timeout_seconds: how long the other ranks wait for rank 0; it gives up well before.

    Raises:
        UserError: another job holds it.
    """
    held: list[int] = []
    patience = min(PATIENCE_SECONDS, timeout_seconds / 2)
    on_main(world, lambda: held.append(_lock(out, patience)))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(out: Path, patience: float) -> int:
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(out)
    except OSError as error:
        raise UserError(f"cannot write the run folder {out}: {error.strerror}; choose another --out") from None
    end = time.monotonic() + patience
    while not is_locked(descriptor):
        if time.monotonic() > end:
            os.close(descriptor)
            raise UserError(
                f"another job trains in {out}, and has for more than {patience:g} s; "
                "wait for its end, stop it, or choose another --out"
            )
        time.sleep(POLL_SECONDS)
    return descriptor
