"""Which checkpoints of a run are kept, and which of them is the best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CheckpointConfig
from .manifest import MANIFEST, all_checkpoints, complete_checkpoints, step_of
from .report import METRICS_FILE
from .storage import Location, remove_tree

DEFAULT_METRIC = "ndcg@10"
LOWER_IS_BETTER = ("loss", "ne/", "mae/", "mse/")


def retain(home: Location, config: CheckpointConfig, *, out: Path) -> None:
    """Delete checkpoints that no setting keeps, and incomplete ones, as far as a complete one is newer."""
    complete = complete_checkpoints(home)
    if not complete:
        return
    steps = [step_of(folder) or 0 for folder in complete]
    kept = kept_steps(steps, config, scores=scores(out, config.best_metric) if config.keep_best else {})
    for folder in all_checkpoints(home):
        step = step_of(folder) or 0
        if step not in kept and step < steps[-1]:
            # The manifest goes first: a kill between the two leaves a folder that is no checkpoint, not half of one.
            (folder / MANIFEST).unlink(missing_ok=True)
            remove_tree(folder)


def kept_steps(steps: list[int], config: CheckpointConfig, *, scores: Mapping[int, float]) -> set[int]:
    """Of complete checkpoints' steps, ascending, those that a setting keeps."""
    kept = set(steps[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    return kept | set(ranked([step for step in steps if step in scores], scores)[: config.keep_best])


def ranked(steps: list[int], scores: Mapping[int, float]) -> list[int]:
    """Steps from the best to the worst; of equals, the later one is better."""
    return sorted(steps, key=lambda step: (scores[step], step), reverse=True)


def scores(out: Path, metric: str | None) -> dict[int, float]:
    """By step, a run's validation metric as a number of which more is better; steps without a value are left out."""
    path = out / METRICS_FILE
    if not path.exists():
        return {}
    found: dict[int, float] = {}
    with path.open(encoding="utf-8") as file:
        # Of a long run most lines are about training; those are not even parsed. A last one may be cut off by a kill.
        for line in file:
            if '"split": "validation"' in line and line.endswith("\n"):
                values = json.loads(line)
                if (score := _score(values, metric)) is not None:
                    found[values["step"]] = score
    return found


def _score(line: Mapping[str, Any], metric: str | None) -> float | None:
    if metric is not None:
        value = line.get(metric)
        return value if value is None or not metric.startswith(LOWER_IS_BETTER) else -value
    if DEFAULT_METRIC in line:
        return line[DEFAULT_METRIC]
    entropies = [value for key, value in line.items() if key.startswith("ne/")]
    known = [value for value in entropies if value is not None]
    return -sum(known) / len(known) if known and len(known) == len(entropies) else None
