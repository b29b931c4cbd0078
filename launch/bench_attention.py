"""`ultrarec bench attention`: how fast the attention is on this machine, in a table, as JSON and as a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import UserError

if TYPE_CHECKING:
    from ..kernels.bench import Comparison

LENGTHS = (256, 1024, 4096)
QUICK_LENGTHS = (64, 256)
SCALING_LENGTH, QUICK_SCALING_LENGTH = 16384, 1024
MEMORY_LENGTH, QUICK_MEMORY_LENGTH = 65536, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec bench attention`."""
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N,…", help="longest sequence of each batch (default: 256,1024,4096)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of q, k and v (default: fp32)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="(default: as many as torch takes)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write attention.json and attention.png there")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast is it")


def run(args: argparse.Namespace) -> int:
    """Check, measure, print; returns 1 without a figure if results are wrong."""
    if args.out is not None and find_spec("matplotlib") is None:
        raise UserError("--out draws a plot with matplotlib, which is not installed; pip install 'ultrarec[bench]'")
    import torch

    from ..kernels import bench

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        bench.check_results(args.dtype)
    except bench.WrongResults as wrong:
        print(f"no figures, as the results are wrong: {wrong}", file=sys.stderr)
        return 1
    report = _measure(args)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "attention.json").write_text(json.dumps(report, indent=2) + "\n")
        _plot(report, args.out / "attention.png")
        print(f"\nwritten: {args.out / 'attention.json'}, {args.out / 'attention.png'}")
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, each printed as it is made."""
    import torch

    from ..kernels import bench

    machine = {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"{bench.NUM_SEQUENCES} sequences of N/4 to N events, 4 heads of 64, causal, forward + backward, {args.dtype}\n"
    )
    print(f"{'N':>6} {'ms':>10} {'padded ms':>10} {'speed-up':>9} {'GFLOP/s':>8} {'fp32 GEMM':>10} {'share':>6}")
    comparisons = []
    for length in args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS):
        comparison = bench.compare(length, args.dtype, available_bytes=_available_bytes())
        print(_line(comparison), flush=True)
        comparisons.append(asdict(comparison) | {"speedup": comparison.speedup, "gemm_share": comparison.gemm_share})
    scaling = bench.scale(QUICK_SCALING_LENGTH if args.quick else SCALING_LENGTH)
    ratio = scaling.doubled_semi_local_milliseconds / scaling.semi_local_milliseconds
    gain = scaling.causal_milliseconds / scaling.semi_local_milliseconds
    print(f"\none sequence of {scaling.length}, window 256, full_tail 256: {scaling.semi_local_milliseconds:.0f} ms")
    print(f"  {gain:.1f} times as fast as causal; twice the length takes {ratio:.2f} times as long", flush=True)
    memory = bench.measure_memory(QUICK_MEMORY_LENGTH if args.quick else MEMORY_LENGTH)
    times = memory.peak_bytes / memory.tensor_bytes
    print(f"one sequence of {memory.length}, 2 heads of 64, causal: peak {memory.peak_bytes / 2**20:.0f} MiB")
    print(f"  {times:.2f} times q, k, v, out and their gradients")
    return {
        "command": shlex.join(["ultrarec", *sys.argv[1:]]),
        "machine": machine,
        "comparisons": comparisons,
        "scaling": asdict(scaling) | {"doubling": ratio, "gain_over_causal": gain},
        "memory": asdict(memory) | {"ratio": times},
    }


def _line(row: Comparison) -> str:
    padded = "too large" if row.padded_milliseconds is None else f"{row.padded_milliseconds:.1f}"
    speedup = "" if row.speedup is None else f"{row.speedup:.1f}x"
    return (
        f"{row.length:>6} {row.milliseconds:>10.1f} {padded:>10} {speedup:>9} {row.gflops:>8.0f} "
        f"{row.gemm_gflops:>10.0f} {row.gemm_share:>6.0%}"
    )


def _plot(report: dict[str, Any], path: Path) -> None:
    """Times of both formulations over the length, and the share of the GEMM rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["comparisons"]
    figure, (times, shares) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = [row["length"] for row in rows]
    padded = [row for row in rows if row["padded_milliseconds"] is not None]
    times.loglog(lengths, [row["milliseconds"] for row in rows], "o-", label="hstu_attention")
    times.loglog([r["length"] for r in padded], [r["padded_milliseconds"] for r in padded], "s--", label="padded dense")
    times.set(xlabel="N, events of the longest sequence", ylabel="forward + backward, ms")
    times.legend()
    shares.bar([str(n) for n in lengths], [100 * row["gemm_share"] for row in rows])
    shares.set(xlabel="N, events of the longest sequence", ylabel="% of the float32 GEMM rate, visible pairs only")
    machine = report["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} thread(s), {rows[0]['dtype']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _lengths(text: str) -> list[int]:
    lengths = [_positive(word) for word in text.split(",")]
    if min(lengths) < 4:
        raise argparse.ArgumentTypeError(f"{min(lengths)} is below 4; sequences have a quarter of the length, at least")
    return lengths


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return platform.processor() or platform.machine()


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
