"""`ultrarec replay RUN STEP`: train one step of a run again, beside the run, and show what it was made of."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.errors import UserError
from .config import load_config
from .manifest import Manifest, complete_checkpoints, step_of
from .noise import silence
from .storage import Location, checkpoint_home

if TYPE_CHECKING:
    from .config import Config
    from .parallel import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec replay`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("step", type=int, metavar="STEP", help="the step to train again, from 1")


def run(args: argparse.Namespace) -> int:
    """Replay; returns the exit code. In as many processes as the run had, the step is the same bit for bit."""
    if args.step < 1:
        raise UserError(f"step {args.step}: steps are counted from 1")
    file = args.run_dir / "config.toml"
    if not file.is_file():
        raise UserError(f"{args.run_dir} is no run folder: it has no config.toml; check the path")
    config = load_config(str(file))
    complete = complete_checkpoints(checkpoint_home(config.checkpoint, args.run_dir))
    before = [each for each in complete if (step_of(each) or 0) < args.step]
    silence()
    # Heavy imports wait until the arguments are known to be good.
    from .parallel import join

    with join(config.trainer) as world:
        _warn_of_other_ranks(args, before, world)
        _replay(config, before, world, step=args.step)
    return 0


def _warn_of_other_ranks(args: argparse.Namespace, before: list[Location], world: World) -> None:
    ranks = Manifest.read(before[-1]).world_size if before else world.size
    if ranks != world.size and world.is_main:
        print(
            f"note: the run had {ranks} process(es), this is {world.size}: numbers agree up to rounding, dropout not "
            f"at all; torchrun --nproc-per-node {ranks} -m ultrarec.launch.cli replay {args.run_dir} {args.step}",
            file=sys.stderr,
        )


def _replay(config: Config, before: list[Location], world: World, *, step: int) -> None:
    """Train up to `step` in a temporary folder, from the newest checkpoint before it, and print that step."""
    from .loop import record
    from .probe import Probe
    from .run import assemble
    from .signals import StopRequest
    from .step import train_step

    with (
        tempfile.TemporaryDirectory(prefix="ultrarec-replay-") as folder,
        assemble(config, Path(folder), world, before, request=StopRequest(), owns=False) as run,
    ):
        batches = iter(run.loader)
        while run.state.step < step - 1 and not run.is_over and (done := train_step(run, batches)):
            record(run, done)
        if run.is_over:
            raise UserError(f"step {step}: the run has {run.state.step} steps")
        probe = Probe(run.trainable.parallel.module, run.trainable.optimizer.dense)
        finished = train_step(run, batches)
        assert finished is not None
        report = probe.report(finished, step)
        if world.is_main:
            print(report)
