"""`ultrarec data describe DIR`: what a prepared dataset holds, in words and as a picture."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError
from .locations import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ultrarec data` on `parser`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summary = "counts, split, lengths of histories, columns and skew of a prepared dataset"
    describe = actions.add_parser("describe", help=summary, description=summary)
    describe.add_argument(
        "dataset", metavar="DIR", help="what `ultrarec prepare --out` wrote, or its address in a store"
    )
    describe.add_argument("--picture", type=local_path, metavar="FILE.png", help="draw the lengths of histories there")


def run(args: argparse.Namespace) -> int:
    """The `data` subcommand; returns the exit status."""
    picture: Path | None = args.picture
    if picture is not None:
        if find_spec("matplotlib") is None:
            raise UserError(f"--picture {picture} needs matplotlib; install it with: pip install 'ultrarec[bench]'")
        if picture.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UserError(f"--picture {picture}: the name must end in .png, .svg or .pdf")
        if not picture.absolute().parent.is_dir():
            raise UserError(f"--picture {picture}: there is no folder {picture.absolute().parent}; make it first")
    from .describe import describe, draw
    from .storage import Storage, load_dataset

    info = load_dataset(args.dataset)
    print("\n".join(describe(info, Storage(args.dataset))))
    if picture is not None:
        draw(info, picture)
        print(f"\npicture: {picture}")
    return 0
