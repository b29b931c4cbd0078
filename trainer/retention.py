"""Which checkpoints of a run are kept, and which of them is the best."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias

from ..data.errors import UserError
from .config import CheckpointConfig
from .manifest import MANIFEST, all_checkpoints, complete_checkpoints, discard, step_of
from .storage import Location, entries_of, put, remove_tree

Validations: TypeAlias = Mapping[int, Mapping[str, float | None]]
"""By step, metrics of the validation split."""

DEFAULT_METRIC = "ndcg@10"
LOWER_IS_BETTER = ("loss", "ne/", "mae/", "mse/")
ASIDE = "damaged-"
"""What the name of a damaged checkpoint's folder begins with, once its run has continued from an older one."""
DAMAGED = "manifest.damaged.json"
"""In an object store, which cannot rename folders, its manifest is renamed to this."""


def retain(
    home: Location, config: CheckpointConfig, validations: Validations, *, unreadable: Collection[int | None] = ()
) -> set[int]:
    """Delete checkpoints that no setting keeps, and incomplete ones, as far as a complete one is newer.

    Of those set aside as damaged, the newest stays, for whoever wants to know what happened to it.

    Args:
        unreadable: steps of complete ones that the storage did not give: they supersede none.

    Returns:
        The steps whose complete checkpoints are kept.
    """
    complete = [folder for folder in complete_checkpoints(home) if step_of(folder) not in unreadable]
    if not complete:
        return set()
    steps = [step_of(folder) or 0 for folder in complete]
    kept = kept_steps(steps, config, scores=scores(validations, config.best_metric) if config.keep_best else {})
    for folder in all_checkpoints(home):
        step = step_of(folder) or 0
        if step not in kept and step < steps[-1]:
            discard(folder)
    for folder in _set_aside_at(home)[:-1]:
        remove_tree(folder)
    return kept


def next_to_go(complete: Collection[Location], config: CheckpointConfig, validations: Validations) -> list[int]:
    """Of complete checkpoints, by step, the steps of those that the next save supersedes."""
    steps = [step_of(folder) or 0 for folder in complete]
    if not steps:
        return []
    known = scores(validations, config.best_metric) if config.keep_best else {}
    kept = kept_steps([*steps, steps[-1] + 1], config, scores=known)
    return [step for step in steps if step not in kept]


def set_aside(folder: Location) -> None:
    """Take a damaged checkpoint out of those that are complete, and out of the way of its step's next save.

    Raises:
        UserError: the storage refuses.
    """
    try:
        if isinstance(folder, Path):
            aside = folder.with_name(ASIDE + folder.name)
            remove_tree(aside)
            folder.rename(aside)
        else:
            put(folder / DAMAGED, (folder / MANIFEST).read_bytes())
            (folder / MANIFEST).unlink()
    except OSError as error:
        raise UserError(f"cannot set the damaged checkpoint {folder} aside: {error}; remove it yourself") from None


def _set_aside_at(home: Location) -> list[Location]:
    """The folders of damaged checkpoints, by step."""
    found = [each for each in entries_of(home / "checkpoints") if each.name.startswith(ASIDE)]
    return sorted(found, key=lambda folder: folder.name)


def kept_steps(steps: list[int], config: CheckpointConfig, *, scores: Mapping[int, float]) -> set[int]:
    """Of complete checkpoints' steps, ascending, those that a setting keeps."""
    kept = set(steps[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    return kept | set(ranked([step for step in steps if step in scores], scores)[: config.keep_best])


def worth_keeping(
    validations: Validations, config: CheckpointConfig, *, kept: set[int] | None
) -> dict[int, dict[str, float | None]]:
    """What a checkpoint says of validations: those of kept steps, of steps since, and the best so far.

    Args:
        kept: steps of complete checkpoints; None where that is not known yet.
    """
    known = scores(validations, config.best_metric)
    wanted = set(ranked(list(known), known)[: max(config.keep_best, 1)]) | (kept or set())
    newest = max(kept) if kept else 0
    return {step: dict(values) for step, values in validations.items() if step in wanted or step > newest}


def ranked(steps: list[int], scores: Mapping[int, float]) -> list[int]:
    """Steps from the best to the worst; of equals, the later one is better."""
    return sorted(steps, key=lambda step: (scores[step], step), reverse=True)


def scores(validations: Validations, metric: str | None) -> dict[int, float]:
    """By step, the validation metric as a number of which more is better; steps without a value are left out."""
    found = {step: _score(values, metric) for step, values in validations.items()}
    return {step: score for step, score in found.items() if score is not None}


def _score(values: Mapping[str, float | None], metric: str | None) -> float | None:
    if metric is not None:
        value = values.get(metric)
        return value if value is None or not metric.startswith(LOWER_IS_BETTER) else -value
    if DEFAULT_METRIC in values:
        return values[DEFAULT_METRIC]
    entropies = [value for key, value in values.items() if key.startswith("ne/")]
    known = [value for value in entropies if value is not None]
    return -sum(known) / len(known) if known and len(known) == len(entropies) else None
