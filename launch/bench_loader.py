"""`ultrarec bench loader`: how fast batches come out of a prepared dataset, and in how much memory."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

MEAN_EVENTS = (500, 2000)
ROW_GROUPS, QUICK_ROW_GROUPS = 48, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec bench loader`."""
    from ..data.locations import local_path

    parser.add_argument(
        "path", nargs="?", type=local_path, metavar="DIR", help="a prepared dataset (default: synthetic ones)"
    )
    parser.add_argument(
        "--threads", type=_positive, default=2, metavar="N", help="of the scan, and per rank (default: 2)"
    )
    parser.add_argument("--world-size", type=_positive, default=1, metavar="N", help="read as rank 0 of N (default: 1)")
    parser.add_argument("--batch-tokens", type=_positive, default=262_144, metavar="N", help="(default: 262144)")
    parser.add_argument("--turns", type=_positive, default=3, metavar="N", help="epochs that count (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast is it")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    print(f"events/s, {args.threads} thread(s), rank 0 of {args.world_size}, next-item batches of {args.batch_tokens}")
    print(f"{'dataset':>20} {'scan':>12} {'loader':>12} {'share':>6} {'per thread':>12} {'first':>12} {'peak MiB':>9}")
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


def _measure_synthetic(args: argparse.Namespace, root: Path, mean_events: int) -> dict[str, Any]:
    from ..data import bench

    bench.write_histories(root, mean_events=mean_events, row_groups=QUICK_ROW_GROUPS if args.quick else ROW_GROUPS)
    return _measure(args, root, f"mean length {mean_events}")


def _measure(args: argparse.Namespace, root: Path, name: str) -> dict[str, Any]:
    from ..data import bench

    figures = bench.measure(
        root,
        threads=args.threads,
        world_size=args.world_size,
        batch_tokens=args.batch_tokens,
        turns=1 if args.quick else args.turns,
    )
    print(
        f"{name[-20:]:>20} {figures.scan:>12,.0f} {figures.loader:>12,.0f} {figures.share:>6.0%} "
        f"{figures.loader / figures.threads:>12,.0f} {figures.first_epoch:>12,.0f} {figures.peak_bytes / 2**20:>9,.0f}",
        flush=True,
    )
    return {"dataset": name, **asdict(figures), "share": figures.share}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
