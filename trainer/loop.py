"""The training loop: read this first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.errors import UserError
from ..data.loader import Loader
from ..data.samples import Split
from .checkpoint import Trainable
from .config import Config
from .evaluate import Evaluator
from .manifest import MANIFEST, checkpoint_folder
from .parallel import World, on_main, sum_over_ranks
from .report import METRICS_FILE, Audit, Reporter, read_lines
from .saver import Saver
from .state import TrainState, Window
from .step import Pipeline, Step, train_step


@dataclass
class Meter:
    """What this rank has trained since the last line of metrics, or since this process began; not part of the state."""

    samples: int = 0
    tokens: int = 0
    start: float = field(default_factory=time.monotonic)
    """Moved on by the time that evaluating and saving take."""


@dataclass
class Run:
    """One run on one rank: its parts, and how far it is."""

    config: Config
    world: World
    out: Path
    trainable: Trainable
    pipeline: Pipeline
    loader: Loader
    evaluator: Evaluator
    total_steps: int
    reporter: Reporter
    audit: Audit | None
    saver: Saver
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
    if run.audit is not None:
        samples = [trained.batch.samples for trained in step.trained]
        run.audit.write(step=state.step, epoch=state.epoch, samples=samples)
    run.reporter.advance()


def log(run: Run, step: Step) -> None:
    """Write a line about the steps since the last one, over all ranks."""
    loss_sum, labels = sum_over_ranks(run.state.window.totals()).tolist()
    samples, tokens = sum_over_ranks(torch.tensor([run.meter.samples, run.meter.tokens])).tolist()
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
            **({"failed_saves": run.saver.failures} if run.saver.failures else {}),
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
    """Begin to write a checkpoint; the metrics and audit up to its step are on disk before it counts as complete."""
    start = time.monotonic()
    audit = [run.audit.sync] if run.audit is not None else []
    run.saver.save(run.trainable.pieces(run.world), run.state, sync=[run.reporter.sync, *audit])
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
    if not on_main(run.world, (checkpoint_folder(run.saver.home, step) / MANIFEST).is_file):
        save(run)
    if error := run.saver.wait():
        raise UserError(
            f"the last step's checkpoint could not be written to {run.saver.home}: {error}; mend that and "
            "give the same command again: the run continues from its newest complete checkpoint"
        )
