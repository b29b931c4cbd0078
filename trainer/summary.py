"""The last page of a run: its held-out metrics, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.errors import counted
from .journal import METRICS_FILE, read_lines
from .manifest import complete_checkpoints
from .report import table
from .storage import Location


def summary(out: Path, home: Location) -> str:
    """Metrics of the newest evaluation of each split, and the paths of run folder and newest checkpoint."""
    newest = {line["split"]: line for line in read_lines(out / METRICS_FILE) if line["split"] != "train"}
    parts = [describe(split, line) for split, line in newest.items()]
    checkpoints = complete_checkpoints(home)
    parts.append(f"run folder   {out}\ncheckpoint   {checkpoints[-1] if checkpoints else 'none'}")
    return "\n\n".join(["", *parts])


def _by_task(metrics: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The tasks that have these metrics; empty if none has."""
    tasks = [key.partition("/")[2] for key in metrics if key.startswith(f"{columns[0]}/")]
    rows = [{"task": task, **{name: metrics[f"{name}/{task}"] for name in columns}} for task in tasks]
    return table(rows, columns=["task", *columns]) if rows else ""


def describe(split: str, metrics: Mapping[str, Any]) -> str:
    """One split's metrics: for ranking a row per task, regressions in a table of their own, else one row."""
    title = f"{split} (step {metrics['step']})"
    if skipped := metrics.get("skipped_samples"):
        title += f", without {counted(int(skipped), 'damaged sample')}"
    parts = [_by_task(metrics, columns) for columns in (("auc", "gauc", "ne"), ("mae", "mse"))]
    if tables := list(filter(None, parts)):
        return "\n".join([title, *tables])
    columns = [key for key in metrics if key.startswith(("hr@", "ndcg@")) or key == "mrr"]
    return f"{title}\n{table([metrics], columns=columns)}"
