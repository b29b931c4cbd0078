"""`ultrarec checkpoint list|verify|inspect`: what a run has saved, whether it is whole, and what is in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.errors import UserError
from .manifest import MANIFEST, Manifest, all_checkpoints, complete_checkpoints, step_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec checkpoint`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|inspect")
    for name, text in (
        ("list", "the checkpoints of a run, complete or not"),
        (
            "verify",
            "check every file of a checkpoint (of all of a run's) against its manifest; exit 1 if one is damaged",
        ),
        ("inspect", "the tensors of a checkpoint (of a run's newest) with shapes, types and bytes"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("path", type=Path, metavar="PATH", help="run folder, or folder of one checkpoint")


def run(args: argparse.Namespace) -> int:
    """Carry out the chosen action; returns the exit code."""
    return {"list": list_checkpoints, "verify": verify, "inspect": inspect}[args.action](args.path)


def list_checkpoints(path: Path) -> int:
    """Print one line per checkpoint folder."""
    folders = _folders(path)
    print(f"{'step':>10}  {'epoch':>5}  {'ranks':>5}  {'bytes':>14}  folder")
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            print(f"{step_of(folder) or 0:>10}  {'':>5}  {'':>5}  {'incomplete':>14}  {folder}")
            continue
        manifest = Manifest.read(folder)
        size = sum(record.bytes for record in manifest.files)
        print(f"{manifest.step:>10}  {manifest.loader.last_epoch:>5}  {manifest.world_size:>5}  {size:>14,}  {folder}")
    return 0


def verify(path: Path) -> int:
    """Check sizes and checksums of every complete checkpoint; 1 when something is wrong."""
    folders = [folder for folder in _folders(path) if (folder / MANIFEST).is_file()]
    if not folders:
        raise UserError(f"{path} holds no complete checkpoint")
    damaged = False
    for folder in folders:
        problems = Manifest.read(folder).problems(folder)
        damaged |= bool(problems)
        print(
            f"{'DAMAGED' if problems else 'ok':<8} {folder}{''.join(f'{chr(10)}         {line}' for line in problems)}"
        )
    return int(damaged)


def inspect(path: Path) -> int:
    """Print the manifest and the tensors."""
    folder = path if (path / MANIFEST).is_file() else (complete_checkpoints(path) or [path])[-1]
    manifest = Manifest.read(folder)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    print(
        f"{folder}\nstep {manifest.step}, written by {manifest.world_size} rank(s), "
        f"continues at sample {manifest.loader.consumed} of epoch {manifest.loader.epoch}, dataset {manifest.dataset}"
    )
    print(f"configuration {manifest.config_hash}, versions {manifest.versions}\n")
    print(f"{'bytes':>14}  {'shards':>6}  {'type':<10} {'shape':<18} tensor")
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling damaged bytes may raise
        raise UserError(
            f"{folder / '.metadata'} cannot be read ({error}); "
            f"`ultrarec checkpoint verify {folder}` tells what is damaged"
        ) from error
    for name, entry in sorted(stored.items()):
        if isinstance(entry, TensorStorageMetadata):
            size = entry.size.numel() * entry.properties.dtype.itemsize
            kind = str(entry.properties.dtype).removeprefix("torch.")
            print(f"{size:>14,}  {len(entry.chunks):>6}  {kind:<10} {list(entry.size)!s:<18} {name}")
    return 0


def _folders(path: Path) -> list[Path]:
    """The checkpoint folders at a path: itself, or those of the run."""
    if step_of(path) is not None and path.is_dir():
        return [path]
    folders = all_checkpoints(path)
    if not folders:
        raise UserError(f"{path} is neither a checkpoint nor a run folder with checkpoints/step-*; check the path")
    return folders
