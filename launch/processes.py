"""The processes below this one: who they are, and how all of them end. Linux only (`/proc`)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Process:
    """One process; a pid alone could be somebody else's by the time it is looked at again."""

    pid: int
    started: str

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        status = _read_stat(self.pid)
        return status is not None and status[19] == self.started and status[0] != "Z"

    def send(self, signum: int) -> None:
        """Signal it, if it is still there."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it may end between the look and the call
                os.kill(self.pid, signum)


def adopt_orphans() -> None:
    """From now on a process below this one whose parent dies becomes a child of this one, and can still be found."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[Process]:
    """The live processes directly below this one."""
    return set(_by_parent().get(os.getpid(), []))


def descendants() -> set[Process]:
    """Every live process below this one, children of children included."""
    by_parent = _by_parent()
    found: set[Process] = set()
    open_pids = [os.getpid()]
    while open_pids:
        below = by_parent.get(open_pids.pop(), [])
        found.update(below)
        open_pids.extend(process.pid for process in below)
    return found


def stop_all(
    signum: int, *, grace_seconds: float, meanwhile: Callable[[], None], is_urgent: Callable[[], bool]
) -> None:
    """End every descendant: the signal to the direct children, which pass it on, and SIGKILL to all that outlive it.

    Args:
        signum: what the direct children are sent.
        grace_seconds: how long they may take.
        meanwhile: called while waiting, about ten times a second.
        is_urgent: asked as often; True ends the patience.
    """
    family = descendants()
    for process in children():
        process.send(signum)
    deadline = time.monotonic() + grace_seconds
    while any(process.is_alive() for process in family) and time.monotonic() < deadline and not is_urgent():
        meanwhile()
        time.sleep(0.1)
        family |= descendants()
    for process in family:
        process.send(signal.SIGKILL)


def _by_parent() -> dict[int, list[Process]]:
    """All live processes of the machine, by the pid of their parent."""
    found: dict[int, list[Process]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (status := _read_stat(int(folder.name))) is not None and status[0] != "Z":
            found.setdefault(int(status[1]), []).append(Process(int(folder.name), status[19]))
    return found


def _read_stat(pid: int) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the third on: [0] state, [1] parent, [19] start; None without the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
    return text.rpartition(")")[2].split()
