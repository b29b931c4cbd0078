"""Storage that fails is asked again, with growing pauses, for as long as the user wants to wait."""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tqdm import tqdm

from .errors import StorageError, counted, first_line
from .locations import redacted

T = TypeVar("T")

FIRST_PAUSE = 0.25
"""Seconds before the second attempt, at most; each further one is up to twice as long, until the longest."""
LONGEST_PAUSE = 15.0
SECONDS_BETWEEN_REPORTS = 15.0
SILENT_SECONDS = 5.0
"""Busy object stores recover within seconds; that is not worth a line."""

_REFUSED = re.compile("ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET")


class Patience:
    """How long and how often a store that fails is asked again; shared by all threads that read from it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._reported = -SECONDS_BETWEEN_REPORTS
        self._is_down = False

    def patiently(
        self,
        action: Callable[[], T],
        what: str,
        *,
        refuse: Callable[[OSError, str, str], None],
        known: str = "",
        again: str = "start again to continue; data.retry_seconds says how long to try",
    ) -> T:
        """What `action` returns; one that the storage fails is repeated with growing pauses, as long as this lasts.

        Args:
            what: names it in messages.
            refuse: raises if another attempt is no use; called with the error, what it says, and `what`.
            known: the address that messages of the storage may repeat, with its keys.
            again: how to go on when the storage is back.

        Raises:
            StorageError: at the end.
        """
        begin, attempts = time.monotonic(), 0
        while True:
            attempts += 1
            try:
                result = action()
            except OSError as error:
                failure, reason = error, redacted(first_line(error), known=known)
            else:
                self._recovered(what, time.monotonic() - begin)
                return result
            refuse(failure, reason, what)
            waited = time.monotonic() - begin
            if not self._waits(what, reason, attempts=attempts, waited=waited):
                raise StorageError(
                    f"{what} cannot be read: {counted(attempts, 'attempt')} in {waited:.0f} seconds failed ({reason}); "
                    f"check the storage and the network, then {again}"
                ) from None

    def end(self) -> None:
        """No more attempts."""
        self._ended.set()

    def _waits(self, what: str, reason: str, *, attempts: int, waited: float) -> bool:
        """Pause before another attempt; False if there shall be none."""
        left = self._seconds - waited
        if left <= 0:
            return False
        self._report(what, reason, waited=waited, left=left)
        # Half of it by chance: thousands of readers of one store must not come back all at once.
        pause = min(FIRST_PAUSE * 2 ** min(attempts - 1, 16), LONGEST_PAUSE) * random.uniform(0.5, 1)
        return not self._ended.wait(min(pause, left))

    def _recovered(self, what: str, waited: float) -> None:
        """An attempt has succeeded."""
        if self._is_down:
            with self._lock:
                self._is_down, was_down = False, self._is_down
            if was_down:
                _say(f"{what} answers again, after {waited:.0f} seconds")

    def _report(self, what: str, reason: str, *, waited: float, left: float) -> None:
        """Say now and then what is being waited for; one line, however many threads wait."""
        if waited < min(SILENT_SECONDS, self._seconds / 2):
            return
        with self._lock:
            if time.monotonic() - self._reported < SECONDS_BETWEEN_REPORTS:
                return
            self._reported, self._is_down = time.monotonic(), True
        _say(f"{what} does not answer ({reason}); trying again for up to {left:.0f} more seconds")


def is_refusal(reason: str) -> bool:
    """Whether a store says by this that it will not give something, and not that it cannot for now."""
    return _REFUSED.search(reason) is not None


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
