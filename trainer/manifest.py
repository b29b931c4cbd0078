"""The manifest, whose presence makes a folder a complete checkpoint; readable without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..data.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint as it was written."""

    name: str
    bytes: int
    sha256: str


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
    def read(folder: Path) -> Manifest:
        """The manifest of a checkpoint folder.

        Raises:
            UserError: there is none, or it is not readable as one.
        """
        path = folder / MANIFEST
        try:
            manifest = TypeAdapter(Manifest).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no complete checkpoint: it has no {MANIFEST}, which is written last"
            ) from None
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"])
            raise UserError(
                f"{path} is not a readable manifest ({place}: {fault['msg']}); delete that folder to use an older one"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {manifest.format_version}; this version of ultrarec reads {FORMAT_VERSION}"
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Write atomically: readers see no manifest or all of it."""
        temporary = folder / f".{MANIFEST}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / MANIFEST)
        # The rename itself is on disk only once the folder is.
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def problems(self, folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong with the files, one sentence each; `part` of `parts` checks its share of them."""
        return [problem for record in self.files[part::parts] if (problem := _problem(folder, record))]


def file_record(path: Path) -> FileRecord:
    """What the manifest says of a file."""
    return FileRecord(path.name, path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    if not path.is_file():
        return f"{record.name} is missing"
    if path.stat().st_size != record.bytes:
        return f"{record.name} has {path.stat().st_size} bytes, written were {record.bytes}"
    if sha256(path) != record.sha256:
        return f"{record.name} has another checksum than when it was written"
    return None


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step stands in a run folder."""
    return out / "checkpoints" / f"step-{step:08d}"


def all_checkpoints(out: Path) -> list[Path]:
    """Every checkpoint folder of a run, complete or not, by step."""
    folders = (out / "checkpoints").glob("step-*")
    return sorted((f for f in folders if step_of(f) is not None), key=lambda folder: step_of(folder) or 0)


def complete_checkpoints(out: Path) -> list[Path]:
    """The folders of a run's complete checkpoints, by step."""
    return [folder for folder in all_checkpoints(out) if (folder / MANIFEST).is_file()]


def step_of(folder: Path) -> int | None:
    """The step that a folder's name gives, None for other names."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if folder.name != digits and digits.isdigit() else None
