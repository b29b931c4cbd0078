"""One save, from the files of the ranks to the manifest: who writes what, and how all learn whether it is complete.

Ranks leave each other word in the process group's store, so that nothing here gets between the collectives of training.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from torch._C._distributed_c10d import Store

from ..data.patience import is_refusal
from .manifest import MANIFEST, DamagedError, FileRecord, Manifest, discard, size_problem
from .parallel import World
from .pieces import Entry, Image, write_index
from .storage import Location, make_folder
from .writer import reason_of

POLL_SECONDS = 0.005, 0.5
"""Shortest and longest time between two looks at the store; in between, a tenth of what has been waited."""


COMPLETE = "complete"
LASTING = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)
"""What fails in the same way until somebody mends it."""


class SaveError(Exception):
    """A checkpoint could not be written; the message says on which rank, and why."""

    def __init__(self, reason: str, *, is_lasting: bool = False) -> None:
        super().__init__(reason)
        self.is_lasting = is_lasting


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a checkpoint was not written, and whether that lasts until somebody mends it."""

    reason: str
    is_lasting: bool


def is_complete(folder: Location, *, config_hash: str, dataset: str) -> bool:
    """Whether a folder holds a complete checkpoint of this run.

    Raises:
        SaveError: it holds one of another run.
    """
    if not (folder / MANIFEST).is_file():
        return False
    try:
        found = Manifest.read(folder)
    except DamagedError:
        return False
    if (found.config_hash, found.dataset) != (config_hash, dataset):
        told = f"{folder} is a checkpoint of another run; give each run a checkpoint.path of its own"
        raise SaveError(told, is_lasting=True)
    return True


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank contributes to a checkpoint."""

    record: FileRecord
    entries: dict[str, Entry]


class Board:
    """Where the ranks of a run leave each other word about its saves.

    Args:
        store: keys of it belong to this run alone.
        stopped: set when the run ends, or the save is given up; nobody is waited for any more.
    """

    def __init__(self, store: Store, *, stopped: threading.Event) -> None:
        self._store, self._stopped = store, stopped
        self.is_broken = threading.Event()
        """Set when a rank could leave no word, so that nobody waits for it."""

    def tell(self, save: int, name: str, value: dict[str, Any]) -> None:
        """Leave word under a name about the save of this number."""
        self._store.set(f"{save}/{name}", json.dumps(value))

    def hear(self, save: int, name: str) -> dict[str, Any]:
        """What a rank told under this name, as soon as it has.

        Raises:
            SaveError: the run ended first, or a rank can leave no word.
        """
        key, started = f"{save}/{name}", time.monotonic()
        # Not `wait`: it would hold the store's connection, which the main thread may need.
        while not self._store.check([key]):
            if self._stopped.is_set():
                raise SaveError(f"the run ended before rank(s) answered ({name})")
            if self.is_broken.is_set():
                raise SaveError(f"a rank cannot reach the process group's store, and could not answer ({name})")
            time.sleep(min(max((time.monotonic() - started) / 10, POLL_SECONDS[0]), POLL_SECONDS[1]))
        answer: dict[str, Any] = json.loads(self._store.get(key))
        return answer

    def forget(self, save: int, names: Sequence[str]) -> None:
        """Delete what was told about a save that every rank has finished: a store lives as long as the run."""
        for name in names:
            self._store.delete_key(f"{save}/{name}")


@dataclass(frozen=True, slots=True)
class Commit:
    """What one rank does of one save, on a thread beside training."""

    number: int
    """Counts the saves of this process, from 1."""
    image: Image
    folder: Location
    manifest: Manifest
    """All but the files, which are not known yet."""
    world: World
    board: Board
    sync: Sequence[Callable[[], None]]
    """Bring to disk what the run wrote about the steps so far."""
    may_replace: bool = False
    """Whether a complete checkpoint of this step goes: the storage did not give it."""

    def run(self) -> Failure | None:
        """Write, and wait for the others; why the save failed, None if it is complete.

        Whatever else is raised comes from the store: then the others do not know of it.
        """
        try:
            return self._run()
        except SaveError as known:
            return Failure(str(known), known.is_lasting)

    def _run(self) -> Failure | None:
        if self.world.is_main:
            self._forget_last()
            self._tell("ready", self._attempt(self._begin))
        begun = self._hear("ready")
        # In both cases the folder stays as it is: it may hold a complete checkpoint.
        if begun.get("result") == COMPLETE:
            return None
        if "error" in begun:
            return _failure(begun)
        self._tell(f"rank/{self.world.rank}", self._attempt(self._write_part))
        if self.world.is_main:
            parts = [self._hear(f"rank/{rank}") for rank in range(self.world.size)]
            self._tell("outcome", self._attempt(lambda: self._complete(parts)))
        outcome = self._hear("outcome")
        return _failure(outcome) if "error" in outcome else None

    def _attempt(self, work: Callable[[], Any]) -> dict[str, Any]:
        """The result of some work, or why it failed."""
        try:
            return {"result": work()}
        except SaveError as error:
            return {"error": str(error), "lasts": error.is_lasting}
        except Exception as error:  # whatever a disk, an object store or a network may raise
            reason = reason_of(error)
            lasts = getattr(error, "errno", None) in LASTING or is_refusal(reason)
            return {"error": f"rank {self.world.rank}: {reason}", "lasts": lasts}

    def _begin(self) -> str | None:
        """Make the folder ready; COMPLETE if it holds this checkpoint already, which nothing may then touch."""
        found = is_complete(self.folder, config_hash=self.manifest.config_hash, dataset=self.manifest.dataset)
        if found and not self.may_replace:
            return COMPLETE
        discard(self.folder)
        make_folder(self.folder)
        return None

    def _write_part(self) -> dict[str, Any]:
        record = self.image.write(self.folder)
        for bring_to_disk in self.sync:
            bring_to_disk()
        return dataclasses.asdict(Part(record, self.image.chunks))

    def _complete(self, answers: list[dict[str, Any]]) -> None:
        """Write index and manifest if every rank has written its file, else remove what there is."""
        try:
            if errors := list(dict.fromkeys(answer["error"] for answer in answers if "error" in answer)):
                raise SaveError("; ".join(errors), is_lasting=any(answer.get("lasts") for answer in answers))
            parts = [TypeAdapter(Part).validate_python(answer["result"]) for answer in answers]
            if lacking := [told for part in parts if (told := size_problem(self.folder, part.record))]:
                told = f"rank 0 does not find what the ranks wrote to {self.folder}: {'; '.join(lacking)}"
                raise SaveError(f"{told}; it must be a folder that all nodes share", is_lasting=True)
            index = write_index(self.folder, [part.entries for part in parts])
            files = [index, *(part.record for part in parts)]
            dataclasses.replace(self.manifest, files=files).write(self.folder)
        except Exception:
            self._attempt(lambda: discard(self.folder))  # a full disk is not helped by half a checkpoint
            raise

    def _tell(self, name: str, value: dict[str, Any]) -> None:
        self.board.tell(self.number, name, value)

    def _hear(self, name: str) -> dict[str, Any]:
        return self.board.hear(self.number, name)

    def _forget_last(self) -> None:
        ranks = (f"rank/{rank}" for rank in range(self.world.size))
        self.board.forget(self.number - 1, ["ready", "outcome", *ranks])


def _failure(answer: dict[str, Any]) -> Failure:
    return Failure(str(answer["error"]), bool(answer["lasts"]))
