"""What a run says: metrics.jsonl, TensorBoard, progress on rank 0, and the audit of consumed rows."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.errors import UserError
from ..data.faults import Fault, SkippedSample
from ..data.samples import Split
from .incidents import INCIDENTS_FILE

METRICS_FILE = "metrics.jsonl"
OPENING_FILE = "opening.jsonl"


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines with those to keep, atomically; a last line cut off by a kill goes too."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with path.open(encoding="utf-8") as source, temporary.open("w", encoding="utf-8") as target:
        for line in source:
            if line.endswith("\n") and keep(_parse(line, path)):
                target.write(line)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a file of JSON lines; none when there is no file, none of a last line cut off by a kill."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [_parse(line, path) for line in file if line.endswith("\n")]


def _parse(line: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if isinstance(value.get("step"), int):
            return dict(value)
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} has a line that no run wrote: {line[:80]!r}; remove that line to continue")


def forget_after(out: Path, step: int) -> None:
    """Drop the lines behind `step`, of metrics, incidents and every rank's audit and skipped samples: the run writes
    them again from there.
    """
    by_rank = [*out.glob("audit/rank-*.jsonl"), *out.glob("skipped/rank-*.jsonl")]
    for path in [out / METRICS_FILE, out / INCIDENTS_FILE, *by_rank]:
        keep_lines(path, lambda line: line["step"] <= step)


class Reporter:
    """Writes what happens to the run folder, and shows it; every rank has one, but only rank 0's speaks."""

    def __init__(self, out: Path, *, is_main: bool, step: int, total_steps: int) -> None:
        self._metrics = None
        self._total_steps = total_steps
        if not is_main:
            return
        self._metrics = (out / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def write(self, values: Mapping[str, Any]) -> None:
        """Record one line of metrics, whose `step`, `epoch` and `split` say what it is about."""
        if self._metrics is None:
            return
        line = {**values, "time": round(time.time(), 3)}
        # JSON knows no NaN; a metric without a value (AUC of equal labels) is null.
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for key, value in values.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{values['split']}/{key}", value, values["step"])
        self.say(self._headline(values))

    def advance(self) -> None:
        """One step is done."""
        if self._metrics is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Show a line of text to whoever watches rank 0."""
        if self._metrics is not None:
            self._bar.write(text, file=sys.stderr)
            sys.stderr.flush()

    def sync(self) -> None:
        """Make every line written so far survive the machine, before a checkpoint claims its step."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Flush and close every file."""
        if self._metrics is not None:
            self._bar.close()
            self._board.close()
            self._metrics.close()

    def _headline(self, values: Mapping[str, Any]) -> str:
        shown = " ".join(
            f"{key} {value:,.0f}" if value >= 1000 else f"{key} {value:.4g}"
            for key, value in values.items()
            if key not in ("step", "epoch", "split") and not key.startswith("seconds/")
            if key != "skipped_batches" or value
        )
        return f"step {values['step']}/{self._total_steps} epoch {values['epoch']} {values['split']}: {shown}"


class Audit:
    """Which rows each finished step consumed on this rank: `OUT/audit/rank-R.jsonl`."""

    def __init__(self, out: Path, *, rank: int) -> None:
        path = out / "audit" / f"rank-{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, *, step: int, epoch: int, samples: list[Tensor], skipped: list[Tensor]) -> None:
        """Record the (file, row, sample) triples that a step consumed, and which of them changed nothing."""
        line: dict[str, Any] = {"step": step, "epoch": epoch, "rows": _rows(samples)}
        if skipped:
            line["skipped"] = _rows(skipped)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make every line written so far survive the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _rows(parts: list[Tensor]) -> list[list[int]]:
    return [row for part in parts for row in part.tolist()]


class SkipLog:
    """Which samples were left out as damaged: `OUT/skipped/rank-R.jsonl`, there from the first of them on, and
    `OUT/skipped/opening.jsonl` for what was damaged when the dataset was opened.
    """

    def __init__(self, out: Path, *, rank: int) -> None:
        self._path = out / "skipped" / f"rank-{rank}.jsonl"
        self._file: TextIO | None = None

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return self._path.parent

    @property
    def at_opening(self) -> list[Fault]:
        """What the last start recorded."""
        path = self._path.with_name(OPENING_FILE)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Fault(**json.loads(line)) for line in lines]

    def opened(self, faults: Sequence[Fault]) -> None:
        """Record what opening the dataset found damaged: it belongs to no step, and is written anew by every start."""
        path = self._path.with_name(OPENING_FILE)
        if faults:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults), encoding="utf-8")
            temporary.replace(path)
        else:
            path.unlink(missing_ok=True)

    def write(self, split: Split, *, step: int, epoch: int, skipped: Sequence[SkippedSample]) -> None:
        """Record the samples that this rank left out of a step, or of an evaluation after it, one line each."""
        if skipped and self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        for sample in skipped:
            place = {"rows": [[sample.file, sample.row, sample.sample]], "fault": asdict(sample.fault)}
            assert self._file is not None
            self._file.write(json.dumps({"step": step, "epoch": epoch, "split": split, **place}) + "\n")
        if self._file is not None:
            self._file.flush()

    def sync(self) -> None:
        """Make every line written so far survive the machine."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def table(rows: Sequence[Mapping[str, Any]], *, columns: list[str]) -> str:
    """Aligned text of the given columns; values missing from a row stay blank."""
    texts = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(text[k]) for text in texts)) for k, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *texts]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
