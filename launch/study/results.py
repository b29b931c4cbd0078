"""What a study came to, in one file; the page of results is a function of such files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from .compute import Comparison
from .config import ComputeStudy, QualityStudy, Study, study_of
from .runs import Result


@dataclass(frozen=True)
class Quality:
    """The finished runs of a study.

    Raises:
        UserError: one was tested without a metric of the study.
    """

    name: str
    study: QualityStudy
    results: tuple[Result, ...]

    def __post_init__(self) -> None:
        for run in self.results:
            if lacking := [metric for metric in self.study.metrics if metric not in run.test]:
                raise UserError(
                    f"metrics names {lacking[0]!r}, but {run.name} with seed {run.seed} was tested without it; name "
                    f"some of {', '.join(sorted(run.test))}, or remove that run's folder to train it anew"
                )

    def of(self, variant: str) -> list[Result]:
        """A variant's runs, by seed."""
        return sorted((each for each in self.results if each.name == variant), key=lambda each: each.seed)

    @property
    def variants(self) -> list[str]:
        """Those that have finished runs, in the study's order."""
        return [name for name in self.study.variants if self.of(name)]

    def test(self, variant: str, metric: str) -> float | None:
        """A variant's mean over its seeds; None if a run has no value."""
        return mean([each.test[metric] for each in self.of(variant)])


@dataclass(frozen=True)
class Compute:
    """The finished comparisons of a study, by length."""

    name: str
    study: ComputeStudy
    comparisons: tuple[Comparison, ...]

    @property
    def variants(self) -> list[str]:
        """Both, in the study's order."""
        return list(self.study.variants)


def mean(values: Sequence[float | None]) -> float | None:
    """None as soon as one is missing: a mean over fewer would pass for one over all."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def write(results: Quality | Compute, path: Path) -> None:
    """Write results as JSON."""
    rows: Sequence[Any] = results.results if isinstance(results, Quality) else results.comparisons
    tree = {
        "name": results.name,
        "study": results.study.model_dump(mode="json"),
        "results": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Quality | Compute:
    """Results as `write` wrote them."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    study: Study = study_of(tree["study"])
    if isinstance(study, QualityStudy):
        return Quality(tree["name"], study, tuple(Result(**row) for row in tree["results"]))
    return Compute(tree["name"], study, tuple(Comparison.of(row) for row in tree["results"]))
