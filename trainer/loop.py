"""The training loop: read this first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.errors import StorageError, UserError
from ..data.faults import SkippedSample
from ..data.loader import Loader
from ..data.samples import Split
from . import incidents
from .checkpoint import Trainable
from .config import Config
from .evaluate import Evaluator
from .journal import METRICS_FILE, Journal, read_lines
from .parallel import World, gather_objects, on_main, sum_over_ranks
from .pipeline import GuardedPipeline
from .report import Audit, Reporter, SkipLog, metrics_in
from .saver import Saver
from .signals import StopRequested
from .state import TrainState, Window
from .step import Step, train_step
from .throughput import Throughput
from .timing import Stragglers, Timer, metrics_of, over_ranks, seconds_of_ranks
from .watchdog import Watchdog


@dataclass
class Meter:
    """What is divided by this process's seconds since the last line of metrics, or since it began: not saved."""

    steps: int = 0
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
    pipeline: GuardedPipeline
    loader: Loader
    evaluator: Evaluator
    total_steps: int
    """Estimated where `Loader.num_steps` is; what ends the run is `is_over`."""
    reporter: Reporter
    audit: Audit | None
    timer: Timer
    throughput: Throughput
    watchdog: Watchdog
    saver: Saver
    skips: SkipLog
    meter: Meter = field(default_factory=Meter)
    stragglers: Stragglers = field(default_factory=Stragglers)

    @property
    def state(self) -> TrainState:
        """Progress of the run."""
        return self.trainable.state

    @property
    def journals(self) -> list[Journal]:
        """The files of lines that this rank appends to."""
        return [*self.reporter.journals, self.skips.journal, *([self.audit.journal] if self.audit is not None else [])]

    @property
    def is_over(self) -> bool:
        """Whether the last step is done."""
        return self.state.is_over(self.config.trainer)


def train(run: Run) -> None:
    """Train to the last step, then evaluate and save; of a finished run, do what is missing.

    Raises:
        StopRequested: a signal came; the step is finished and saved.
        NotFiniteError: too many batches gave numbers that were not finite.
    """
    config, batches = run.config, run.timer.watch(run.loader)
    catch_up(run)
    run.watchdog.start(run.state.step)
    while not run.is_over and (step := train_step(run, batches)):
        record(run, step)
        incidents.inspect(run, step)
        if every(config.trainer.log_every, run.state.step) or run.is_over:
            log(run, step)
        if step.signum:
            wait_for_save(run)
            save(run)
            error = wait_for_save(run)
            tell_missing(run)
            raise StopRequested(step.signum, run.state.step, error=error)
        if every(config.trainer.evaluate_every, run.state.step):
            evaluate(run, "validation")
        if every(config.checkpoint.every, run.state.step) and not run.is_over:
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
    state.loader = step.consumed[-1].batch.state
    run.meter.steps += 1
    for trained in step.trained:
        batch = trained.batch
        state.window.add(batch, loss_sum=trained.loss_sum)
        run.meter.samples += len(batch.samples)
        run.meter.tokens += batch.timestamps.numel()
        run.throughput.add(batch)
    if run.audit is not None:
        skipped = [consumed.batch.samples for consumed in step.consumed if not consumed.verdict.is_good]
        samples = [consumed.batch.samples for consumed in step.consumed]
        run.audit.write(step=state.step, epoch=state.epoch, samples=samples, skipped=skipped)
    left_out = [sample for consumed in step.consumed for sample in consumed.batch.skipped]
    state.window.skipped += len(left_out)
    run.skips.write("train", step=state.step, epoch=state.epoch, skipped=left_out)
    run.reporter.advance()
    run.watchdog.beat(state.step)


def log(run: Run, step: Step) -> None:
    """Write a line about the steps since the last one, over all ranks."""
    meter, window = run.meter, run.state.window
    loss_sum, labels, skipped = sum_over_ranks(window.sums()).tolist()
    unwritten = sum(journal.missing for journal in run.journals)
    counted = [meter.samples, meter.tokens, run.throughput.read(), unwritten]
    samples, tokens, flops, unwritten = sum_over_ranks(torch.tensor(counted, dtype=torch.float64)).tolist()
    seconds = time.monotonic() - run.meter.start
    per_rank = over_ranks(run.timer.read(), steps=run.meter.steps)
    run.reporter.ranks({"step": run.state.step, "seconds": seconds_of_ranks(per_rank)})
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
            **run.throughput.metrics(flops, seconds, num_ranks=run.world.size),
            "imbalance": window.loads.largest / max(window.loads.mean, 1),
            "imbalance_least": window.loads.least / max(window.loads.mean, 1),
            "skipped_batches": run.state.health.skipped,
            **metrics_of(per_rank),
            **({"failed_saves": run.saver.failures} if run.saver.failures else {}),
            **({"unwritten_lines": int(unwritten)} if unwritten else {}),
            **(_left_out(run, skipped) if run.config.data.bad_data == "skip" else {}),
        }
    )
    if slow := run.stragglers.take(per_rank):
        run.reporter.say(slow)
    run.state.window = Window()
    run.meter = Meter()


def _left_out(run: Run, skipped: float) -> dict[str, float]:
    """What is missing of the data: samples since the last line, and the rows that opening the dataset found damaged."""
    return {"skipped_samples": skipped, "skipped_rows": sum(fault.num_rows for fault in run.loader.faults)}


def evaluate(run: Run, split: Split) -> None:
    """Write a line about a held-out split."""
    start, left_out = time.monotonic(), list[SkippedSample]()
    run.reporter.say(f"evaluating the {split} split")
    # The pipeline's rewritten model expects ids that are already exchanged; evaluation runs the plain one.
    run.pipeline.detach()
    with run.timer.phase("evaluation"):
        metrics = run.evaluator(split, left_out=left_out)
    if split == "validation":
        run.state.validated(metrics)
        best = run.config.checkpoint.best_metric
        if best is not None and best not in metrics:
            run.reporter.say(
                f"ATTENTION: checkpoint.best_metric={best!r} is none of the validation metrics "
                f"({', '.join(metrics)}); no checkpoint is the best"
            )
    # Batches in flight have exchanged their ids; attached without this, the pipeline would begin that exchange again,
    # and lose the sizes of the first on several ranks.
    run.pipeline.attach(sparse_dist=False)
    run.skips.write(split, step=run.state.step, epoch=run.state.epoch, skipped=left_out)
    run.reporter.write({"step": run.state.step, "epoch": run.state.epoch, "split": split, **metrics})
    run.meter.start += time.monotonic() - start


def save(run: Run) -> None:
    """Begin to write a checkpoint; it is complete once the lines about its steps are on disk, if there is room."""
    start = time.monotonic()
    sync = [journal.sync for journal in run.journals]
    with run.timer.phase("checkpoint"), run.watchdog.paused():
        run.saver.save(run.trainable.pieces(run.world), run.state, sync=sync)
    run.meter.start += time.monotonic() - start


def finish(run: Run) -> None:
    """Evaluate what the dataset holds out and save the last step, as far as an earlier process has not done so."""
    done = splits_done(run)
    missing = [split for split in run.evaluator.held_out if split not in done]
    if "validation" in missing:  # which checkpoint is the best is part of what is saved
        evaluate(run, "validation")
    if not on_main(run.world, lambda: run.saver.has(run.state.step)):
        wait_for_save(run)  # one in flight, on slow storage, would have this one left out
        save(run)
    if "test" in missing:
        evaluate(run, "test")
    error = wait_for_save(run)
    tell_missing(run)
    if error:
        kind = UserError if run.saver.is_lasting else StorageError
        raise kind(
            f"the last step's checkpoint could not be written to {run.saver.home}: {error}; mend that and "
            "give the same command again: the run continues from its newest complete checkpoint"
        )


def tell_missing(run: Run) -> None:
    """Say at the end what the files of all ranks lack, since there was no room for it."""
    for journal in run.journals:
        journal.sync()
    own = {str(journal.path): journal.missing for journal in run.journals if journal.missing}
    for path, missing in (each for lacking in gather_objects(own) for each in lacking.items()):
        run.reporter.say(f"ATTENTION: {path} lacks {missing} line(s): there was no room for them, and none came")


def wait_for_save(run: Run) -> str | None:
    """Wait for the save in flight, however slow its storage; why it failed, None if it is complete or there is none."""
    with run.watchdog.paused():
        return run.saver.wait()


def catch_up(run: Run) -> None:
    """Evaluate the step that is continued from, if it was due: a process that had to stop saves it without."""
    step = run.state.step
    due = step > 0 and every(run.config.trainer.evaluate_every, step)
    if due and not run.is_over and "validation" not in splits_done(run):
        evaluate(run, "validation")


def splits_done(run: Run) -> set[str]:
    """The splits that have a line of metrics about the present step; the state learns what it may lack of them.

    A process that ended between the line and the next save has left its validation in no checkpoint.
    """

    def read() -> dict[str, dict[str, Any]]:
        return {line["split"]: line for line in read_lines(run.out / METRICS_FILE) if line["step"] == run.state.step}

    done = on_main(run.world, read)
    if "validation" in done:
        run.state.validated(metrics_in(done["validation"]))
    return set(done)
