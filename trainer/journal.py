"""Files of JSON lines in a run folder: appended to, also when there is no room, read, and cut at a restart."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.errors import UserError

METRICS_FILE = "metrics.jsonl"
INCIDENTS_FILE = "incidents.jsonl"
"""Batches to look at again, with their rows."""
WAITING_BYTES = 64 * 2**20
"""Of lines that wait in memory for room, at most; then the oldest are given up."""
REMIND_SECONDS = 300.0


def tell(text: str) -> None:
    """Show a line of text on stderr; where that is a file on a full disk, nobody can be told."""
    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


class Journal:
    """A file of JSON lines that appears with its first line. What cannot be written is told, and tried again later.

    Lines keep their order, and a file never has half a line in its middle: what a full disk takes of one is cut off
    again. Nothing is ever raised; training is worth more than its records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # a save brings lines to disk from a thread of its own
        self._descriptor: int | None = None
        self._size = 0
        """Bytes of whole lines in the file."""
        self._is_torn = False
        """Whether part of a line may stand behind them."""
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._given_up = 0
        self._told = -math.inf
        """When it was last told that lines wait."""

    @property
    def missing(self) -> int:
        """Lines that are not in the file."""
        return len(self._waiting) + self._given_up

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, and those before it that still wait."""
        text = (json.dumps(line) + "\n").encode()
        with self._lock:
            self._waiting.append(text)
            self._waiting_bytes += len(text)
            self._write_waiting()
            while self._waiting_bytes > WAITING_BYTES:
                self._waiting_bytes -= len(self._waiting.popleft())
                self._given_up += 1

    def sync(self) -> None:
        """Make the lines survive the machine, those that there is room for."""
        with self._lock:
            self._write_waiting()
            descriptor = self._descriptor
        if descriptor is not None:
            try:
                os.fsync(descriptor)  # without the lock: no step waits for it
            except OSError as error:
                self._tell_of(error)

    def close(self) -> None:
        """Try a last time to write what waits, and close the file."""
        with self._lock:
            self._write_waiting()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _write_waiting(self) -> None:
        late = len(self._waiting) - 1
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            self._tell_of(error)
        else:
            if self._told > -math.inf:
                tell(f"{self.path} can be written again; {max(late, 0)} line(s) that waited are in it{self._lost()}")
                self._told = -math.inf

    def _write(self, line: bytes) -> None:
        descriptor = self._open()
        if self._is_torn:
            self._cut(descriptor)
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            self._is_torn = True
            self._cut(descriptor)
            raise
        self._size += len(line)

    def _cut(self, descriptor: int) -> None:
        """Leave whole lines only; storage that is away may refuse this too, and then it is left to the next line."""
        os.ftruncate(descriptor, self._size)
        self._is_torn = False

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size
        return self._descriptor

    def _tell_of(self, error: OSError) -> None:
        if time.monotonic() - self._told > REMIND_SECONDS:
            self._told = time.monotonic()
            waiting = f"{len(self._waiting)} line(s) wait in memory{self._lost()}"
            tell(f"ATTENTION: cannot write {self.path}: {error.strerror or error}; {waiting}, and training goes on")

    def _lost(self) -> str:
        return f", {self._given_up} older one(s) are lost" if self._given_up else ""


def cut_after(path: Path, step: int) -> None:
    """Cut a file of JSON lines behind those up to `step`, which come first; it needs no room on the disk.

    What is no line goes too, where nothing to keep stands behind it: half a line after a kill, or, after a power cut,
    zeros where lines were that no save had brought to disk.

    Raises:
        UserError: it stands among the lines to keep.
    """
    if not path.exists():
        return
    kept, strange = 0, b""
    with path.open("rb+") as file:
        for line in file:
            found = _step_in(line)
            if found is None:
                strange = strange or line
            elif found > step:
                break
            elif strange:
                raise _no_line(path, strange.decode(errors="replace"))
            else:
                kept += len(line)
        file.truncate(kept)
        os.fsync(file.fileno())
    if strange.endswith(b"\n") or b"\0" in strange:  # half a line is what every kill leaves
        tell(f"ATTENTION: {path} ended in what no run wrote, behind step {step}: {strange[:40]!r}; it is cut off")


def _step_in(line: bytes) -> int | None:
    """The step of a whole line; None if it is none."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    found = value.get("step") if isinstance(value, dict) else None
    return found if isinstance(found, int) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a file of JSON lines; none when there is no file, none of a last line cut off by a kill."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [_parse(line, path) for line in file if line.endswith("\n")]


def _parse(line: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if isinstance(value.get("step"), int):
            return dict(value)
    except (ValueError, AttributeError):
        pass
    raise _no_line(path, line)


def _no_line(path: Path, line: str) -> UserError:
    return UserError(f"{path} has a line that no run wrote: {line[:80]!r}; remove that line to continue")
