"""`ultrarec bench loader`: how fast batches come out of a prepared dataset, and in how much memory."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import UserError
from .arguments import positive

if TYPE_CHECKING:
    from ..data.bench import Figures

MEAN_EVENTS = (500, 2000)
QUICK_ROW_GROUPS = 2
COLUMNS = ("first scan", "scan", "first epoch", "epoch", "rate/thread", "first", "share", "peak MiB", "own MiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec bench loader`."""
    from ..data.locations import local_path

    parser.add_argument(
        "path", nargs="?", type=local_path, metavar="DIR", help="a prepared dataset (default: synthetic ones)"
    )
    parser.add_argument("--ranks", type=positive, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--threads", type=positive, default=2, metavar="N", help="of each rank, scan and loader alike (default: 2)"
    )
    parser.add_argument("--batch-tokens", type=positive, default=262_144, metavar="N", help="(default: 262144)")
    parser.add_argument(
        "--turns", type=positive, default=3, metavar="N", help="scans and epochs after the first (default: 3)"
    )
    parser.add_argument(
        "--row-groups", type=positive, default=96, metavar="N", help="of the synthetic datasets (default: 96)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast is it")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    _check(args)
    print(
        f"events/s of {args.ranks} rank(s) with {args.threads} thread(s) each, next-item batches of "
        f"{args.batch_tokens}; first: in fresh memory, epoch over scan; rate/thread: the epoch's rate over the number "
        "of threads, none of which is measured alone; own: peak less what the libraries take"
    )
    print(f"{'dataset':>20} {'rank':>5}" + "".join(f" {name:>11}" for name in COLUMNS) + f" {'imbalance':>9}")
    rows = []
    if args.path is not None:
        rows.append(_measure(args, args.path, str(args.path)))
    else:
        for mean_events in MEAN_EVENTS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_measure_synthetic(args, Path(folder) / "dataset", mean_events))
    if args.out is not None:
        report = {"command": shlex.join(["ultrarec", *sys.argv[1:]]), "figures": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for what could not be measured, or not be kept, before minutes go into it."""
    from ..data import bench

    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.absolute().parent}; make it first")
    row_groups = _synthetic_row_groups(args) if args.path is None else bench.num_row_groups(args.path)
    if row_groups < args.ranks:
        raise UserError(
            f"--ranks {args.ranks}: each scans row groups of its own, and there are {row_groups}; give fewer"
        )


def _synthetic_row_groups(args: argparse.Namespace) -> int:
    return QUICK_ROW_GROUPS if args.quick else args.row_groups


def _measure_synthetic(args: argparse.Namespace, root: Path, mean_events: int) -> dict[str, Any]:
    from ..data import bench

    bench.write_histories(root, mean_events=mean_events, row_groups=_synthetic_row_groups(args))
    return _measure(args, root, f"mean length {mean_events}")


def _measure(args: argparse.Namespace, root: Path, name: str) -> dict[str, Any]:
    from ..data import bench

    turns = 1 if args.quick else args.turns
    ranks = bench.measure(root, ranks=args.ranks, threads=args.threads, batch_tokens=args.batch_tokens, turns=turns)
    found = [_summary(figures, args.threads) for figures in ranks]
    total = _summary(bench.together(ranks), args.threads * args.ranks)
    for rank, values in [*enumerate(found), ("all", total)]:
        print(_line(name, str(rank), values), flush=True)
    return {"dataset": name, "threads": args.threads, "ranks": found, "all": total}


def _summary(figures: Figures, threads: int) -> dict[str, Any]:
    from ..data.bench import usual

    return {
        "first scan": figures.scan[0].rate,
        "scan": usual(figures.scan),
        "first epoch": figures.loader[0].rate,
        "epoch": usual(figures.loader),
        "rate/thread": usual(figures.loader) / threads,
        "first": figures.first_share,
        "share": figures.share,
        "peak MiB": figures.peak_bytes / 2**20,
        "own MiB": (figures.peak_bytes - figures.resident_bytes) / 2**20,
        "imbalance": figures.imbalance,
        "turns": asdict(figures),
    }


def _line(name: str, rank: str, values: dict[str, Any]) -> str:
    shares = ("first", "share")
    cells = [f"{values[column]:>11.0%}" if column in shares else f"{values[column]:>11,.0f}" for column in COLUMNS]
    return f"{name[-20:]:>20} {rank:>5} " + " ".join(cells) + f" {values['imbalance']:>9.3f}"
