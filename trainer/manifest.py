"""The manifest, whose presence makes a folder a complete checkpoint; readable without torch."""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from ..data.errors import UserError
from .storage import Location, entries_of, put, size_of

MANIFEST = "manifest.json"
DAMAGED = "manifest.damaged.json"
"""What the manifest of a checkpoint is renamed to that failed its checks when a run wanted to continue from it."""
FORMAT_VERSION = 2


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
    dataset: str
    """Fingerprint of the prepared dataset it was trained on."""
    versions: dict[str, str]
    config_hash: str
    """Identity of model, tables, objective and data order."""
    format_version: int = FORMAT_VERSION

    @staticmethod
    def read(folder: Location) -> Manifest:
        """The manifest of a checkpoint folder.

        Raises:
            DamagedError: it is not readable as one.
            UserError: there is none, or it is another version's.
        """
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
            _check_version(path, content)
            return TypeAdapter(Manifest).validate_json(content)
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last"
            ) from None
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"])
            raise DamagedError(
                f"{path} is not a readable manifest ({place}: {fault['msg']}); delete that folder to use an older one"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def write(self, folder: Location) -> None:
        """Write atomically: readers see no manifest or all of it."""
        put(folder / MANIFEST, json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode())

    @property
    def bytes(self) -> int:
        """Size of all files, the manifest apart."""
        return sum(record.bytes for record in self.files)

    def problems(self, folder: Location) -> list[str]:
        """What is wrong with the files, one sentence each; reads all of them."""
        return [problem for record in self.files if (problem := file_problem(folder, record))]


def _check_version(path: Location, content: bytes) -> None:
    try:
        version = json.loads(content).get("format_version", FORMAT_VERSION)
    except (ValueError, AttributeError):
        return  # no JSON, or no object: the caller's validation says so
    if version != FORMAT_VERSION:
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


def newest_at(place: Location) -> Location:
    """The checkpoint that a place names: itself, or the newest complete one of the run folder that it is.

    Raises:
        UserError: it is neither.
    """
    if (place / MANIFEST).is_file():
        return place
    complete = complete_checkpoints(place)
    if not complete:
        raise UserError(f"{place} is no complete checkpoint: neither it nor checkpoints/step-* below has a {MANIFEST}")
    return complete[-1]


def step_of(folder: Location) -> int | None:
    """The step that a folder's name gives, None for other names."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if folder.name != digits and digits.isdigit() else None
