"""`ultrarec bench attention --static`: what the Triton kernels cost once compiled, on any machine; nothing is timed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..data.errors import UserError
from .figures import check_folder, new_files

if TYPE_CHECKING:
    from ..kernels.static_report import Kernel

TIMED_ONLY = ("lengths", "dtype", "threads", "quick")


def run(args: argparse.Namespace) -> int:
    """Check, compile, print; returns 1 without a figure if results are wrong."""
    _refuse_timing_options(args)
    from ..kernels import bench, static_report

    targets = _targets(args.arch, static_report.ARCHITECTURES)
    if args.out is not None:
        check_folder(args.out)
    try:
        bench.check_kernels()
    except bench.WrongResults as wrong:
        print(f"no figures, as the results are wrong: {wrong}", file=sys.stderr)
        return 1
    print(
        "loops: instructions of a thread per score, and of which kind; not of float32 on NVIDIA devices, whose\n"
        "products are no tensor instructions\n"
    )
    kernels, last = [], None
    for kernel in static_report.report(targets):
        if last != (last := (kernel.target, kernel.setting)):
            print(f"{kernel.target}, {kernel.setting}")
        print(_lines(kernel), flush=True)
        kernels.append(asdict(kernel))
    if args.out is not None:
        with new_files(args.out) as folder:
            report = {"versions": _versions(), "kernels": kernels}
            (folder / "attention_static.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {args.out / 'attention_static.json'}")
    return 0


def _refuse_timing_options(args: argparse.Namespace) -> None:
    for name in TIMED_ONLY:
        if getattr(args, name):
            raise UserError(f"--static times nothing, so --{name} has no meaning beside it; leave one of them out")
    if args.device != "auto":
        raise UserError(f"--static compiles for --arch, not for --device {args.device}; leave one of them out")


def _targets(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    targets = known if text is None else tuple(text.split(","))
    for target in targets:
        if target not in known:
            raise UserError(f"--arch {target!r} is not known; choose from {', '.join(known)}")
    return targets


def _lines(kernel: Kernel) -> str:
    """A line for the kernel, and one for each of its loops."""
    lines = [
        f"  {kernel.name:<8} tile {kernel.tile:<8} registers {kernel.registers:>3}  spilled {kernel.spilled}  "
        f"shared {kernel.shared_bytes / 1024:.0f} KiB  matrix instructions {kernel.matrix_instructions}"
    ]
    for loop in kernel.loops:
        kinds = "  ".join(f"{kind} {number:.2f}" for kind, number in loop.by_kind.items())
        repeated = f"  work done {loop.redundancy:.2f} times" if (loop.redundancy or 1) > 1 else ""
        lines.append(f"    {loop.name:<9} {loop.issued:>6.2f}   {kinds}{repeated}")
    return "\n".join(lines)


def _versions() -> dict[str, Any]:
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}
