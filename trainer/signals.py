"""SIGTERM and SIGINT as requests: finish the step, save, and end with the code that makes a scheduler start again."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .writer import PR_SET_PDEATHSIG

HANDLED = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_SECONDS = 2.0
"""Signals within this time count as one: Slurm signals every process of a step, and torchrun passes its own on."""


class StopRequested(Exception):
    """The run was asked to stop, has saved its last step (or could not, for `error`), and ends."""

    def __init__(self, signum: int, step: int, *, error: str | None) -> None:
        saved = "which is saved" if error is None else f"which could not be saved: {error}"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, {saved}")
        self.exit_code = 128 + signum
        """As a shell gives it for a process that the signal ended; not 0, so that schedulers requeue."""


class StopRequest:
    """Which signal this process has received, if any."""

    def __init__(self) -> None:
        self.signum = 0
        """0 while there is none."""
        self._since = 0.0

    def note(self, signum: int) -> None:
        """Take in a signal; a second request ends the process at once."""
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            os._exit(128 + signum)


@contextmanager
def requests_to_stop() -> Iterator[StopRequest]:
    """Collect signals instead of dying of them.

    A thread reads them from the pipe into which Python's C handler writes their numbers: it hears the second one also
    while the main thread hangs in a collective, where a handler in Python would never run.
    """
    request = StopRequest()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, _left_to_the_thread) for number in HANDLED}
    _stop_when_orphaned()
    thread = threading.Thread(target=_listen, args=(read_end, request), name="ultrarec-signals", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def _stop_when_orphaned() -> None:
    """Take the end of torchrun's agent, even by signal 9, for a request to stop.

    Nobody else would end its ranks, which hold the run folder and can save no more without the agent's store.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _left_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """Python wants a handler of its own before it writes to the pipe."""


def _listen(read_end: int, request: StopRequest) -> None:
    while received := os.read(read_end, 16):
        for signum in received:
            if signum in HANDLED:
                request.note(signum)
