"""One job at a time in a run folder: two would train the same steps, and cut off each other's lines."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data.errors import UserError
from .parallel import World, on_main

PATIENCE_SECONDS = 60.0
"""For a job before this one that is about to end; where storage is shared, for its machine to be found dead."""
POLL_SECONDS = 0.2


@contextmanager
def alone_in(out: Path, world: World) -> Iterator[None]:
    """Hold the run folder as long as rank 0 lives; every rank takes part. File systems without locks do without.

    Raises:
        UserError: another job holds it.
    """
    held: list[int] = []
    on_main(world, lambda: held.extend(_lock(out)))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(out: Path) -> list[int]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write the run folder {out}: {error.strerror}; choose another --out") from None
    end = time.monotonic() + PATIENCE_SECONDS
    while not _is_locked(descriptor):
        if time.monotonic() > end:
            os.close(descriptor)
            raise UserError(
                f"another job trains in {out}, and has for more than {PATIENCE_SECONDS:g} s; "
                "wait for its end, stop it, or choose another --out"
            )
        time.sleep(POLL_SECONDS)
    return [descriptor]


def _is_locked(descriptor: int) -> bool:
    with suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
