"""Saving while training goes on: a copy in host memory, written by a process, one save in flight.

A step waits for the copy alone. A thread of every rank then has that rank's file written by a process of its own, which
`writer` gives the reasons for; rank 0's thread waits for all of them and writes the index, and last the manifest. What
fails is told and counted, and training goes on.

torch.distributed.checkpoint.async_save does not serve here: its staging, in torch 2.13, asks TorchRec's sharded tensors
for a data pointer, which they refuse.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from ..data.errors import UserError
from .commit import Board, Commit, Failure, SaveError, is_complete
from .config import CheckpointConfig
from .manifest import Manifest, Position, checkpoint_folder, step_of
from .parallel import World, gather_objects, on_main, sum_over_ranks
from .pieces import Image, Piece, signature
from .retention import retain, worth_keeping
from .saved import remember_saved
from .state import TrainState
from .storage import Location, checkpoint_home
from .writer import reason_of

VERSIONED = ("ultrarec", "torch", "torchrec")
PATIENCE_SECONDS = 10.0
"""How long from its beginning a save keeps the next one waiting; one that takes longer costs checkpoints, not steps."""
WAIT_SECONDS = 0.5
"""Between two times that ranks who wait for the end of a save ask each other."""
GIVE_UP_SECONDS = 1.0
"""How long the thread of a save that is given up is waited for."""
END_SECONDS = 10.0
"""How long the end of a run waits for the save in flight, twice: until it is told, and until it has heard."""


class Saver:
    """Writes a run's checkpoints; every rank has one, and all save together.

    Args:
        out: the run folder.
        config_hash, dataset: what checkpoints belong to.
        say: tells the user a line of text.
        limit_seconds: how long storage may take for a save; then it is given up.
        unreadable: complete checkpoints that the storage did not give, and that a save of their step replaces.
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
        limit_seconds: float = math.inf,
        unreadable: Sequence[Location] = (),
    ) -> None:
        self._out, self.home = out, checkpoint_home(config, out)
        self.failures = 0
        """Saves of this process that were left out or came to nothing."""
        self.is_lasting = False
        """Whether the newest save would fail again in the same way, as far as this rank knows."""
        self._config, self._world, self._say = config, world, say
        self._config_hash, self._dataset = config_hash, dataset
        self._limit = limit_seconds
        self._unreadable = {step_of(folder) for folder in unreadable}
        # A process group may see several runs: each has keys of its own in the store.
        name = on_main(world, lambda: uuid.uuid4().hex)
        self._store = PrefixStore(f"checkpoint/{name}", _get_default_store())
        self._stopped = threading.Event()
        self._board = Board(self._store, stopped=self._stopped)
        self._image: Image | None = None
        self._given_up: Image | None = None
        """That of the last save that storage kept from ending."""
        self._last_given_up = 0
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._number = 0
        self._step: int | None = None
        self._error: str | None = None
        self._is_lost = False
        """Whether the newest save ended without word to the other ranks."""
        self._kept: set[int] | None = None

    def save(self, pieces: Sequence[Piece], state: TrainState, *, sync: Sequence[Callable[[], None]]) -> None:
        """Begin to save what this rank holds at this step; all ranks call it at the same one.

        If the save before is still in flight, and has been for PATIENCE_SECONDS, this one is left out, and told; a
        caller to whom it matters has called `wait`. One that has been for the limit is given up, and this one begins.

        Args:
            sync: bring to disk what the run wrote about the steps so far; called before the checkpoint is complete.
        """
        if not self._is_free(state.step):
            return
        if self._step == state.step and self._error is None and self._number:
            return  # it is saved already
        folder = checkpoint_folder(self.home, state.step)
        self._number, self._step, self._is_lost, self.is_lasting = self._number + 1, state.step, False, False
        self._error = self._reserve(pieces)
        if self._error is not None:
            self._tell_failed(folder, state.step)
            return
        image = self._image_of(pieces)
        image.stage(pieces)
        # Of its own: a thread that was given up, and wakes up when its storage does, must find itself stopped.
        self._stopped = threading.Event()
        self._board = Board(self._store, stopped=self._stopped)
        may_replace = state.step in self._unreadable
        manifest = self._manifest(state)
        commit = Commit(self._number, image, folder, manifest, self._world, self._board, sync, may_replace)
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, args=(commit,), name=f"save-{state.step}", daemon=True)
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()
            self._free_image()  # its memory serves no step

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Reserve the memory of saves to come, so that a machine that lacks it says so before the first step.

        Raises:
            UserError: on every rank, that one lacks it.
        """
        if self._config.asynchronous and self._config.every is not None and (problem := self._reserve(pieces)):
            raise UserError(f"{problem}; train on more ranks or on machines with more memory, of which saving needs it")

    @property
    def is_busy(self) -> bool:
        """Whether this rank's save is still in flight, or the process of one that was given up holds its memory."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return is_writing or (self._given_up is not None and not self._given_up.has_ended)

    def has(self, step: int) -> bool:
        """Whether a step has a complete checkpoint of this run, as far as the storage answers."""
        if step in self._unreadable:
            return False
        folder = checkpoint_folder(self.home, step)
        try:
            return is_complete(folder, config_hash=self._config_hash, dataset=self._dataset)
        except (OSError, SaveError, UserError):
            return False

    def wait(self) -> str | None:
        """Wait for the save in flight; why the newest save failed, None if it is complete.

        All ranks call it, and all fail or none.
        """
        if self._thread is not None:
            started = time.monotonic()
            # Together: rank 0 may host the store; if it ended here, ranks that still ask for the outcome would lose it.
            while self._busy_ranks(WAIT_SECONDS):
                if int(sum_over_ranks(torch.tensor([time.monotonic() - started > self._limit]))):
                    self._give_up()
                    return self._error
        step = self._step
        # Its manifest may stand although the word of it was lost.
        if self._error is not None and step is not None and on_main(self._world, lambda: self.has(step)):
            self._error = None
        return self._error

    def _give_up(self) -> None:
        """End, on every rank, a save that storage keeps from ending."""
        self._stopped.set()
        self._given_up, self._last_given_up = self._image, self._number
        self._free_image()
        if self._thread is not None:
            self._thread.join(GIVE_UP_SECONDS)  # whoever waits for other ranks looks up more often
        self._thread = None  # it may hang for ever, and no longer counts
        self._error = f"storage did not take it within {self._limit:g} s (trainer.timeout_seconds)"
        self._tell_failed(checkpoint_folder(self.home, self._step or 0), self._step or 0)

    def close(self) -> None:
        """Give a save in flight a last moment, then leave it unfinished; it needs the process group."""
        if self._thread is not None:
            self._thread.join(END_SECONDS)
            self._stopped.set()
        self._free_image()
        if self._thread is not None:
            # Not for ever: storage that hangs must not keep a process that has failed from telling so.
            self._thread.join(END_SECONDS)

    def _reserve(self, pieces: Sequence[Piece]) -> str | None:
        """Have memory for a copy of what the ranks hold; what one of them lacks, the same on every rank."""
        problem = None
        try:
            self._image_of(pieces)
        except OSError as error:
            size = sum(piece.tensor.nbytes for piece in pieces)
            problem = f"rank {self._world.rank} has no memory for a copy of its {size:,} bytes: {reason_of(error)}"
        return next(filter(None, gather_objects(problem)), None)

    def _image_of(self, pieces: Sequence[Piece]) -> Image:
        """Memory for a copy of this rank's part, which no step changes."""
        if self._image is None or self._image.signature != signature(pieces):
            self._free_image()
            name = f"rank-{self._world.rank:05}.safetensors"
            self._image = Image(name, pieces, pin=self._world.device.type == "cuda")
        return self._image

    def _free_image(self) -> None:
        if self._image is not None:
            self._image.close()
            self._image = None

    def _is_free(self, step: int) -> bool:
        """Whether all ranks have finished the save before; a young one is waited for."""
        if not self._busy_ranks(max(self._began + PATIENCE_SECONDS - time.monotonic(), 0.0)):
            return True
        if self._thread is not None:
            is_late = time.monotonic() > self._began + self._limit
            if int(sum_over_ranks(torch.tensor([is_late]))):
                self._give_up()
                if not self._busy_ranks(0.0):
                    return True
        self.failures += 1
        self._say(
            f"checkpoint of step {step} left out: that of step {self._step} is still being written to {self.home}; "
            "save less often (checkpoint.every), or to faster storage"
        )
        return False

    def _busy_ranks(self, patience: float) -> int:
        """How many ranks are still at the newest save after so many seconds; complete on rank 0, it is so on all."""
        if self._thread is not None:
            self._thread.join(patience)
        is_busy, has_failed = self.is_busy, self._error is not None
        own = [is_busy, self._is_lost, has_failed, self._world.is_main and not is_busy and not has_failed]
        busy, lost, failed, complete = (int(ranks) for ranks in sum_over_ranks(torch.tensor(own)).tolist())
        if lost:
            self._board.is_broken.set()
        if not busy and complete:
            self._error = None  # rank 0 has written the manifest, whatever others have heard of it
        elif not busy and failed and self._error is None:
            self._error = "it failed on another rank"
        return busy

    def _work(self, commit: Commit) -> None:
        """What the thread does: the save, and what its outcome calls for."""
        is_lost = False
        try:
            failure = commit.run()
        except Exception as error:  # of a store that is gone, maybe with the process group
            failure, is_lost = Failure(f"rank {self._world.rank}: {reason_of(error)}", is_lasting=False), True
        if commit.number <= self._last_given_up:
            return  # which is told already
        self._is_lost = is_lost
        if failure is not None:
            self._error, self.is_lasting = failure.reason, failure.is_lasting
            self._tell_failed(commit.folder, commit.manifest.step)
            return
        self._error = None
        self._unreadable.discard(commit.manifest.step)
        if self._world.is_main:
            remember_saved(self._out, self._config.path, commit.manifest.step)
            self._delete_superseded(commit.manifest)

    def _tell_failed(self, folder: Location, step: int) -> None:
        self.failures += 1
        self._say(
            f"CHECKPOINT OF STEP {step} NOT WRITTEN to {folder}: {self._error}; "
            "the last complete checkpoint stands, and training goes on where steps are left"
        )

    def _delete_superseded(self, manifest: Manifest) -> None:
        try:
            self._kept = retain(self.home, self._config, manifest.validations, unreadable=self._unreadable)
        except Exception as error:  # whatever a disk, an object store or a network may raise
            self._say(f"superseded checkpoints of {self.home} could not be deleted: {reason_of(error)}")

    def _manifest(self, state: TrainState) -> Manifest:
        return Manifest(
            step=state.step,
            batches=state.batches,
            world_size=self._world.size,
            loader=Position(state.loader.epoch, state.loader.consumed),
            files=[],
            validations=worth_keeping(state.validations, self._config, kept=self._kept),
            versions={name: version(name) for name in VERSIONED},
            config_hash=self._config_hash,
            dataset=self._dataset,
        )
