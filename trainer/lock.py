"""One job at a time in a run folder: two would train the same steps, and cut off each other's lines."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.errors import UserError
from ..data.locks import is_locked, open_lock
from .journal import tell
from .parallel import World, gather_objects, on_main

PATIENCE_SECONDS = 60.0
"""For a job before this one that is about to end; where storage is shared, for its machine to be found dead."""
TELL_SECONDS = 2.0
"""A job that is just ending is waited for without a word."""
POLL_SECONDS = 0.2
SHARED_SECONDS = 5.0
"""Within which a file of one machine is seen by the others."""


@contextmanager
def alone_in(folder: Path, world: World, *, given_as: str, timeout_seconds: float) -> Iterator[None]:
    """Hold a folder of a run, which all ranks must see, as long as rank 0 lives; every rank takes part.

    File systems without locks do without.

    Args:
        given_as: what the user names the folder with.
        timeout_seconds: how long the other ranks wait for rank 0; it gives up well before.

    Raises:
        UserError: another job holds it, or a rank's machine has another folder by that name.
    """
    held: list[int] = []
    patience = min(PATIENCE_SECONDS, timeout_seconds / 2)
    on_main(world, lambda: held.append(_lock(folder, given_as, patience)))
    try:
        _check_shared(folder, given_as, world)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(folder: Path, given_as: str, patience: float) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another {given_as}") from None
    start, is_told = time.monotonic(), False
    while not is_locked(descriptor):
        waited = time.monotonic() - start
        if waited > patience:
            os.close(descriptor)
            raise UserError(
                f"another job trains in {folder}, and has for more than {patience:g} s; "
                f"wait for its end, stop it, or choose another {given_as}"
            )
        if waited > TELL_SECONDS and not is_told:
            tell(f"another job trains in {folder}: waiting up to {patience:g} s for its end")
            is_told = True
        time.sleep(POLL_SECONDS)
    return descriptor


def _check_shared(folder: Path, given_as: str, world: World) -> None:
    """Let every rank look for a file that rank 0 makes; its name is new, so that no machine knows it to be missing."""
    if world.size == 1 or (name := on_main(world, lambda: _put_token(folder))) is None:
        return
    lacking = [rank for rank, found in enumerate(gather_objects(_appears(folder / name))) if not found]
    if world.is_main:
        (folder / name).unlink(missing_ok=True)
    if lacking:
        raise UserError(
            f"rank(s) {', '.join(map(str, lacking))} do not see what rank 0 writes to {folder}, and a checkpoint needs "
            f"all ranks' files in one place; choose a folder that all nodes share as {given_as}"
        )


def _put_token(folder: Path) -> str | None:
    """The name of an empty file; None where there is no room for it, which must keep nobody from training."""
    name = f".shared-{uuid.uuid4().hex}"
    try:
        (folder / name).touch()
    except OSError:
        return None
    return name


def _appears(path: Path) -> bool:
    end = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True
