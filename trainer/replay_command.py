"""`ultrarec replay RUN STEP`: train one step of a run again, beside the run, and show what it was made of."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.errors import UserError
from ..data.locations import shown
from ..data.storage import load_dataset
from .config import load_config
from .journal import INCIDENTS_FILE, METRICS_FILE, read_lines
from .manifest import complete_checkpoints, newest_readable, step_of
from .noise import silence
from .storage import Location, checkpoint_home

_NOT_OF_THE_STEP = {
    *("device", "precision", "timeout_seconds", "watchdog_seconds"),
    *("log_every", "evaluate_every", "max_skipped_batches", "spike_factor"),
}
"""Settings of `trainer` that may be others: precision too, since whether a NaN comes without bf16 is worth knowing."""

if TYPE_CHECKING:
    from .config import Config
    from .parallel import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec replay`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("step", type=int, metavar="STEP", help="the step to train again, from 1")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one setting of the run, e.g. data.path; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Replay; returns the exit code. In as many processes as the run had, the step is the same bit for bit."""
    if args.step < 1:
        raise UserError(f"step {args.step}: steps are counted from 1")
    config = _config_of(args.run_dir, args.set)
    complete = complete_checkpoints(checkpoint_home(config.checkpoint, args.run_dir))
    _check_dataset(config, complete, args.run_dir)
    _check_step(config, complete, args)
    before = [each for each in complete if (step_of(each) or 0) < args.step]
    silence()
    # Heavy imports wait until the arguments are known to be good.
    from .parallel import join

    with join(config.trainer) as world:
        _warn_of_other_ranks(args, complete, world)
        _tell_start(args, before, world)
        _replay(config, before, world, step=args.step)
    return 0


def _config_of(run_dir: Path, overrides: list[str]) -> Config:
    file = run_dir / "config.toml"
    if not file.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.toml; check the path")
    config = load_config(str(file), overrides)
    if _what_makes_steps(config) != _what_makes_steps(load_config(str(file))):
        names = ", ".join(each.partition("=")[0] for each in overrides)  # values may hold keys
        raise UserError(
            f"--set {names}: the step would not be that of {run_dir}, of which data, embeddings, model, objective, "
            f"optimizer and trainer stay, but for data.path and trainer's {', '.join(sorted(_NOT_OF_THE_STEP))}"
        )
    return config


def _what_makes_steps(config: Config) -> tuple[str, str, str]:
    return (
        config.training_hash(),
        config.optimizer.model_dump_json(),
        config.trainer.model_dump_json(exclude=_NOT_OF_THE_STEP),
    )


def _check_dataset(config: Config, complete: list[Location], run_dir: Path) -> None:
    """Refuse to replay on other data than the run's: a step's rows, and what their ids mean, would be others."""
    info = load_dataset(config.data.path, retry_seconds=config.data.retry_seconds)
    manifest, present = newest_readable(complete), info.fingerprint
    if manifest is not None and manifest.dataset != present:
        raise UserError(
            f"{run_dir} was trained on another dataset than {shown(config.data.path)} is now (fingerprints "
            f"{manifest.dataset} and {present}); restore that dataset to replay the run"
        )


def _check_step(config: Config, complete: list[Location], args: argparse.Namespace) -> None:
    """Refuse a step that the run cannot have come to; a run that goes on, or broke off, has some without a line."""
    lines = [*read_lines(args.run_dir / METRICS_FILE), *read_lines(args.run_dir / INCIDENTS_FILE)]
    reached = max([0, *(line["step"] for line in lines), *(step_of(each) or 0 for each in complete)])
    last = config.trainer.max_steps
    if last is not None and args.step > last:
        raise UserError(f"step {args.step}: the run has {last} steps")
    is_finished = any(line.get("split") == "test" for line in lines)
    if args.step > reached + (0 if is_finished else config.trainer.log_every):
        raise UserError(f"step {args.step}: {args.run_dir} has come to step {reached}; choose one from 1 to {reached}")


def _tell_start(args: argparse.Namespace, before: list[Location], world: World) -> None:
    """How far it is to the step: without a checkpoint shortly before it, as far as the run itself took."""
    manifest = newest_readable(before)
    start = manifest.step if manifest else 0
    if world.is_main and start < args.step - 1:
        where = f"the newest checkpoint before it is of step {start}" if start else "no checkpoint before it is kept"
        print(f"step {args.step}: {where}; training {args.step - start} steps to get there", file=sys.stderr)


def _warn_of_other_ranks(args: argparse.Namespace, complete: list[Location], world: World) -> None:
    manifest = newest_readable(complete)
    ranks = manifest.world_size if manifest else world.size
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
