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
from . import bench_static, bench_tune
from .arguments import positive
from .figures import check_folder, new_files

if TYPE_CHECKING:
    from ..kernels.bench import Comparison

LENGTHS = (256, 1024, 4096)
GPU_LENGTHS = (1024, 4096, 16384)
QUICK_LENGTHS = (64, 256)
SCALING_LENGTH, QUICK_SCALING_LENGTH = 16384, 1024
MEMORY_LENGTH, QUICK_MEMORY_LENGTH = 65536, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec bench attention`."""
    parser.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,N,…",
        help="longest sequence of each batch (default: 256,1024,4096; on a GPU 1024,4096,16384)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: cuda where there is a GPU)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of q, k and v (default: fp32; on a GPU bf16)")
    parser.add_argument("--threads", type=positive, metavar="N", help="(default: as many as torch takes)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write attention.json and attention.png there")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast is it")
    parser.add_argument(
        "--static", action="store_true", help="time nothing; say what the Triton kernels cost once compiled, GPU or not"
    )
    parser.add_argument(
        "--tune", action="store_true", help="time tile sizes of the Triton kernels on this GPU; runs use the best then"
    )
    parser.add_argument("--arch", metavar="A,A,…", help="devices for --static, such as sm_90 (default: all known)")


def run(args: argparse.Namespace) -> int:
    """Check, measure, print; returns 1 without a figure if results are wrong."""
    if args.tune:
        return bench_tune.run(args)
    if args.static:
        return bench_static.run(args)
    if args.arch is not None:
        raise UserError(f"--arch {args.arch} names devices to compile for; add --static, or leave it out")
    if args.out is not None and find_spec("matplotlib") is None:
        raise UserError("--out draws a plot with matplotlib, which is not installed; pip install 'ultrarec[bench]'")
    import torch

    from ..kernels import bench

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    dtype = args.dtype or ("fp32" if device == "cpu" else "bf16")
    if args.out is not None:
        check_folder(args.out)
    try:
        bench.check_results(dtype, device)
    except bench.WrongResults as wrong:
        print(f"no figures, as the results are wrong: {wrong}", file=sys.stderr)
        return 1
    report = _measure(args, device, dtype)
    if args.out is not None:
        with new_files(args.out) as folder:
            (folder / "attention.json").write_text(json.dumps(report, indent=2) + "\n")
            _plot(report, folder / "attention.png")
        print(f"\nwritten: {args.out / 'attention.json'}, {args.out / 'attention.png'}")
    return 0


def _device(name: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda, but torch finds no CUDA device here; take --device cpu, or run ultrarec doctor")
    return "cuda" if has_gpu and name != "cpu" else "cpu"


def _measure(args: argparse.Namespace, device: str, dtype: str) -> dict[str, Any]:
    """All figures, each printed as it is made."""
    from ..kernels import bench

    machine = _machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{bench.NUM_SEQUENCES} sequences of N/4 to N events, 4 heads of 64, causal, forward + backward, {dtype}\n")
    rate = "fp32 mm" if device == "cpu" else f"{dtype} mm"
    onednn = f" {'oneDNN':>8} {'share':>6}" if device == "cpu" else ""
    print(f"{'N':>6} {'ms':>10} {'padded ms':>10} {'speed-up':>9} {'GFLOP/s':>8} {rate:>8} {'share':>6}{onednn}")
    usual = LENGTHS if device == "cpu" else GPU_LENGTHS
    comparisons = []
    for length in args.lengths or (QUICK_LENGTHS if args.quick else usual):
        row = bench.compare(length, dtype, device=device, available_bytes=_available_bytes(device))
        print(_line(row), flush=True)
        shares = {"speedup": row.speedup, "gemm_share": row.gemm_share, "onednn_share": row.onednn_share}
        comparisons.append(asdict(row) | shares)
    scaling = bench.scale(QUICK_SCALING_LENGTH if args.quick else SCALING_LENGTH, dtype, device)
    ratio = scaling.doubled_semi_local_milliseconds / scaling.semi_local_milliseconds
    gain = scaling.causal_milliseconds / scaling.semi_local_milliseconds
    print(f"\none sequence of {scaling.length}, window 256, full_tail 256: {scaling.semi_local_milliseconds:.3g} ms")
    print(f"  {gain:.1f} times as fast as causal; twice the length takes {ratio:.2f} times as long", flush=True)
    memory = bench.measure_memory(QUICK_MEMORY_LENGTH if args.quick else MEMORY_LENGTH, device)
    times = memory.peak_bytes / memory.tensor_bytes
    print(f"one sequence of {memory.length}, 2 heads of 64, causal, fp32: peak {memory.peak_bytes / 2**20:.0f} MiB")
    print(f"  {times:.2f} times q, k, v, out and their gradients")
    return {
        "command": shlex.join(["ultrarec", *sys.argv[1:]]),
        "machine": machine,
        "comparisons": comparisons,
        "scaling": asdict(scaling),
        "memory": asdict(memory),
    }


def _line(row: Comparison) -> str:
    padded = "too large" if row.padded_milliseconds is None else f"{row.padded_milliseconds:.1f}"
    speedup = "" if row.speedup is None else f"{row.speedup:.1f}x"
    line = (
        f"{row.length:>6} {row.milliseconds:>10.1f} {padded:>10} {speedup:>9} {row.gflops:>8.0f} "
        f"{row.gemm_gflops:>8.0f} {row.gemm_share:>6.0%}"
    )
    return line if row.onednn_share is None else f"{line} {row.onednn_gflops:>8.0f} {row.onednn_share:>6.0%}"


def _plot(report: dict[str, Any], path: Path) -> None:
    """Times of both formulations over the length, and the share of the GEMM rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["comparisons"]
    figure, (times, shares) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    lengths = [row["length"] for row in rows]
    _draw_times(times, rows)
    limit = ("gemm_share", "torch.mm") if rows[0]["onednn_share"] is None else ("onednn_share", "oneDNN")
    for offset, (field, name) in zip((-0.2, 0.2), dict([("gemm_share", "torch.mm"), limit]).items(), strict=False):
        bars = shares.bar(
            [n + offset for n in range(len(rows))],
            [100 * row[field] for row in rows],
            0.4,
            label=f"a large product of {name}",
        )
        shares.bar_label(bars, fmt="%.0f%%", padding=2)
    shares.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    shares.set_xticks(range(len(rows)), [str(n) for n in lengths])
    shares.margins(y=0.35)
    shares.set(
        xlabel="N, events of the longest sequence",
        ylabel="%",
        title="Rate over visible pairs, as a share of",
    )
    shares.legend(loc="upper left")
    machine = report["machine"]
    where = ", ".join(str(machine[name]) for name in ("gpu", "cpu") if name in machine)
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    figure.suptitle(f"HSTU attention, {rows[0]['dtype']}, forward + backward; {where}{threads}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Milliseconds over the length, with the gain beside each pair of points."""
    lengths = [row["length"] for row in rows]
    padded = [row for row in rows if row["padded_milliseconds"] is not None]
    padded_lengths = [row["length"] for row in padded]
    axes.loglog(padded_lengths, [row["padded_milliseconds"] for row in padded], "s--", color="C1", label="padded dense")
    axes.loglog(lengths, [row["milliseconds"] for row in rows], "o-", color="C0", label="hstu_attention")
    for row in padded:
        at = (row["length"], row["padded_milliseconds"])
        axes.annotate(f"{row['speedup']:.1f}x", at, xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.set(xlabel="N, events of the longest sequence", ylabel="ms", title="Time of a batch of 8 sequences")
    axes.legend(loc="upper left")


def _lengths(text: str) -> list[int]:
    lengths = [positive(word) for word in text.split(",")]
    if min(lengths) < 4:
        raise argparse.ArgumentTypeError(f"{min(lengths)} is below 4; sequences have a quarter of the length, at least")
    return lengths


def _machine(device: str) -> dict[str, Any]:
    import torch

    if device == "cuda":
        import triton

        return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def cpu_name() -> str:
    """The processor as the kernel calls it, and how many cores this machine has."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return platform.processor() or platform.machine()


def _available_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
