"""The last page of a run: its held-out metrics, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
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


def describe(split: str, metrics: Mapping[str, Any]) -> str:
    """One split's metrics as a table: a row per task for ranking, one row for next-item prediction."""
    title = f"{split} (step {metrics['step']})"
    if skipped := metrics.get("skipped_samples"):
        title += f", without {counted(int(skipped), 'damaged sample')}"
    tasks = [key.removeprefix("auc/") for key in metrics if key.startswith("auc/")]
    if tasks:
        rows = [{"task": task, **{m: metrics[f"{m}/{task}"] for m in ("auc", "gauc", "ne")}} for task in tasks]
        return f"{title}\n{table(rows, columns=['task', 'auc', 'gauc', 'ne'])}"
    columns = [key for key in metrics if key.startswith(("hr@", "ndcg@")) or key == "mrr"]
    return f"{title}\n{table([metrics], columns=columns)}"
