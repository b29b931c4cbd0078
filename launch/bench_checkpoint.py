"""`ultrarec bench checkpoint`: what saving and loading tables cost on this machine and its disk."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ..data.errors import UserError
from .figures import check_folder, new_files

if TYPE_CHECKING:
    from ..trainer.checkpoint_bench import Round

STALL_GOAL, RATE_GOAL = 0.10, 0.70
LEAST_GIB = 0.001
"""Below, a rank would have no row."""
NEEDED_COPIES = 4
"""Sizes of the tables that the disk must hold: a checkpoint, the one before it, a copy of it, and some room."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec bench checkpoint`."""
    parser.add_argument("--gib", type=_size, default=1.0, metavar="N", help="GiB of tables (default: 1)")
    parser.add_argument("--ranks", type=_count, default=2, metavar="N", help="processes that share them (default: 2)")
    parser.add_argument("--where", type=Path, default=Path(), metavar="DIR", help="disk to measure (default: here)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write checkpoint.json there")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    if not args.where.is_dir():
        raise UserError(f"--where {args.where} is no folder; name one on the disk to measure")
    needed, free = int(NEEDED_COPIES * args.gib * 2**30), shutil.disk_usage(args.where).free
    if free < needed:
        raise UserError(f"--gib {args.gib:g} needs {needed:,} bytes in {args.where.resolve()}, which has {free:,}")
    if args.out is not None:
        check_folder(args.out)
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.where) as folder:
            measured = _measure(Path(folder), ranks=args.ranks, gib=args.gib)
    finally:
        signal.signal(signal.SIGTERM, previous)
    report = _report(measured, args)
    print(_page(report))
    if args.out is not None:
        with new_files(args.out) as folder:
            (folder / "checkpoint.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {args.out / 'checkpoint.json'}")
    return 0


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """Leave like after Ctrl-C, so that what was written is removed."""
    sys.exit(128 + signum)


def _measure(folder: Path, *, ranks: int, gib: float) -> dict[str, Any]:
    """What rank 0 of a new process group measures together with the others."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_rank, args=(folder, rank, ranks, gib, sender if rank == 0 else None))
        for rank in range(ranks)
    ]
    started = []
    try:
        for process in processes:
            process.start()
            started.append(process)
        sender.close()
        measured: dict[str, Any] = receiver.recv()
    except BaseException as error:
        for process in started:
            process.kill()  # they wait for the one that failed, or measure on
        if isinstance(error, EOFError):
            raise UserError("the measurement ended early; what the processes said above tells why") from None
        raise
    finally:
        for process in started:
            process.join()
    return measured


def _rank(folder: Path, rank: int, ranks: int, gib: float, sender: Any) -> None:
    from ..trainer.noise import silence

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the one that waits for us ends us
    silence()
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    from ..trainer.checkpoint_bench import measure

    torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    store = FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    measured = measure(folder, gib=gib, device=torch.device("cpu"))
    if sender is not None:
        sender.send(measured)
    dist.destroy_process_group()


def _report(measured: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    rounds: list[Round] = measured["rounds"]
    seconds = {name: median(asdict(each)[name] for each in rounds) for name in asdict(rounds[0])}
    size = measured["bytes"]
    return {
        "command": shlex.join(["ultrarec", *sys.argv[1:]]),
        "ranks": args.ranks,
        "bytes": size,
        "seconds": seconds,
        "stall_share": seconds["stall"] / seconds["save"],
        "gib_per_second": {name: size / 2**30 / seconds[name] for name in ("save", "load", "copy")},
        "write_share_of_copy": seconds["copy"] / seconds["save"],
        "read_share_of_copy": seconds["copy"] / seconds["load"],
        "step_ratio_while_saving": median(each.step_while_saving / each.step for each in rounds),
        "rounds": [asdict(each) for each in rounds],
    }


def _page(report: dict[str, Any]) -> str:
    seconds, rates = report["seconds"], report["gib_per_second"]
    return "\n".join(
        [
            f"{report['bytes']:,} bytes of {report['ranks']} rank(s), median of {len(report['rounds'])} rounds",
            "",
            f"{'':<26} {'seconds':>8} {'GiB/s':>7}",
            f"{'plain copy, to disk':<26} {seconds['copy']:>8.3f} {rates['copy']:>7.2f}",
            f"{'save, to disk':<26} {seconds['save']:>8.3f} {rates['save']:>7.2f}"
            f"   {report['write_share_of_copy']:.0%} of the copy's rate (goal: {RATE_GOAL:.0%})",
            f"{'load, checked':<26} {seconds['load']:>8.3f} {rates['load']:>7.2f}"
            f"   {report['read_share_of_copy']:.0%} of the copy's rate (goal: {RATE_GOAL:.0%})",
            f"{'stall of a step':<26} {seconds['stall']:>8.3f} {'':>7}"
            f"   {report['stall_share']:.1%} of a save (goal: at most {STALL_GOAL:.0%})",
            f"{'step':<26} {seconds['step']:>8.4f}",
            f"{'step while saving':<26} {seconds['step_while_saving']:>8.4f} {'':>7}"
            f"   {report['step_ratio_while_saving']:.2f} times a step of the same round",
        ]
    )


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST_GIB <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {LEAST_GIB} on")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
