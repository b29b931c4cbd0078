"""Batches to look at again: skipped ones and leaps of the loss, with their rows, in `OUT/incidents.jsonl`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .health import NotFiniteError
from .journal import INCIDENTS_FILE
from .parallel import gather_objects

if TYPE_CHECKING:
    from .loop import Run
    from .step import Consumed, Step


def inspect(run: Run, step: Step) -> None:
    """Count what a finished step skipped, and report it and what stood out.

    Raises:
        NotFiniteError: more batches were skipped than `trainer.max_skipped_batches` allows.
    """
    trainer, health = run.config.trainer, run.state.health
    for consumed in step.consumed:
        verdict = consumed.verdict
        if not verdict.is_good:
            health.skipped += 1
            _report(run, consumed, kind="skipped", what=f"not finite: {'; '.join(verdict.faults)}")
        elif health.is_spike(verdict.loss, factor=trainer.spike_factor):
            _report(run, consumed, kind="spike", what=f"loss {verdict.loss:.4g}, recent median {health.median:.4g}")
        if verdict.is_good:
            health.recent.append(verdict.loss)
    if health.skipped > trainer.max_skipped_batches:
        raise NotFiniteError(
            f"stopped at step {run.state.step}: {health.skipped} batch(es) of this run skipped, of which the loss or a "
            "gradient was not finite, more than "
            f"trainer.max_skipped_batches={trainer.max_skipped_batches} (the last: {'; '.join(_faults(step))}); "
            f"nothing of them reached weights or tables. Their rows are in {run.out / INCIDENTS_FILE}; look for broken "
            "values there, lower optimizer.lr or embeddings.optimizer.lr, set optimizer.clip_norm, or raise the limit"
        )


def _faults(step: Step) -> list[str]:
    return [fault for consumed in step.consumed for fault in consumed.verdict.faults]


def _report(run: Run, consumed: Consumed, *, kind: str, what: str) -> None:
    """One line with the rows of all ranks; every rank takes part."""
    rows = [row for part in gather_objects(consumed.batch.samples.tolist()) for row in part]
    replay = f"ultrarec replay {run.out} {run.state.step}"
    line: dict[str, Any] = {"step": run.state.step, "epoch": run.state.epoch, "kind": kind, "what": what}
    run.reporter.incident({**line, "rows": rows, "replay": replay})
    run.reporter.say(f"step {run.state.step}: {kind} ({what}); its {len(rows)} rows: {INCIDENTS_FILE}; again: {replay}")
