"""`ultrarec evaluate`: the held-out metrics of a checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.errors import UserError
from ..data.locations import shown
from .config import CheckpointConfig, Config, load_config
from .manifest import Manifest, checkpoint_folder, complete_checkpoints, step_of
from .noise import silence
from .storage import Location, checkpoint_home


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
    folder = find_checkpoint(args.run_dir, args.checkpoint, config.checkpoint)
    silence()
    from . import checkpoint
    from .build import build_recommender, load_dataset, shard
    from .evaluate import Evaluator
    from .parallel import join
    from .summary import describe

    info = load_dataset(config)
    trained_on = Manifest.read(folder).dataset
    if trained_on != info.fingerprint:
        raise UserError(
            f"{folder} was trained on another dataset than {shown(config.data.path)} is now (fingerprints "
            f"{trained_on} and {info.fingerprint}): ids would mean other items; say where its own is with "
            "--set data.path=DIR"
        )
    with join(config.trainer) as world:
        sharded = shard(build_recommender(config, info), config, world)
        manifest = checkpoint.load_weights(sharded.parallel, folder, world=world)
        evaluator = Evaluator(config, info, world, sharded.parallel)
        if not evaluator.held_out:
            raise UserError(
                f"{shown(config.data.path)} holds nothing out; prepare it with --leave-last or --split-time"
            )
        for split in evaluator.held_out:
            metrics = {"step": manifest.step, **evaluator(split)}
            if world.is_main:
                print(f"{describe(split, metrics)}\n", flush=True)
    return 0


def _config_of(run_dir: Path, overrides: list[str]) -> Config:
    path = run_dir / "config.toml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.toml; give the --out of `ultrarec train`")
    return load_config(str(path), overrides)


def find_checkpoint(run_dir: Path, choice: str, config: CheckpointConfig | None = None) -> Location:
    """The complete checkpoint of a run that `STEP`, `latest` or `best` names."""
    from .retention import ranked, scores

    config = config or CheckpointConfig()
    home = checkpoint_home(config, run_dir)
    complete = complete_checkpoints(home)
    steps = [step_of(folder) or 0 for folder in complete]
    if not complete:
        raise UserError(f"{home} holds no complete checkpoint")
    if choice == "latest":
        return complete[-1]
    if choice == "best":
        known = scores(run_dir, config.best_metric)
        best = ranked([step for step in steps if step in known], known)[:1]
        if not best:
            raise UserError(
                f"no checkpoint of {run_dir} has a validation line with values in metrics.jsonl; "
                f"use latest or a step of {steps}"
            )
        return checkpoint_folder(home, best[0])
    if not choice.isdigit() or int(choice) not in steps:
        raise UserError(f"--checkpoint {choice}: expected latest, best or one of the steps {steps}")
    return checkpoint_folder(home, int(choice))
