"""`ultrarec evaluate`: the held-out metrics of a checkpoint of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ..data.errors import UserError
from ..data.locations import shown
from .config import CheckpointConfig, Config, load_config
from .manifest import checkpoint_folder, complete_checkpoints, newest_readable, step_of, use_newest
from .noise import silence
from .storage import Location, checkpoint_home

Metrics = Mapping[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec evaluate`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder written by `ultrarec train`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one setting of the run, e.g. data.path or trainer.device; may be repeated",
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="STEP|latest|best",
        help="which checkpoint; best: of those kept, by checkpoint.best_metric (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate every held-out split of the run's dataset and print the metrics; returns the exit code."""
    config = _config_of(args.run_dir, args.set)
    folders = find_checkpoints(args.run_dir, args.checkpoint, config.checkpoint)
    silence()
    from .summary import describe

    held_out_metrics(config, folders, show=lambda split, metrics: print(f"{describe(split, metrics)}\n", flush=True))
    return 0


def held_out_metrics(
    config: Config, folders: list[Location], *, show: Callable[[str, Metrics], None]
) -> dict[str, dict[str, float]]:
    """By held-out split of the run's dataset, the metrics of the newest readable of some checkpoints, and its `step`.

    Args:
        show: called on the first rank with each split and its metrics, as soon as they are known.
    """
    from . import checkpoint
    from .build import build_recommender, load_dataset, shard
    from .evaluate import Evaluator
    from .parallel import join

    info = load_dataset(config)
    manifest = newest_readable(folders)
    if manifest is not None and (trained_on := manifest.dataset) != info.fingerprint:
        raise UserError(
            f"{folders[-1]} was trained on another dataset than {shown(config.data.path)} is now (fingerprints "
            f"{trained_on} and {info.fingerprint}): ids would mean other items; say where its own is with "
            "--set data.path=DIR"
        )
    found: dict[str, dict[str, float]] = {}
    with join(config.trainer) as world:
        sharded = shard(build_recommender(config, info), config, world)
        used = use_newest(
            folders,
            lambda folder: checkpoint.load_weights(sharded.parallel, folder, world=world),
            say=lambda text: print(text, file=sys.stderr) if world.is_main else None,
            as_given=lambda folder: f"--checkpoint {step_of(folder)}",
        )
        evaluator = Evaluator(config, info, world, sharded.parallel)
        if not evaluator.held_out:
            raise UserError(
                f"{shown(config.data.path)} holds nothing out; prepare it with --leave-last or --split-time"
            )
        for split in evaluator.held_out:
            found[split] = {"step": used.value.step, **evaluator(split)}
            if world.is_main:
                show(split, found[split])
    return found


def _config_of(run_dir: Path, overrides: list[str]) -> Config:
    path = run_dir / "config.toml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.toml; give the --out of `ultrarec train`")
    return load_config(str(path), overrides)


def find_checkpoints(run_dir: Path, choice: str, config: CheckpointConfig | None = None) -> list[Location]:
    """The complete checkpoints of a run that may serve as `STEP`, `latest` or `best`: one, or all of them, by step."""
    config = config or CheckpointConfig()
    home = checkpoint_home(config, run_dir)
    complete = complete_checkpoints(home)
    steps = [step_of(folder) or 0 for folder in complete]
    if not complete:
        raise UserError(f"{home} holds no complete checkpoint")
    if choice == "latest":
        return complete
    if choice == "best":
        return [checkpoint_folder(home, _best(run_dir, complete, steps, config))]
    if not choice.isdigit() or int(choice) not in steps:
        raise UserError(f"--checkpoint {choice}: expected latest, best or one of the steps {steps}")
    return [checkpoint_folder(home, int(choice))]


def _best(run_dir: Path, complete: list[Location], steps: list[int], config: CheckpointConfig) -> int:
    """The step of the best checkpoint by its validation, as the newest one knows it, or a line of metrics after it."""
    from .journal import METRICS_FILE, read_lines
    from .retention import ranked, scores

    lines = read_lines(run_dir / METRICS_FILE)
    validations = {line.pop("step"): line for line in lines if line["split"] == "validation"}
    if (manifest := newest_readable(complete)) is not None:
        validations |= manifest.validations
    known = scores(validations, config.best_metric)
    best = ranked([step for step in steps if step in known], known)[:1]
    if not best:
        raise UserError(
            f"no checkpoint of {run_dir} has a validation with values of {config.best_metric or 'the default metric'}; "
            f"use latest or a step of {steps}"
        )
    return best[0]
