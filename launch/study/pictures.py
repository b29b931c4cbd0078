"""Pictures of results: quality against what it costs, and times against the length of the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import Picture
from .results import Compute, Quality

AXES = {
    "train_mflop": "MFLOP of a training sample",
    "inference_mflop": "MFLOP of a scored sample",
    "max_history": "longest history",
}


def draw(results: Quality | Compute, folder: Path) -> None:
    """Write every picture of a study as `NAME-PICTURE.svg`; the same results give the same file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "ultrarec"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(results, Compute):
        _save(lambda axes: _times(axes, results), folder / f"{results.name}-seconds.svg", columns=2)
        return
    for picture in results.study.pictures:
        path = folder / f"{results.name}-{picture.name}.svg"
        _save(lambda axes, picture=picture: _against_cost(axes[0], results, picture), path, columns=1)


def _save(paint: Any, path: Path, *, columns: int) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 3.6), layout="constrained", squeeze=False)
    paint(list(axes[0]))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _against_cost(axes: Any, results: Quality, picture: Picture) -> None:
    """A point per variant, its seeds as a bar; variants of one series on a line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in results.variants:
        variant, runs = results.study.variants[name], results.of(name)
        y = results.test(name, picture.y)
        if y is None:
            continue
        x = float(getattr(runs[0], picture.x))
        seeds = [value for each in runs if (value := each.test[picture.y]) is not None]
        axes.vlines(x, min(seeds), max(seeds), color="grey", linewidth=1)
        axes.annotate(variant.label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        lines.setdefault(variant.series or name, []).append((x, y))
    for points in lines.values():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4)
    axes.set(xlabel=AXES[picture.x], ylabel=picture.y)
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.3)


def _times(panels: list[Any], results: Compute) -> None:
    """Seconds over the length, in training and in scoring, with the gain at each length."""
    lengths = [each.length for each in results.comparisons]
    for axes, quantity, title in zip(panels, ("train", "inference"), ("a training step", "scoring"), strict=True):
        for name, variant in results.study.variants.items():
            seconds = [getattr(each.costs[name], f"{quantity}_seconds") for each in results.comparisons]
            axes.loglog(lengths, seconds, "o-", label=variant.label)
        for each in results.comparisons:
            slower = max(getattr(cost, f"{quantity}_seconds") for cost in each.costs.values())
            gain = f"{each.ratio(f'{quantity}_seconds'):.1f}x"
            axes.annotate(gain, (each.length, slower), xytext=(0, 6), textcoords="offset points", ha="center")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
        axes.set(xlabel="events of the history", ylabel="s per user", title=title)
        axes.legend(loc="upper left")
