"""Opening a run: a new one, or one that continues from its newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.errors import UserError
from ..data.loader import Loader
from . import checkpoint
from .build import Sharded, build_loader, build_recommender, load_dataset, shard
from .checkpoint import Trainable
from .config import Config
from .evaluate import Evaluator
from .loop import Run
from .manifest import Manifest, complete_checkpoints
from .optimizer import Optimizer
from .parallel import World, on_main
from .report import Audit, Reporter, SkipLog, forget_after
from .state import TrainState
from .step import build_pipeline

CONFIG_FILE = "config.toml"
PLAN_FILE = "plan.txt"


@contextmanager
def open_run(config: Config, out: Path, world: World, *, fresh: bool) -> Iterator[Run]:
    """Build every part, take up the newest complete checkpoint in `out`, and close all files at the end.

    Raises:
        UserError: the dataset, the configuration or the run folder does not allow it.
    """
    info = load_dataset(config)
    newest = on_main(world, lambda: _newest_checkpoint(config, out, info.fingerprint, fresh=fresh))
    sharded = shard(build_recommender(config, info), config, world)
    trainable = _trainable(config, sharded)
    if newest is not None:
        checkpoint.load(trainable, newest, world=world)
    state = trainable.state
    loader = build_loader(config, info, world, split="train", state=state.loader)
    total_steps = trainable.optimizer.total_steps = _total_steps(config, loader)
    on_main(world, lambda: _prepare_folder(config, out, sharded.plan, state.step))
    reporter = Reporter(out, is_main=world.is_main, step=state.step, total_steps=total_steps)
    audit = Audit(out, rank=world.rank) if config.data.audit else None
    skips = SkipLog(out, rank=world.rank)
    on_main(world, lambda: skips.opened(loader.faults))
    reporter.say(_greeting(out, sharded.plan, newest, world, state.step, total_steps))
    try:
        yield Run(
            config=config,
            world=world,
            out=out,
            trainable=trainable,
            pipeline=build_pipeline(sharded.parallel, config.trainer, world),
            loader=loader,
            evaluator=Evaluator(config, info, world, sharded.parallel),
            total_steps=total_steps,
            reporter=reporter,
            audit=audit,
            skips=skips,
        )
    finally:
        loader.close()
        reporter.close()
        skips.close()
        if audit is not None:
            audit.close()


def _newest_checkpoint(config: Config, out: Path, dataset: str, *, fresh: bool) -> Path | None:
    """Where to continue; the run folder must belong to this configuration, or to nothing yet."""
    complete = complete_checkpoints(out)
    if fresh and (complete or (out / CONFIG_FILE).exists()):
        raise UserError(f"--fresh: {out} already holds a run; choose another --out, or delete that folder")
    if not complete:
        return None
    manifest = Manifest.read(complete[-1])
    if manifest.dataset != dataset:
        raise UserError(
            f"{out} holds a run on another dataset than {config.data.path} is now (fingerprints {manifest.dataset} and "
            f"{dataset}): ids would mean other items; restore the dataset to continue it, or choose another --out"
        )
    if manifest.config_hash != config.training_hash():
        raise UserError(
            f"{out} holds a run of another configuration (data, embeddings, model or objective differ from "
            f"{out / CONFIG_FILE}); restore those settings to continue it, or choose another --out"
        )
    return complete[-1]


def _trainable(config: Config, sharded: Sharded) -> Trainable:
    parallel = sharded.parallel
    sparse = parallel.fused_optimizer
    tables = {name for name in parallel.state_dict() if name.startswith("lookup.")}
    dense = {name: p for name, p in parallel.named_parameters() if name not in tables}
    return Trainable(parallel, Optimizer(config.optimizer, dense=dense, sparse=sparse, total_steps=1), TrainState())


def _total_steps(config: Config, loader: Loader) -> int:
    """Updates of the whole run: what the epochs give, at most `trainer.max_steps`."""
    trainer = config.trainer
    if trainer.epochs is None:
        return trainer.max_steps or 0
    steps = sum(-(-loader.steps_per_epoch(epoch) // trainer.accumulate) for epoch in range(trainer.epochs))
    return min(steps, trainer.max_steps) if trainer.max_steps is not None else steps


def _prepare_folder(config: Config, out: Path, plan: str, step: int) -> None:
    """Write what the run is, and drop what an earlier process wrote about steps that will be trained again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
        (out / PLAN_FILE).write_text(plan, encoding="utf-8")
        forget_after(out, step)
    except OSError as error:
        raise UserError(f"cannot write the run folder {out}: {error.strerror}; choose another --out") from None


def _greeting(out: Path, plan: str, newest: Path | None, world: World, step: int, total_steps: int) -> str:
    start = f"continuing from {newest}" if newest else "starting"
    if newest is not None and step >= total_steps:
        start = f"finished at {newest}"
    return f"{start}: {world.size} rank(s) on {world.device.type}, {total_steps} steps, run folder {out}\n{plan}"
