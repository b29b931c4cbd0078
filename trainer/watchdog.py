"""A watchdog for steps that never end: where every rank stands goes into the run folder, then the process aborts."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .journal import tell

STACKS_FOLDER = "stacks"
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: not 0, so that launchers start again."""
GRACE_SECONDS = 2.0
"""Between writing stacks and aborting: once one rank is gone, torchrun ends the others, and theirs are wanted too."""
LOOKS = 8
"""How often the thread wakes up in the time that a step may take."""


class Watchdog:
    """Aborts this process when no step has finished for `seconds`; everything happens in a thread that mostly sleeps.

    Should the main thread hang without releasing the interpreter's lock, the thread cannot run either: then
    faulthandler's own timer, which needs no lock and is wound up anew at every look, writes the stacks and exits.
    """

    def __init__(self, out: Path, *, rank: int, seconds: float) -> None:
        self._path = stacks_file(out, rank)
        self._file = _open_or_stderr(self._path)
        self._rank, self._seconds = rank, seconds
        self._step, self._since, self._is_evaluating = 0, time.monotonic(), False
        self._paused = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ultrarec-watchdog", daemon=True)

    def start(self, step: int) -> None:
        """Begin to watch; `step` is the last one that has finished."""
        self.beat(step)
        self._thread.start()

    def beat(self, step: int) -> None:
        """A step has finished."""
        self._step, self._since, self._is_evaluating = step, time.monotonic(), False

    def evaluating(self) -> None:
        """A part of an evaluation has finished: a batch, or a chunk of the catalogue."""
        self._since, self._is_evaluating = time.monotonic(), True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that no step needs: saving ends by its own time limit."""
        self._paused = True
        try:
            yield
        finally:
            self._since, self._paused = time.monotonic(), False

    def close(self) -> None:
        """Stop watching; without stacks, no file is left."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not sys.stderr:
            self._file.close()
            with suppress(OSError):  # somebody may have cleared the folder
                if self._path.stat().st_size == 0:
                    self._path.unlink()

    def _watch(self) -> None:
        while not self._end.wait(self._seconds / LOOKS):
            if self._paused:
                faulthandler.cancel_dump_traceback_later()
                continue
            overdue = time.monotonic() - self._since - self._seconds
            if overdue > 0:
                self._abort()
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=self._file)

    def _abort(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        what, last = ("part of an evaluation", "last step") if self._is_evaluating else ("step", "last")
        said = (
            f"rank {self._rank}: no {what} has finished for {self._seconds:g} s, the {last} was {self._step}; "
            f"stacks of all threads in {self._file.name}; aborting (trainer.watchdog_seconds)\n"
        )
        try:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {said}")
            self._file.flush()
            faulthandler.dump_traceback(file=self._file, all_threads=True)
            os.fsync(self._file.fileno())
        except OSError:  # no room there; stderr need not be a file of that disk
            with suppress(OSError):
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with suppress(OSError):
            sys.stderr.write(f"error: {said}")
            sys.stderr.flush()
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_CODE)


def stacks_file(out: Path, rank: int) -> Path:
    """Where a rank of the run in `out` leaves stacks."""
    return out / STACKS_FOLDER / f"rank-{rank}.txt"


def _open_or_stderr(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        tell(f"ATTENTION: cannot write {path}: {error.strerror}; stacks of a step that hangs will go to stderr")
        return sys.stderr
