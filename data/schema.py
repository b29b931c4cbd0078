"""What a prepared dataset is: `dataset.json`, the contract between the preparation and everything that reads it.

A dataset is a folder:

    dataset.json              this module's `DatasetInfo`; written last, so a folder without it is not a dataset
    items.parquet             id int64 (1..num_items), item_id (as in the log), count int64 (training events only)
    histories/part-*.parquet  one row per user: user_id, items, timestamps, actions, num_events, num_train,
                              num_validation, and the declared columns; lists are in true time order, so that a
                              user's first num_train events are for training, the next num_validation for
                              validation and the rest for testing

Declared columns may hold nulls: where the log does, and, per user, where a user has no training event. The dataset is
the history files that `dataset.json` names, in that order; their Parquet pages have checksums.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import UserError

SCHEMA_VERSION = 2
"""Version 1 has no `group_*` of files, no `lengths` and no `minimums`; it is read all the same."""
DATASET_FILE = "dataset.json"
ITEMS_FILE = "items.parquet"
HISTORIES_FOLDER = "histories"

UNKNOWN_ITEM = 0
"""The dense id of an item outside the vocabulary; real items have the ids 1..num_items."""

MAX_ACTIONS = 63
"""Boolean actions share one signed 64-bit mask, whose sign bit stays free."""

BUILT_IN_COLUMNS = ("user_id", "items", "timestamps", "actions", "num_events", "num_train", "num_validation")
"""Columns of every history file; a declared column may not take one of these names."""

_BLOCK = 1 << 20

ColumnKind = Literal["event", "user"]
SplitKind = Literal["leave_last", "split_time", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Which column of the log plays which part."""

    user: str
    item: str
    time: str
    order: str | None = None
    """Column that orders events of equal time; without it, the order of files and rows does."""
    actions: tuple[str, ...] = ()
    """Boolean columns; the k-th is bit k (value 2**k) of `actions` in the histories."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A declared column: one value per event (a list in the histories) or one per user (a scalar)."""

    kind: ColumnKind
    type: str
    """Arrow type of one value, as pyarrow prints it: "int64", "double", "string"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Ids 1..size; `path`, relative to the dataset, maps them to the ids of the log."""

    size: int
    path: str
    sha256: str
    """Checksum of the file, in hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Totals over the whole dataset, after filtering."""

    users: int
    events: int
    items: int
    train_events: int
    validation_events: int
    test_events: int
    unknown_item_events: int
    """Events whose item is `UNKNOWN_ITEM`, that is, absent from the training period."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How events were divided; the fields that the kind does not use are None."""

    kind: SplitKind
    num_events: int | None = None
    """leave_last: this many events of a user are test, as many before them validation."""
    time: int | None = None
    """split_time: events from this time on are test; in the unit of `timestamps`."""
    validation_time: int | None = None
    """split_time: events from this time on, and before `time`, are validation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryFile:
    """One Parquet file of histories; `path` is relative to the dataset."""

    path: str
    rows: int
    row_groups: int
    bytes: int
    sha256: str
    """Checksum of the file, in hex."""
    group_rows: tuple[int, ...] = ()
    """Rows of each row group, in order; this and the next two are empty in datasets of version 1."""
    group_events: tuple[int, ...] = ()
    """Events of each row group, that is, the length of its `items` lists together."""
    group_train_events: tuple[int, ...] = ()
    """Events of each row group that are for training."""

    def damage(self, held: int | None) -> str | None:
        """What is wrong with a file of `held` bytes in this one's place, or with none there; not what they hold."""
        if held == self.bytes:
            return None
        return "is missing" if held is None else f"has {held:,} bytes, but dataset.json says {self.bytes:,}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How many events the users have, over the whole dataset and all parts of the split."""

    mean: float
    quantiles: dict[str, int]
    """By the share of users, "0.5" for the median: the shortest length that this share of users does not exceed."""
    bucket_from: tuple[int, ...]
    """Shortest length of each bucket: 0, 1, 2, 4, 8, …; a bucket ends before the next one begins."""
    bucket_users: tuple[int, ...]
    bucket_events: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimums:
    """Below which number of events users and items were left out; 0 leaves out nothing."""

    user_events: int
    item_events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of the log, in the order in which it was read."""

    path: str
    bytes: int
    sha256: str = ""
    """Checksum of the file, in hex; empty in datasets that were prepared before it was recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """Everything `dataset.json` says, and the folder (`root`) it was read from."""

    root: Path | str
    """A text is the address of a folder in an object store, as messages show it, without keys."""
    roles: Roles
    columns: dict[str, Column]
    vocabularies: dict[str, Vocabulary]
    counts: Counts
    split: Split
    files: tuple[HistoryFile, ...]
    sources: tuple[SourceFile, ...]
    created_by: str
    lengths: Lengths | None = None
    """None in datasets of version 1."""
    minimums: Minimums | None = None
    """None in datasets of version 1, which do not say."""
    schema_version: int = SCHEMA_VERSION

    @property
    def num_items(self) -> int:
        """Size of the item vocabulary; an item table needs num_items + 1 rows, row 0 for unknown items."""
        return self.vocabularies["items"].size

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell datasets apart by their content, wherever they lie and whatever they were made from.

        Equal for one log prepared twice with the same options and libraries; another id of an item, another order of
        the actions or another split change it.
        """
        names = ("roles", "columns", "split", "vocabularies", "counts", "files")
        content = {name: value for name, value in dataclasses.asdict(self).items() if name in names}
        # What the checksum of a file covers is left out, so that datasets keep the fingerprint that runs know them by.
        facts = ("path", "rows", "row_groups", "bytes", "sha256")
        content["files"] = [{name: file[name] for name in facts} for file in content["files"]]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def history_paths(self) -> list[Path]:
        """The history files, in order."""
        return [self.locate(file.path) for file in self.files]

    @property
    def event_columns(self) -> list[str]:
        """Declared columns with one value per event, in declared order."""
        return [name for name, column in self.columns.items() if column.kind == "event"]

    @property
    def user_columns(self) -> list[str]:
        """Declared columns with one value per user, in declared order."""
        return [name for name, column in self.columns.items() if column.kind == "user"]

    @property
    def folder(self) -> Path:
        """`root`, where that is on this machine; raises UserError else."""
        if isinstance(self.root, str):
            raise UserError(f"{self.root} is in an object store, and this needs a folder of this machine; copy it here")
        return self.root

    def locate(self, relative: str) -> Path:
        """The place of a file that the dataset names relative to itself. Raises UserError as `folder` does."""
        return self.folder / relative

    @classmethod
    def load(cls, dir_path: str | os.PathLike[str]) -> "DatasetInfo":
        """Read `dataset.json` of a prepared dataset.

        Raises UserError when the folder is missing, is not a prepared dataset, or was written by a newer version.
        """
        root = Path(dir_path)
        return cls.parse(_read_json(root), root)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], root: Path | str) -> "DatasetInfo":
        """What the content of a `dataset.json` says of the dataset in `root`. Raises UserError as `load` does."""
        version, name = raw.get("schema_version"), f"{root}/{DATASET_FILE}"
        if not isinstance(version, int) or version < 1:
            raise UserError(f"{name}: schema_version={version!r} is not a version; prepare it again")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{name}: schema_version={version}, but this ultrarec reads up to {SCHEMA_VERSION}; "
                "upgrade ultrarec or prepare the dataset again"
            )
        try:
            return _from_json(root, raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is damaged ({error!r}); prepare the dataset again") from error

    def write(self) -> None:
        """Write `dataset.json` into `root` in one atomic step; call it when every other file is on the disk."""
        raw = {"schema_version": self.schema_version, **dataclasses.asdict(self)}
        del raw["root"]
        raw["split"] = {name: value for name, value in raw["split"].items() if value is not None}
        text = json.dumps(raw, indent=2, ensure_ascii=False)
        # Lists of numbers on one line each; no string of JSON holds a line break, so none is touched.
        text = re.sub(r"\[\n\s+([-\d][-\d.,\s]*)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        target = self.folder / DATASET_FILE
        temporary = target.with_name(f".{DATASET_FILE}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)


def file_sha256(path: Path) -> str:
    """Checksum of a file, in hex; reads it in pieces."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):  # hashlib.file_digest came with Python 3.11
            checksum.update(block)
    return checksum.hexdigest()


def _read_json(root: Path) -> dict[str, Any]:
    try:
        raw = json.loads((root / DATASET_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not root.exists():
            raise UserError(
                f"{root} does not exist; make it with `ultrarec prepare LOG --out {root} …`, or correct the path"
            ) from None
        raise UserError(
            f"{root} is not a prepared dataset: it has no {DATASET_FILE}; "
            "give the folder that `ultrarec prepare --out` wrote"
        ) from None
    except PermissionError as error:
        raise UserError(
            f"{root / DATASET_FILE} cannot be read ({error.strerror}); check its permissions, and those of its folders"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{root / DATASET_FILE} cannot be read ({error}); prepare the dataset again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{root / DATASET_FILE} holds no JSON object; prepare the dataset again")
    return raw


_Facts = TypeVar("_Facts", HistoryFile, Lengths)


def _with_tuples(kind: type[_Facts], raw: Mapping[str, Any]) -> _Facts:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return kind(**values)


def _from_json(root: Path | str, raw: Mapping[str, Any]) -> DatasetInfo:
    roles = raw["roles"]
    if "items" not in raw["vocabularies"]:
        raise KeyError("vocabularies.items")
    return DatasetInfo(
        root=root,
        roles=Roles(**{**roles, "actions": tuple(roles["actions"])}),
        columns={name: Column(**column) for name, column in raw["columns"].items()},
        vocabularies={name: Vocabulary(**vocabulary) for name, vocabulary in raw["vocabularies"].items()},
        counts=Counts(**raw["counts"]),
        split=Split(**raw["split"]),
        files=tuple(_with_tuples(HistoryFile, file) for file in raw["files"]),
        sources=tuple(SourceFile(**source) for source in raw["sources"]),
        created_by=raw["created_by"],
        lengths=_with_tuples(Lengths, raw["lengths"]) if raw.get("lengths") else None,
        minimums=Minimums(**raw["minimums"]) if raw.get("minimums") else None,
        schema_version=raw["schema_version"],
    )
