"""`ultrarec checkpoint`: what a run has saved, is it whole, what is in it, what changed; and a copy to serve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.errors import UserError
from ..data.locations import is_uri, local_path
from .config import load_config
from .manifest import MANIFEST, DamagedError, Manifest, all_checkpoints, checkpoints_at, step_of, use_newest
from .storage import Location, checkpoint_home, location

if TYPE_CHECKING:
    from .pieces import Source

ONE_OR_RUN = "run folder, folder of one checkpoint, or address of either, e.g. s3://bucket/run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec checkpoint`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|inspect|diff|export")
    for name, text in (
        ("list", "the checkpoints of a run, complete or not"),
        (
            "verify",
            "check every file of a checkpoint (of all of a run's) against its manifest; exit 1 if one is damaged",
        ),
        ("inspect", "the tensors of a checkpoint (of a run's newest) with shapes, types and bytes"),
        ("diff", "which tensors of two checkpoints (of two runs' newest) differ, and by how much; exit 1 if any does"),
        ("export", "a checkpoint (a run's newest) for serving: weights as safetensors, tables as Parquet"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("path", metavar="PATH", help=ONE_OR_RUN)
        if name == "diff":
            action.add_argument("other", metavar="OTHER", help="what to compare it with, likewise")
        if name == "export":
            action.add_argument("--out", type=local_path, required=True, metavar="DIR", help="new folder to write")
            action.add_argument(
                "--dataset",
                metavar="DIR",
                help="prepared dataset that tells original item ids (default: data.path of the run's config.toml)",
            )


def run(args: argparse.Namespace) -> int:
    """Carry out the chosen action; returns the exit code."""
    place = _home(args.path)
    if args.action == "diff":
        return diff(_newest_whole(place), _newest_whole(_home(args.other)))
    if args.action == "export":
        return export(place, args.out, dataset=args.dataset or _dataset_of(args.path))
    return {"list": list_checkpoints, "verify": verify, "inspect": inspect}[args.action](place)


def list_checkpoints(place: Location) -> int:
    """Print one line per checkpoint folder."""
    folders = _folders(place)
    print(f"{'step':>10}  {'epoch':>5}  {'ranks':>5}  {'bytes':>14}  folder")
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            print(f"{step_of(folder) or 0:>10}  {'':>5}  {'':>5}  {'incomplete':>14}  {folder}")
            continue
        try:
            manifest = Manifest.read(folder)
        except DamagedError:
            print(f"{step_of(folder) or 0:>10}  {'':>5}  {'':>5}  {'damaged':>14}  {folder}")
            continue
        print(
            f"{manifest.step:>10}  {manifest.loader.last_epoch:>5}  {manifest.world_size:>5}  "
            f"{manifest.bytes:>14,}  {folder}"
        )
    return 0


def verify(place: Location) -> int:
    """Check sizes and checksums of every complete checkpoint; 1 when something is wrong."""
    folders = [folder for folder in _folders(place) if (folder / MANIFEST).is_file()]
    if not folders:
        raise UserError(f"{place} holds no complete checkpoint")
    damaged = False
    for folder in folders:
        problems = _problems(folder)
        damaged |= bool(problems)
        print(
            f"{'DAMAGED' if problems else 'ok':<8} {folder}{''.join(f'{chr(10)}         {line}' for line in problems)}"
        )
    return int(damaged)


def inspect(place: Location) -> int:
    """Print the manifest and the tensors."""
    source = use_newest(checkpoints_at(place), _open, say=_say).value
    manifest = source.manifest
    print(
        f"{source.folder}\nstep {manifest.step}, written by {manifest.world_size} rank(s), "
        f"continues at sample {manifest.loader.consumed} of epoch {manifest.loader.epoch}, dataset {manifest.dataset}"
    )
    print(f"configuration {manifest.config_hash}, versions {manifest.versions}")
    for step, metrics in sorted(manifest.validations.items()):
        shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if value is not None)
        print(f"validation of step {step}: {shown}")
    print()
    print(f"{'bytes':>14}  {'pieces':>6}  {'type':<5} {'shape':<18} tensor")
    for name, entry in sorted(source.entries.items()):
        print(f"{entry.bytes:>14,}  {len(entry.chunks):>6}  {entry.dtype:<5} {list(entry.shape)!s:<18} {name}")
    return 0


def diff(left: Location, right: Location) -> int:
    """Print what differs between two checkpoints; 1 when anything does."""
    from .difference import differences

    lines = list(differences(_open(left), _open(right)))
    print("\n".join(lines) if lines else f"equal, tensor by tensor: {left} and {right}")
    return int(bool(lines))


def export(place: Location, out: Path, *, dataset: str | None) -> int:
    """Write a checkpoint for other programs."""
    if out.exists():
        # Before torch is imported, which takes seconds.
        raise UserError(f"--out {out} exists; choose another folder, or delete it")
    from .export import export

    use_newest(checkpoints_at(place), lambda folder: export(folder, out, dataset=dataset), say=_say)
    return 0


def _newest_whole(place: Location) -> Location:
    """The newest checkpoint of a place whose every byte is as it was written."""

    def check(folder: Location) -> None:
        if problems := _problems(folder):
            raise DamagedError(f"checkpoint {folder} is damaged: {'; '.join(problems)}")

    return use_newest(checkpoints_at(place), check, say=_say).folder


def _problems(folder: Location) -> list[str]:
    """What is wrong with a checkpoint, its manifest included; reads all of it."""
    try:
        return Manifest.read(folder).problems(folder)
    except DamagedError as error:
        return [str(error).partition(" is damaged: ")[2]]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _open(folder: Location) -> Source:
    from .pieces import Source

    return Source(folder)


def _home(text: str) -> Location:
    """The place a user names; for a run that keeps its checkpoints elsewhere, that place."""
    place = location(text)
    if isinstance(place, Path) and (place / "config.toml").is_file():
        return checkpoint_home(load_config(str(place / "config.toml")).checkpoint, place)
    return place


def _dataset_of(text: str) -> str | None:
    """The dataset of the run folder that a path names or lies in, if it is still there."""
    place = location(text)
    for folder in (place, *place.parents[:2]) if isinstance(place, Path) else ():
        if (folder / "config.toml").is_file():
            path = load_config(str(folder / "config.toml")).data.path
            return path if is_uri(path) or Path(path).is_dir() else None
    return None


def _folders(place: Location) -> list[Location]:
    """The checkpoint folders at a place: itself, or those of the run."""
    if (step_of(place) is not None and place.is_dir()) or (place / MANIFEST).is_file():
        return [place]  # the second, also where it was set aside as damaged
    folders = all_checkpoints(place)
    if not folders:
        if isinstance(place, Path) and (place / "config.toml").is_file():
            raise UserError(f"{place} holds a run that has not saved yet: see checkpoint.every in its config.toml")
        raise UserError(f"{place} is neither a checkpoint nor a run folder with checkpoints/step-*; check the path")
    return folders
