"""Saving while training goes on: a copy in host memory, written by a thread, one save in flight.

A step waits for the copy alone. The thread of every rank then writes that rank's file; rank 0's waits for all of them
and writes the index, and last the manifest. Ranks tell each other through the process group's store, so that nothing
here gets between the collectives of training. What fails is told and counted, and training goes on.

A thread is enough: writing and checksumming run without Python's lock. A process would need the copy in shared memory,
and take the same time of the processor. Nor does torch.distributed.checkpoint.async_save serve here: its staging, in
torch 2.13, asks TorchRec's sharded tensors for a data pointer, which they refuse.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from .config import CheckpointConfig
from .manifest import FileRecord, Manifest, Position, checkpoint_folder
from .parallel import World, on_main, sum_over_ranks
from .pieces import Entry, Image, Piece, signature, write_index
from .retention import retain
from .state import TrainState
from .storage import checkpoint_home, make_empty, remove_tree

VERSIONED = ("ultrarec", "torch", "torchrec")
PATIENCE_SECONDS = 10.0
"""How long a save that is due waits for the one before; storage slower than that costs checkpoints, not steps."""
POLL_SECONDS = 0.005, 0.5
"""Shortest and longest time between two looks at the store; in between, a tenth of what has been waited."""


class SaveError(Exception):
    """A checkpoint could not be written; the message says on which rank, and why."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank contributes to a checkpoint."""

    record: FileRecord
    entries: dict[str, Entry]


class Saver:
    """Writes a run's checkpoints; every rank has one, and all save together.

    Args:
        out: the run folder, whose metrics say which checkpoint is best.
        config_hash, dataset: what checkpoints belong to.
        say: tells the user a line of text.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        out: Path,
        world: World,
        *,
        config_hash: str,
        dataset: str,
        say: Callable[[str], None],
    ) -> None:
        self.home = checkpoint_home(config, out)
        self.failures = 0
        """Saves of this process that were left out or came to nothing."""
        self._config, self._out, self._world, self._say = config, out, world, say
        self._config_hash, self._dataset = config_hash, dataset
        # A process group may see several runs: each has keys of its own in the store.
        name = on_main(world, lambda: uuid.uuid4().hex)
        self._store = PrefixStore(f"checkpoint/{name}", _get_default_store())
        self._image: Image | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._number = 0
        self._step: int | None = None
        self._error: str | None = None

    def save(self, pieces: Sequence[Piece], state: TrainState, *, sync: Sequence[Callable[[], None]]) -> None:
        """Begin to save what this rank holds at this step; all ranks call it at the same one.

        Args:
            sync: bring to disk what the run wrote about the steps so far; called before the checkpoint is complete.
        """
        if not self._is_free(state.step):
            return
        if self._step == state.step and self._error is None and self._number:
            return  # it is saved already
        if self._image is None or self._image.signature != signature(pieces):
            name = f"rank-{self._world.rank:05}.safetensors"
            self._image = Image(name, pieces, pin=self._world.device.type == "cuda")
        self._image.stage(pieces)
        self._number, self._step, self._error = self._number + 1, state.step, None
        job = _Job(self, self._image, self._number, self._manifest(state), sync)
        self._thread = threading.Thread(target=job.run, name=f"checkpoint-{state.step}", daemon=True)
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()
            self._image = None  # its memory serves no step

    @property
    def is_busy(self) -> bool:
        """Whether this rank's save is still in flight."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> str | None:
        """Wait for the save in flight; why the newest save failed, None if it is complete. The same on every rank."""
        if self._thread is not None:
            self._thread.join()
            # Rank 0 may host the store; if it ended here, ranks that still ask for the outcome would lose it.
            dist.barrier()
        return self._error

    def close(self) -> None:
        """Give a save in flight a last moment, then leave it unfinished; it needs the process group."""
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)
            self._stopped.set()
            # Not for ever: storage that hangs must not keep a process that has failed from telling so.
            self._thread.join(PATIENCE_SECONDS)

    def _is_free(self, step: int) -> bool:
        """Whether all ranks have finished the save before, all of them after the same patience."""
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)
        if sum_over_ranks(torch.tensor([self.is_busy])).item() == 0:
            return True
        self.failures += 1
        self._say(
            f"checkpoint of step {step} left out: that of step {self._step} is still being written to {self.home}; "
            "save less often (checkpoint.every), or to faster storage"
        )
        return False

    def _manifest(self, state: TrainState) -> Manifest:
        return Manifest(
            step=state.step,
            batches=state.batches,
            world_size=self._world.size,
            loader=Position(state.loader.epoch, state.loader.consumed),
            files=[],
            versions={name: version(name) for name in VERSIONED},
            config_hash=self._config_hash,
            dataset=self._dataset,
        )


class _Job:
    """One save, on the thread of one rank."""

    def __init__(
        self, saver: Saver, image: Image, number: int, manifest: Manifest, sync: Sequence[Callable[[], None]]
    ) -> None:
        self.saver, self.image, self.manifest, self.sync = saver, image, manifest, sync
        self.world = saver._world
        self.folder = checkpoint_folder(saver.home, manifest.step)
        self.number = number
        self.store = saver._store

    def run(self) -> None:
        try:
            error = self._save()
        except SaveError as known:
            error = str(known)
        except Exception as unexpected:  # the store is gone with the process group
            error = f"{type(unexpected).__name__}: {unexpected}"
        self.saver._error = error
        if error is not None:
            self.saver.failures += 1
            self.saver._say(
                f"CHECKPOINT OF STEP {self.manifest.step} NOT WRITTEN to {self.folder}: {error}; "
                "training goes on, and the last complete checkpoint stands"
            )

    def _save(self) -> str | None:
        """Why the save failed, None if it is complete."""
        if self.world.is_main:
            self._forget_last()
            self._tell("ready", self._attempt(lambda: make_empty(self.folder)))
        begun = self._hear("ready")
        part = begun if "error" in begun else self._attempt(self._write_part)
        self._tell(f"rank/{self.world.rank}", part)
        if self.world.is_main:
            parts = [self._hear(f"rank/{rank}") for rank in range(self.world.size)]
            self._tell("outcome", self._attempt(lambda: self._complete(parts)))
        outcome: str | None = self._hear("outcome").get("error")
        if self.world.is_main and outcome is None:
            self._delete_superseded()
        return outcome

    def _attempt(self, work: Callable[[], Any]) -> dict[str, Any]:
        """The result of some work, or why it failed."""
        try:
            return {"result": work()}
        except SaveError as error:
            return {"error": str(error)}
        except Exception as error:  # whatever a disk, an object store or a network may raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return {"error": f"rank {self.world.rank}: {reason}"}

    def _write_part(self) -> dict[str, Any]:
        record = self.image.write(self.folder)
        for bring_to_disk in self.sync:
            bring_to_disk()
        return dataclasses.asdict(Part(record, self.image.chunks))

    def _complete(self, answers: list[dict[str, Any]]) -> None:
        """Write index and manifest if every rank has written its file, else remove what there is."""
        try:
            if errors := list(dict.fromkeys(answer["error"] for answer in answers if "error" in answer)):
                raise SaveError("; ".join(errors))
            parts = [TypeAdapter(Part).validate_python(answer["result"]) for answer in answers]
            index = write_index(self.folder, [part.entries for part in parts])
            files = [index, *(part.record for part in parts)]
            dataclasses.replace(self.manifest, files=files).write(self.folder)
        except Exception:
            self._attempt(lambda: remove_tree(self.folder))  # a full disk is not helped by half a checkpoint
            raise

    def _delete_superseded(self) -> None:
        problem = self._attempt(lambda: retain(self.saver.home, self.saver._config, out=self.saver._out))
        if "error" in problem:
            self.saver._say(f"superseded checkpoints of {self.saver.home} could not be deleted: {problem['error']}")

    def _key(self, name: str, number: int) -> str:
        return f"{number}/{name}"

    def _tell(self, name: str, value: dict[str, Any]) -> None:
        self.store.set(self._key(name, self.number), json.dumps(value))

    def _hear(self, name: str) -> dict[str, Any]:
        """What a rank told under this name, as soon as it has."""
        key, started = self._key(name, self.number), time.monotonic()
        # Not `wait`: it would hold the store's connection, which the main thread may need.
        while not self.store.check([key]):
            if self.saver._stopped.is_set():
                raise SaveError(f"the run ended before rank(s) answered ({name})")
            time.sleep(min(max((time.monotonic() - started) / 10, POLL_SECONDS[0]), POLL_SECONDS[1]))
        answer: dict[str, Any] = json.loads(self.store.get(key))
        return answer

    def _forget_last(self) -> None:
        """Delete the answers of the save before, which every rank has read: a store lives as long as the run."""
        names = ["ready", "outcome", *(f"rank/{rank}" for rank in range(self.world.size))]
        for name in names:
            self.store.delete_key(self._key(name, self.number - 1))
