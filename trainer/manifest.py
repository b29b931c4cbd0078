"""The manifest, whose presence makes a folder a complete checkpoint; readable without torch."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from ..data.errors import UserError
from .storage import Location, Reading, UnreadableError, entries_of, put, remove_tree, size_of

Value = TypeVar("Value")

MANIFEST = "manifest.json"
FORMAT_VERSION = 4


class DamagedError(UserError):
    """Files of a checkpoint are not as they were written."""


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a file with its own checksum, so that a reader of a part need not read the whole to check it."""

    end: int
    """Byte behind its last; it begins where the one before ends."""
    crc32: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint as it was written."""

    name: str
    blocks: list[Block]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.blocks[-1].end if self.blocks else 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the data the run continues; free of the world size."""

    epoch: int
    consumed: int
    """Samples of the epoch trained over all ranks."""

    @property
    def last_epoch(self) -> int:
        """Epoch of the last trained sample, from 0."""
        return max(self.epoch - 1, 0) if self.consumed == 0 else self.epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says of a checkpoint."""

    step: int
    batches: int
    """Loader batches trained so far."""
    world_size: int
    """Ranks that wrote it."""
    loader: Position
    files: list[FileRecord]
    validations: dict[int, dict[str, float | None]]
    """By step, metrics of the validation split: of every checkpoint that was kept, and the best so far."""
    dataset: str
    """Fingerprint of the prepared dataset it was trained on."""
    versions: dict[str, str]
    config_hash: str
    """Identity of model, tables, objective and data order."""
    format_version: int = FORMAT_VERSION

    @staticmethod
    def read(folder: Location, reading: Reading | None = None) -> Manifest:
        """The manifest of a checkpoint folder.

        Args:
            reading: how patient to be; default: not at all.

        Raises:
            DamagedError: it is not readable as one.
            StorageError: the storage does not give it.
            UserError: there is none, or it is another version's.
        """
        path = folder / MANIFEST
        try:
            content = (reading or Reading())(path.read_bytes, str(path))
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last"
            ) from None
        body = content[: -len(_seal(b""))]
        is_whole = content == body + _seal(body)
        _refuse_other_version(path, content, is_whole=is_whole)
        if not is_whole:
            what = "has another checksum than it says" if _is_sealed(content) else "is cut off, or not what was written"
            raise DamagedError(f"checkpoint {folder} is damaged: {MANIFEST} {what}")
        return TypeAdapter(Manifest).validate_json(content)

    def write(self, folder: Location) -> None:
        """Write atomically: readers see no manifest or all of it."""
        body = json.dumps(dataclasses.asdict(self), separators=(",", ":")).removesuffix("}").encode()
        put(folder / MANIFEST, body + _seal(body))

    @property
    def bytes(self) -> int:
        """Size of all files, the manifest apart."""
        return sum(record.bytes for record in self.files)

    def problems(self, folder: Location) -> list[str]:
        """What is wrong with the files, one sentence each; reads all of them."""
        return [problem for record in self.files if (problem := file_problem(folder, record))]


def _seal(body: bytes) -> bytes:
    """How a manifest ends, whose text up to there is `body`: a last entry with the checksum of that text.

    Every flipped bit is seen: it changes the checksum, or makes this end another one.
    """
    return b',"crc32":"%08x"}' % zlib.crc32(body)


def _is_sealed(content: bytes) -> bool:
    return re.search(rb',"crc32":"[0-9a-f]{8}"}\Z', content) is not None


def _refuse_other_version(path: Location, content: bytes, *, is_whole: bool) -> None:
    """Tell a manifest of another version of this program from a damaged one: up to version 2 they had no checksum."""
    try:
        values = json.loads(content)
        version, has_checksum = values["format_version"], "crc32" in values
    except (ValueError, KeyError, TypeError):
        return
    if version != FORMAT_VERSION and (is_whole or not has_checksum):
        raise UserError(f"{path} has format version {version}; this version of ultrarec reads {FORMAT_VERSION}")


def size_problem(folder: Location, record: FileRecord) -> str | None:
    """What is wrong with the presence and size of a file."""
    size = size_of(folder / record.name)
    if size is None:
        return f"{record.name} is missing"
    if size != record.bytes:
        return f"{record.name} has {size} bytes, written were {record.bytes}"
    return None


def file_problem(folder: Location, record: FileRecord) -> str | None:
    """What is wrong with a file, its content included."""
    if problem := size_problem(folder, record):
        return problem
    start = 0
    with (folder / record.name).open("rb") as file:
        for block in record.blocks:
            if zlib.crc32(file.read(block.end - start)) != block.crc32:
                return wrong_checksum(record)
            start = block.end
    return None


def wrong_checksum(record: FileRecord) -> str:
    """What is said of a file whose bytes changed after it was written."""
    return f"{record.name} has another checksum than when it was written"


def checkpoint_folder(home: Location, step: int) -> Location:
    """Where the checkpoint of a step stands in a run folder, or in what stands in for it (`checkpoint.path`)."""
    return home / "checkpoints" / f"step-{step:08d}"


def all_checkpoints(home: Location) -> list[Location]:
    """Every checkpoint folder of a run, complete or not, by step."""
    folders = entries_of(home / "checkpoints")
    return sorted((f for f in folders if step_of(f) is not None), key=lambda folder: step_of(folder) or 0)


def complete_checkpoints(home: Location) -> list[Location]:
    """The folders of a run's complete checkpoints, by step."""
    return [folder for folder in all_checkpoints(home) if (folder / MANIFEST).is_file()]


def discard(folder: Location) -> None:
    """Delete a checkpoint, its manifest first: a kill in between leaves no half of one that counts."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def checkpoints_at(place: Location) -> list[Location]:
    """What a place names: itself if it is a complete checkpoint, or the complete ones of the run folder it is, by step.

    Raises:
        UserError: it is neither.
    """
    if (place / MANIFEST).is_file():
        return [place]
    if complete := complete_checkpoints(place):
        return complete
    raise UserError(f"{place} is no complete checkpoint: neither it nor checkpoints/step-* below has a {MANIFEST}")


def newest_readable(folders: Sequence[Location], reading: Reading | None = None) -> Manifest | None:
    """The manifest of the newest checkpoint that has a readable one; what loads it tells of the others."""
    for folder in reversed(folders):
        with suppress(DamagedError, UnreadableError):
            return Manifest.read(folder, reading)
    return None


@dataclass(frozen=True, slots=True)
class Used(Generic[Value]):
    """Which checkpoint served, what it gave, and the newer ones that did not."""

    folder: Location
    value: Value
    damaged: list[Location]
    unreadable: list[Location]
    """Those that may be whole, had the storage given them."""


def use_newest(
    folders: Sequence[Location],
    use: Callable[[Location], Value],
    *,
    say: Callable[[str], None],
    as_given: Callable[[Location], str] = str,
) -> Used[Value]:
    """Use the newest undamaged one of complete checkpoints, by step; others are told and passed over.

    A single one was asked for by name, and nothing else is used for it.

    Args:
        as_given: how the user would ask for a checkpoint by name.

    Raises:
        UserError: the only one, or all of them, are damaged.
        UnreadableError: none is usable, and the storage did not give one of them.
    """
    damaged: list[Location] = []
    unreadable: list[Location] = []

    def attempt(folder: Location) -> Used[Value] | None:
        try:
            return Used(folder, use(folder), damaged, unreadable)
        except UnreadableError as error:
            if len(folders) == 1:
                raise
            say(f"ATTENTION: {error}; looking for the checkpoint before it")
            unreadable.append(folder)
            return None
        except DamagedError as error:
            if len(folders) == 1:
                raise DamagedError(f"{error}; {_instead_of(folder, as_given)}") from None
            say(f"ATTENTION: {error}; looking for the checkpoint before it")
            damaged.append(folder)
            return None

    if (used := next(filter(None, map(attempt, reversed(folders))), None)) is not None:
        return used
    if unreadable:
        raise UnreadableError(
            f"{unreadable[-1]} cannot be read, and none of this run's {len(folders)} complete checkpoints can be used; "
            "check the disk and what it is attached to, then start again to continue"
        )
    raise DamagedError(
        f"all {len(folders)} complete checkpoints of this run are damaged, {folders[0]} the oldest of them; restore "
        "their files from a copy, or begin anew with another --out"
    )


def _instead_of(folder: Location, as_given: Callable[[Location], str]) -> str:
    step = step_of(folder) or 0
    older = [each for each in complete_checkpoints(folder.parent.parent) if (step_of(each) or 0) < step]
    if not older:
        return "there is none before it: restore its files from a copy, or begin anew with another --out"
    return f"the one before it is {as_given(older[-1])}: give that instead"


def step_of(folder: Location) -> int | None:
    """The step that a folder's name gives, None for other names."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if folder.name != digits and digits.isdigit() else None
