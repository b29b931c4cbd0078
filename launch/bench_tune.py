"""`ultrarec bench attention --tune`: measure tiles of the Triton kernels on this GPU, and keep the faster ones."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..data.errors import UserError

if TYPE_CHECKING:
    from ..kernels.hstu_attention.triton_tuned import Shape
    from ..kernels.tuning import Choice

WIDTHS = (64, 128)
LENGTH = 4096
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SECONDS = 0.1


def run(args: argparse.Namespace) -> int:
    """Measure every kernel and print what is found; returns 1 and keeps nothing if results are wrong."""
    _refuse_other_options(args)
    import torch
    from tqdm import tqdm

    if not torch.cuda.is_available():
        raise UserError(
            "--tune measures kernels on a GPU, and torch finds none here; the built-in tiles need no tuning"
        )
    from ..kernels import bench, tuning
    from ..kernels.hstu_attention import triton_tuned
    from ..kernels.hstu_attention.triton_blocks import target_of

    device = torch.device("cuda", torch.cuda.current_device())
    device_name = torch.cuda.get_device_name(device)
    try:
        path = triton_tuned.default_path()
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"tiles are kept in your cache directory, but {error}; set XDG_CACHE_HOME to a folder of yours"
        ) from error
    length, target = args.lengths[0] if args.lengths else LENGTH, target_of(device)
    print(f"{device_name}; sequences of {length // 4} to {length} events, causal; with a bias both parts of it\n")
    for width in WIDTHS:
        for shape in tuning.shapes_of(width, getattr(torch, DTYPES[args.dtype or "bf16"])):
            try:
                choice = tuning.tune(
                    shape,
                    tuning.problem_for(shape, length, str(device)),
                    target,
                    candidates=tqdm(tuning.candidates_of(shape, target), desc=_name(shape), leave=False),
                    is_clean=tuning.compiles_cleanly,
                    seconds_of=lambda work: bench.fastest({"": work}, "cuda", SECONDS)[""],
                )
            except bench.WrongResults as wrong:
                print(f"nothing more is kept, as results are wrong: {wrong}", file=sys.stderr)
                return 1
            print(_line(choice), flush=True)
            triton_tuned.write(path, device_name, {shape: choice.blocks})
    print(f"\nkept in {path}, which every run on this machine reads when it starts")
    return 0


def _refuse_other_options(args: argparse.Namespace) -> None:
    for name in ("static", "arch", "threads", "quick", "out"):
        if getattr(args, name):
            raise UserError(
                f"--tune measures tiles and nothing else, so --{name} has no meaning; leave one of them out"
            )
    if args.device == "cpu":
        raise UserError("--tune measures kernels that run on a GPU, not on --device cpu; leave one of them out")
    if args.lengths and len(args.lengths) > 1:
        raise UserError(f"--tune takes one length, not {len(args.lengths)}; give the one that matters most to you")


def _name(shape: Shape) -> str:
    return f"{shape.kernel:<8} D={shape.width:<4}{'biased' if shape.biased else '':<7}"


def _line(choice: Choice) -> str:
    shape, best, builtin = choice.shape, choice.blocks, choice.builtin_blocks
    what = _name(shape)
    best_line = (
        f"{best.rows}x{best.keys}, {best.num_warps} warps, {best.num_stages} stages {choice.seconds * 1e3:.3f} ms"
    )
    if best == builtin:
        return f"{what} built-in {best_line}, the best of {choice.num_timed}"
    gain = choice.builtin_seconds / choice.seconds
    return f"{what} {best_line}, the best of {choice.num_timed}, {gain:.2f} times as fast as the built-in ones"
