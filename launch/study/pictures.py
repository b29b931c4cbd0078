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

    figure, axes = plt.subplots(
        1, columns, figsize=(6.5 if columns == 1 else 9, 3.8), layout="constrained", squeeze=False
    )
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
        (point,) = axes.plot(x, y, "o", label=variant.label)
        axes.vlines(x, min(seeds), max(seeds), color=point.get_color(), linewidth=1)
        if variant.series:
            lines.setdefault(variant.series, []).append((x, y))
    for points in lines.values():
        axes.plot(*zip(*sorted(points), strict=True), "-", color="grey", linewidth=0.8, zorder=0)
    axes.set(xlabel=AXES[picture.x], ylabel=picture.y)
    axes.margins(x=0.1, y=0.1)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper", fontsize=8, frameon=False)


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
