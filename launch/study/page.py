"""Results as Markdown: a section per study, and the page of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import results as kept
from .results import Compute, Quality, mean
from .runs import Result

HEAD = """# Results

`ultrarec study NAME --data DIR` tested and timed all this, and wrote this page: what has not finished does not appear.
It also trained the models, or went on where another command had left them; a study that was stopped continues where it
was. Rows in italics were not trained here: where their figures come from stands below the table. Tables headed as
published were measured by others on other data, models and machines: only directions and ratios may be compared.

`MFLOP` are operations of a sample by the [formulas](models.md#what-a-model-costs): in training forward and backward,
mean over the training split; in inference forward, over the test split. CPU minutes are the processor time of all
processes for training and the last evaluation, memory is the largest process's; both are `-` for a run that another
command had begun, or of which an attempt was not seen to its end.
"""


def page(folder: Path) -> str:
    """The page of all studies whose results lie in a folder, as `results.write` left them."""
    found = [kept.read(path) for path in sorted(folder.glob("*.json"))]
    sections = [section(results, pictures=folder.name) for results in found]
    return "\n".join([HEAD, *sections])


def section(results: Quality | Compute, *, pictures: str) -> str:
    """A study's part of the page; `pictures` is where they lie, seen from it."""
    lines = [f"## {results.study.title}", "", results.study.about.strip(), ""]
    lines += _quality(results) if isinstance(results, Quality) else _compute(results)
    for name in picture_names(results):
        lines += [f"![{name.replace('_', ' ')}]({pictures}/{results.name}-{name}.svg)", ""]
    for table in results.study.published_tables:
        lines += [f"*Published, in another setting: {table.title}.*", table.setting.strip(), f"Source: {table.source}."]
        lines += ["", *_table(table.columns, table.rows), ""]
    return "\n".join(lines)


def picture_names(results: Quality | Compute) -> list[str]:
    """Of the pictures that a study has."""
    if isinstance(results, Compute):
        return ["seconds"]
    return [picture.name for picture in results.study.pictures]


def _quality(results: Quality) -> list[str]:
    study = results.study
    costs = ["weights", "MFLOP training", "MFLOP inference", "CPU minutes", "peak MiB"]
    rows = [_row_of(results, name) for name in results.variants]
    for each in study.published:
        shown = [score(each.metrics.get(metric)) for metric in study.metrics]
        rows.append([f"*{each.label}*", "", *shown, *[""] * len(costs)])
    chosen = "the last checkpoint" if study.checkpoint == "latest" else "the checkpoint that is best on validation"
    lines = [f"Test split, {chosen}, mean over the seeds:", ""]
    lines += [*_table(["model", "seeds", *study.metrics, *costs], rows), ""]
    if study.published:
        lines += [*(f"- *{each.label}*: {each.source}" for each in study.published), ""]
    if len(results.results) > len(results.variants):
        per_seed = [_seed_row(results, each) for name in results.variants for each in results.of(name)]
        lines += ["Each seed:", "", *_table(["model", "seed", "step", *study.metrics], per_seed), ""]
    return lines


def _row_of(results: Quality, name: str) -> list[str]:
    runs = results.of(name)
    tested = [score(results.test(name, metric)) for metric in results.study.metrics]
    minutes, memory = mean([each.cpu_minutes for each in runs]), mean([each.peak_mib for each in runs])
    return [
        results.study.variants[name].label,
        str(len(runs)),
        *tested,
        f"{runs[0].dense_parameters + runs[0].table_parameters:,}",
        _short(runs[0].train_mflop),
        _short(runs[0].inference_mflop),
        "-" if minutes is None else f"{minutes:.2f}",
        "-" if memory is None else f"{memory:,.0f}",
    ]


def _seed_row(results: Quality, run: Result) -> list[str]:
    tested = [score(run.test[metric]) for metric in results.study.metrics]
    return [results.study.variants[run.name].label, str(run.seed), f"{run.step:,}", *tested]


def _compute(results: Compute) -> list[str]:
    study = results.study
    first, second = (variant.label for variant in study.variants.values())
    head = ["history", f"{first}, s", f"{second}, s", "ratio", "ratio of FLOPs"]
    lines = [f"{results.comparisons[0].machine}; medians of {results.comparisons[0].repeats} in turns.", ""]
    for name, quantity in (("A training step, per user", "train"), ("Scoring, per user", "inference")):
        rows = [
            [
                f"{each.length:,}",
                *(f"{getattr(cost, f'{quantity}_seconds'):.3g}" for cost in each.costs.values()),
                f"{each.ratio(f'{quantity}_seconds'):.1f}",
                f"{each.ratio(f'{quantity}_gflop'):.1f}",
            ]
            for each in results.comparisons
        ]
        lines += [f"{name}:", "", *_table(head, rows), ""]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def score(value: float | None) -> str:
    """A metric as tables show it; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
