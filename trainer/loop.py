"""The training loop: read this first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ..data.batch import Batch
from ..data.loader import Loader
from ..data.samples import Split
from . import checkpoint
from .checkpoint import Trainable
from .config import Config
from .evaluate import Evaluator
from .manifest import MANIFEST, checkpoint_folder
from .parallel import World, on_main, sum_over_ranks
from .report import METRICS_FILE, Audit, Reporter, SkipLog, read_lines
from .state import TrainState, Window
from .step import Step, Trained, train_step


@dataclass
class Meter:
    """What this rank has trained since the last line of metrics, or since this process began; not part of the state."""

    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    """Samples left out as damaged."""
    start: float = field(default_factory=time.monotonic)
    """Moved on by the time that evaluating and saving take."""


@dataclass
class Run:
    """One run on one rank: its parts, and how far it is."""

    config: Config
    world: World
    out: Path
    trainable: Trainable
    pipeline: TrainPipelineSparseDist[Batch, Trained]
    loader: Loader
    evaluator: Evaluator
    total_steps: int
    reporter: Reporter
    audit: Audit | None
    skips: SkipLog
    meter: Meter = field(default_factory=Meter)

    @property
    def state(self) -> TrainState:
        """Progress of the run."""
        return self.trainable.state


def train(run: Run) -> None:
    """Train to the last step, then evaluate and save; of a finished run, do what is missing."""
    config, batches = run.config, iter(run.loader)
    while run.state.step < run.total_steps and (step := train_step(run, batches)):
        record(run, step)
        if every(config.trainer.log_every, run.state.step) or run.state.step == run.total_steps:
            log(run, step)
        if every(config.trainer.evaluate_every, run.state.step):
            evaluate(run, "validation")
        if every(config.checkpoint.every, run.state.step) and run.state.step < run.total_steps:
            save(run)
    finish(run)


def every(period: int | None, step: int) -> bool:
    """Whether something that happens every `period` steps happens at this one."""
    return period is not None and step % period == 0


def record(run: Run, step: Step) -> None:
    """Count a finished step."""
    state = run.state
    state.step += 1
    state.batches += len(step.trained)
    state.loader = step.trained[-1].batch.state
    for trained in step.trained:
        batch = trained.batch
        state.window.add(loss_sum=trained.loss_sum, labels=batch.labels.numel())
        run.meter.samples += len(batch.samples)
        run.meter.tokens += batch.timestamps.numel()
        run.meter.skipped += len(batch.skipped)
    if run.audit is not None:
        samples = [trained.batch.samples for trained in step.trained]
        run.audit.write(step=state.step, epoch=state.epoch, samples=samples)
    run.skips.write(step=state.step, epoch=state.epoch, skipped=[s for t in step.trained for s in t.batch.skipped])
    run.reporter.advance()


def log(run: Run, step: Step) -> None:
    """Write a line about the steps since the last one, over all ranks."""
    loss_sum, labels = sum_over_ranks(run.state.window.totals()).tolist()
    meter = run.meter
    samples, tokens, skipped = sum_over_ranks(torch.tensor([meter.samples, meter.tokens, meter.skipped])).tolist()
    seconds = time.monotonic() - run.meter.start
    run.reporter.write(
        {
            "step": run.state.step,
            "epoch": run.state.epoch,
            "split": "train",
            "loss": loss_sum / max(labels, 1),
            "lr": step.lr,
            "grad_norm": float(step.gradient_norm),
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            **({"skipped_samples": skipped} if run.config.data.bad_data == "skip" else {}),
        }
    )
    run.state.window = Window()
    run.meter = Meter()


def evaluate(run: Run, split: Split) -> None:
    """Write a line about a held-out split."""
    start = time.monotonic()
    # The pipeline's rewritten model expects ids that are already exchanged; evaluation runs the plain one.
    run.pipeline.detach()
    metrics = run.evaluator(split)
    # Batches in flight have exchanged their ids; attached without this, the pipeline would begin that exchange again,
    # and lose the sizes of the first on several ranks.
    run.pipeline.attach(sparse_dist=False)
    run.reporter.write({"step": run.state.step, "epoch": run.state.epoch, "split": split, **metrics})
    run.meter.start += time.monotonic() - start


def save(run: Run) -> None:
    """Write a checkpoint; every line of metrics and audit up to its step is on disk before it counts as complete."""
    start = time.monotonic()
    run.reporter.sync()
    if run.audit is not None:
        run.audit.sync()
    run.skips.sync()
    checkpoint.save(
        run.trainable,
        run.out,
        world=run.world,
        config_hash=run.config.training_hash(),
        dataset=run.evaluator.info.fingerprint,
        keep_last=run.config.checkpoint.keep_last,
    )
    run.meter.start += time.monotonic() - start


def finish(run: Run) -> None:
    """Evaluate what the dataset holds out and save the last step, as far as an earlier process has not done so."""
    step = run.state.step
    done = on_main(
        run.world, lambda: {line["split"] for line in read_lines(run.out / METRICS_FILE) if line["step"] == step}
    )
    for split in run.evaluator.held_out:
        if split not in done:
            evaluate(run, split)
    if not on_main(run.world, (checkpoint_folder(run.out, step) / MANIFEST).is_file):
        save(run)
