"""Opening a run: a new one, or one that continues from its newest complete checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..data.errors import UserError
from ..data.loader import Loader
from ..data.locations import shown, without_keys
from . import checkpoint
from .build import Sharded, build_recommender, load_dataset, shard
from .checkpoint import Trainable
from .config import Config, load_config
from .evaluate import Evaluator
from .journal import tell
from .lock import alone_in
from .loop import Run
from .manifest import Manifest, Used, checkpoints_at, complete_checkpoints, newest_readable, use_newest
from .opening import open_loader
from .optimizer import Optimizer
from .parallel import World, on_main
from .pipeline import GuardedPipeline
from .report import Audit, Reporter, SkipLog, forget_after
from .retention import next_to_go
from .saved import check_saved, remember_saved
from .saver import Saver
from .signals import StopRequest
from .state import TrainState
from .storage import Location, Reading, checkpoint_home, location, put
from .throughput import Throughput
from .tiles import tell_of_other_tiles, with_tiles
from .timing import Timer
from .unpipelined import Unpipelined
from .watchdog import Watchdog

CONFIG_FILE = "config.toml"
PLAN_FILE = "plan.txt"


@contextmanager
def open_run(
    config: Config, out: Path, world: World, *, fresh: bool, request: StopRequest | None = None
) -> Iterator[Run]:
    """Build every part, take up the newest complete checkpoint of the run in `out`, and close all files at the end.

    Raises:
        UserError: the dataset, the configuration or the run folder does not allow it.
        StorageError: where the dataset or the checkpoints lie, nothing answers.
    """
    fingerprint = load_dataset(config).fingerprint
    reading = _reading(config)
    with _alone(config, out, world):
        complete = on_main(world, lambda: _own_checkpoints(config, out, fingerprint, fresh=fresh, reading=reading))
        with assemble(config, out, world, complete, request=request or StopRequest(), owns=True) as run:
            run.saver.prepare(run.trainable.pieces(world))
            yield run


@contextmanager
def _alone(config: Config, out: Path, world: World) -> Iterator[None]:
    """Hold the run folder, and the folder of its checkpoints if that is another; object stores have no locks."""
    home, seconds = checkpoint_home(config.checkpoint, out), config.trainer.timeout_seconds
    with ExitStack() as held:
        held.enter_context(alone_in(out, world, given_as="--out", timeout_seconds=seconds))
        if isinstance(home, Path) and home.resolve() != out.resolve():
            held.enter_context(alone_in(home, world, given_as="checkpoint.path", timeout_seconds=seconds))
        yield


@contextmanager
def assemble(
    config: Config, out: Path, world: World, complete: list[Location], *, request: StopRequest, owns: bool
) -> Iterator[Run]:
    """A run that writes to `out` and continues from the newest of some checkpoints, or begins if there are none.

    Args:
        owns: the checkpoints are this run's, which sets damaged ones aside; else they are only read.
    """
    info = load_dataset(config)
    sharded = shard(build_recommender(config, info), config, world)
    trainable = _trainable(config, sharded)
    used = _take_up(trainable, complete, config, world, owns=owns)
    newest = None if used is None else used.folder
    state = trainable.state
    skips = SkipLog(out, rank=world.rank)
    loader = open_loader(config, info, world, skips, state=state.loader, owns=owns)
    total_steps = trainable.optimizer.total_steps = _total_steps(config, loader)
    plan = with_tiles(sharded.plan, world.device)
    on_main(world, lambda: _prepare_folder(config, out, plan, newest, state.step))
    reporter = Reporter(out, is_main=world.is_main, step=state.step, total_steps=total_steps)
    audit = Audit(out, rank=world.rank) if config.data.audit else None
    watchdog = Watchdog(out, rank=world.rank, seconds=config.trainer.watchdog_seconds)
    saver = _saver(config, out, world, dataset=info.fingerprint, say=reporter.say, used=used)
    timer = Timer(world.device)
    reporter.say(_greeting(out, plan, newest, world, total_steps, is_over=state.is_over(config.trainer)))
    try:
        yield Run(
            config=config,
            world=world,
            out=out,
            trainable=trainable,
            pipeline=_pipeline(sharded, trainable, config, world=world, timer=timer, request=request),
            loader=loader,
            evaluator=Evaluator(config, info, world, sharded.parallel, progress=watchdog.evaluating),
            total_steps=total_steps,
            reporter=reporter,
            audit=audit,
            skips=skips,
            timer=timer,
            throughput=Throughput(config, num_items=info.num_items, actions=info.roles.actions, device=world.device),
            watchdog=watchdog,
            saver=saver,
        )
    finally:
        watchdog.close()
        loader.close()
        saver.close()
        reporter.close()
        skips.journal.close()
        if audit is not None:
            audit.journal.close()


def _saver(
    config: Config, out: Path, world: World, *, dataset: str, say: Callable[[str], None], used: Used[Manifest] | None
) -> Saver:
    return Saver(
        config.checkpoint,
        out,
        world,
        config_hash=config.training_hash(),
        dataset=dataset,
        say=say,
        limit_seconds=config.trainer.timeout_seconds,
        unreadable=[] if used is None else used.unreadable,
    )


def _pipeline(
    sharded: Sharded, trainable: Trainable, config: Config, *, world: World, timer: Timer, request: StopRequest
) -> GuardedPipeline:
    """What trains batches, with tables to exchange ids of or without."""
    recommender = sharded.recommender
    timer.watch_module(recommender.lookup, "exchange")
    kind = Unpipelined if recommender.lookup.collection is None else GuardedPipeline
    return kind(
        sharded.parallel,
        recommender.cut,
        trainable.optimizer.dense,
        config=config.trainer,
        world=world,
        timer=timer,
        request=request,
        may_skip=config.data.bad_data == "skip",
    )


def _reading(config: Config) -> Reading:
    """As patient with checkpoints as with the dataset, but for the ranks that wait for one."""
    return Reading(min(config.data.retry_seconds, config.trainer.timeout_seconds / 2))


def _own_checkpoints(config: Config, out: Path, dataset: str, *, fresh: bool, reading: Reading) -> list[Location]:
    """The complete checkpoints of this run, which must belong to this configuration."""
    home = checkpoint_home(config.checkpoint, out)
    complete = reading(lambda: complete_checkpoints(home), f"{home}/checkpoints")
    if fresh and (complete or (out / CONFIG_FILE).exists()):
        raise UserError(f"--fresh: {out} already holds a run; choose another --out, or delete that folder")
    check_saved(out, config.checkpoint.path, complete)
    manifest = newest_readable(complete, reading)
    if manifest is None:
        return complete
    if manifest.dataset != dataset:
        raise UserError(
            f"{home} holds a run on another dataset than {shown(config.data.path)} is now (fingerprints "
            f"{manifest.dataset} and {dataset}): ids would mean other items; restore the dataset to continue it, or "
            "choose another --out"
        )
    if manifest.config_hash != config.training_hash():
        raise UserError(
            f"{home} holds a run of another configuration{_differences(config, out, manifest.config_hash)}; restore "
            f"those settings to continue it, or choose another --out{'' if home == out else ' and checkpoint.path'}"
        )
    if len(going := next_to_go(complete, config.checkpoint, manifest.validations)) > 1:
        tell(
            f"ATTENTION: the next save deletes the checkpoints of steps {', '.join(map(str, going))}, which no setting "
            "keeps: see checkpoint.keep_last, keep_every and keep_best"
        )
    return complete


def _differences(config: Config, out: Path, config_hash: str) -> str:
    """Which settings a run folder's own configuration has otherwise, if it is the one that checkpoints belong to."""
    unknown = " (of data, embeddings, model or objective)"
    try:
        before = load_config(str(out / CONFIG_FILE))
    except UserError:
        return unknown
    if before.training_hash() != config_hash:
        return unknown
    changed = [f"{name} = {now!r}, was {old!r}" for name, (now, old) in config.training_differences(before).items()]
    return f" ({'; '.join(changed)})"


def _take_up(
    trainable: Trainable, complete: list[Location], config: Config, world: World, *, owns: bool
) -> Used[Manifest] | None:
    """Load where to continue or begin from; returns the checkpoint that is continued."""
    reading, begin = _reading(config), config.checkpoint.start_from

    def say(text: str) -> None:
        if world.is_main:
            tell(text)

    if complete:
        return checkpoint.load_newest(trainable, complete, world=world, say=say, owns=owns, reading=reading)
    if begin is not None:
        starts = on_main(world, lambda: reading(lambda: checkpoints_at(location(begin)), shown(begin)))
        start = use_newest(
            starts, lambda folder: checkpoint.load_start(trainable, folder, world=world, reading=reading), say=say
        )
        say(f"beginning with the weights of {start.folder}")
        if start.value:
            say(f"not in it, and fresh: {', '.join(start.value)}")
    return None


def _trainable(config: Config, sharded: Sharded) -> Trainable:
    parallel = sharded.parallel
    dense = {name: p for name, p in parallel.named_parameters() if not name.startswith(checkpoint.TABLES)}
    sparse, replicated = parallel.fused_optimizer, parallel.module.lookup.replicated
    optimizer = Optimizer(config.optimizer, dense=dense, sparse=sparse, replicated=replicated, total_steps=1)
    return Trainable(parallel, optimizer, TrainState(seed=config.trainer.seed))


def _total_steps(config: Config, loader: Loader) -> int:
    """Updates of the whole run: what the epochs give or are expected to, at most `trainer.max_steps`."""
    trainer = config.trainer
    if trainer.epochs is None:
        return trainer.max_steps or 0
    steps = loader.num_steps(trainer.epochs, per_update=trainer.accumulate)
    return min(steps, trainer.max_steps) if trainer.max_steps is not None else steps


def _prepare_folder(config: Config, out: Path, plan: str, newest: Location | None, step: int) -> None:
    """Write what the run is, and drop what an earlier process wrote about steps that will be trained again."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        forget_after(out, step)
        _write_if_changed(out / CONFIG_FILE, _without_keys(config).to_toml())
        if newest is not None:
            remember_saved(out, config.checkpoint.path, step)
            tell_of_other_tiles(out / PLAN_FILE, plan)
        _write_if_changed(out / PLAN_FILE, plan)
    except OSError as error:
        raise UserError(f"cannot write the run folder {out}: {error.strerror}; choose another --out") from None


def _write_if_changed(path: Path, text: str) -> None:
    """Whole or not at all: a run that continues on a full disk keeps what it has, and mostly needs nothing else."""
    content, exists = text.encode(), path.is_file()
    if exists and path.read_bytes() == content:
        return
    try:
        put(path, content)
    except OSError as error:
        if not exists:
            raise
        tell(f"ATTENTION: {path} stays as the run before left it: {error.strerror or error}")


def _without_keys(config: Config) -> Config:
    """The configuration as a file may hold it: addresses of stores without what opens them."""
    data = config.data.model_copy(update={"path": without_keys(config.data.path)})
    places = {name: getattr(config.checkpoint, name) for name in ("path", "start_from")}
    kept = {name: place and without_keys(place) for name, place in places.items()}
    return config.model_copy(update={"data": data, "checkpoint": config.checkpoint.model_copy(update=kept)})


def _greeting(out: Path, plan: str, newest: Location | None, world: World, total_steps: int, *, is_over: bool) -> str:
    start = f"continuing from {newest}" if newest else "starting"
    if newest is not None and is_over:
        start = f"finished at {newest}"
    if (restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))) > 0:
        start = f"restart {restarts} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS', '?')}, {start}"
    return f"{start}: {world.size} rank(s) on {world.device.type}, {total_steps} steps, run folder {out}\n{plan}"
