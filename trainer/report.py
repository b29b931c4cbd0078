"""What a run says: metrics.jsonl, TensorBoard, progress on rank 0, and the audit of consumed rows."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.faults import Fault, SkippedSample
from ..data.samples import Split
from .journal import INCIDENTS_FILE, METRICS_FILE, REMIND_SECONDS, Journal, cut_after, tell
from .storage import put

OPENING_FILE = "opening.jsonl"
RANKS_FILE = "ranks.jsonl"


def metrics_in(line: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a line, without what they are about."""
    return {key: value for key, value in line.items() if key not in ("step", "epoch", "split", "time")}


def forget_after(out: Path, step: int) -> None:
    """Drop the lines behind `step`, of metrics, ranks' times, incidents and every rank's audit and skipped samples: the
    run writes them again from there.
    """
    by_rank = [*out.glob("audit/rank-*.jsonl"), *out.glob("skipped/rank-*.jsonl")]
    for path in [out / METRICS_FILE, out / RANKS_FILE, out / INCIDENTS_FILE, *by_rank]:
        cut_after(path, step)


class Reporter:
    """Writes what happens to the run folder, and shows it; every rank has one, but only rank 0's speaks."""

    def __init__(self, out: Path, *, is_main: bool, step: int, total_steps: int) -> None:
        self._is_main = is_main
        self._total_steps = total_steps
        self._metrics, self._incidents = Journal(out / METRICS_FILE), Journal(out / INCIDENTS_FILE)
        self._ranks = Journal(out / RANKS_FILE)
        self._board = _Board(out / "tensorboard", purge_step=step + 1)
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not (is_main and sys.stderr.isatty()))

    @property
    def journals(self) -> list[Journal]:
        """The files of lines that it writes."""
        return [self._metrics, self._ranks, self._incidents]

    def write(self, values: Mapping[str, Any]) -> None:
        """Record one line of metrics, whose `step`, `epoch` and `split` say what it is about."""
        if not self._is_main:
            return
        line = {**values, "time": round(time.time(), 3)}
        # JSON knows no NaN; a metric without a value (AUC of equal labels) is null.
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._metrics.append(line)
        self._board.add(values)
        self.say(self._headline(values))

    def ranks(self, line: Mapping[str, Any]) -> None:
        """Record where the time of each rank went, beside the line of metrics of the same step."""
        if self._is_main:
            self._ranks.append(line)

    def incident(self, line: Mapping[str, Any]) -> None:
        """Record a batch to look at again."""
        if self._is_main:
            self._incidents.append(line)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def say(self, text: str) -> None:
        """Show a line of text to whoever watches rank 0."""
        if self._is_main:
            tell(text)

    def close(self) -> None:
        """Flush and close every file."""
        self._bar.close()
        self._board.close()
        for journal in self.journals:
            journal.close()

    def _headline(self, values: Mapping[str, Any]) -> str:
        shown = " ".join(
            f"{key} {value:,.0f}" if value >= 1000 else f"{key} {value:.4g}"
            for key, value in values.items()
            if key not in ("step", "epoch", "split", "imbalance_least") and not key.startswith("seconds/")
            if key != "skipped_batches" or value
        )
        return f"step {values['step']}/{self._total_steps} epoch {values['epoch']} {values['split']}: {shown}"


class _Board:
    """TensorBoard's files. What cannot be written to them is left out: metrics.jsonl is the record of a run."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self._folder, self._purge_step = folder, purge_step
        self._writer: SummaryWriter | None = None
        self._retry_at = -math.inf
        if getattr(threading.excepthook, "func", None) is not _unless_tensorboards:
            threading.excepthook = partial(_unless_tensorboards, threading.excepthook)

    def add(self, values: Mapping[str, Any]) -> None:
        """Show the numbers of a line of metrics."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            for key, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{values['split']}/{key}", value, values["step"])
            self._purge_step = values["step"] + 1
        except OSError as error:
            tell(f"ATTENTION: cannot write {self._folder}: {error.strerror or error}; its curves will lack some steps")
            self._retry_at = time.monotonic() + REMIND_SECONDS
            self.close()

    def close(self) -> None:
        """Flush and close the newest file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()


def _unless_tensorboards(hook: Callable[[threading.ExceptHookArgs], Any], args: threading.ExceptHookArgs) -> None:
    """Show what ended a thread, unless it is TensorBoard's own on a full disk: its next call raises that again."""
    if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        hook(args)


class Audit:
    """Which rows each finished step consumed on this rank: `OUT/audit/rank-R.jsonl`."""

    def __init__(self, out: Path, *, rank: int) -> None:
        self.journal = Journal(out / "audit" / f"rank-{rank}.jsonl")

    def write(self, *, step: int, epoch: int, samples: list[Tensor], skipped: list[Tensor]) -> None:
        """Record the (file, row, sample) triples that a step consumed, and which of them changed nothing."""
        line: dict[str, Any] = {"step": step, "epoch": epoch, "rows": _rows(samples)}
        if skipped:
            line["skipped"] = _rows(skipped)
        self.journal.append(line)


def _rows(parts: list[Tensor]) -> list[list[int]]:
    return [row for part in parts for row in part.tolist()]


class SkipLog:
    """Which samples were left out as damaged: `OUT/skipped/rank-R.jsonl`, there from the first of them on, and
    `OUT/skipped/opening.jsonl` for what was damaged when the dataset was opened.
    """

    def __init__(self, out: Path, *, rank: int) -> None:
        self.journal = Journal(out / "skipped" / f"rank-{rank}.jsonl")

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return self.journal.path.parent

    @property
    def at_opening(self) -> list[Fault]:
        """What the last start recorded."""
        path = self.folder / OPENING_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Fault(**json.loads(line)) for line in lines]

    def opened(self, faults: Sequence[Fault]) -> None:
        """Record what opening the dataset found damaged: it belongs to no step, and is written anew by every start."""
        path = self.folder / OPENING_FILE
        content = "".join(json.dumps(asdict(fault)) + "\n" for fault in faults).encode()
        if not faults:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, content)

    def write(self, split: Split, *, step: int, epoch: int, skipped: Sequence[SkippedSample]) -> None:
        """Record the samples that this rank left out of a step, or of an evaluation after it, one line each."""
        for sample in skipped:
            place = {"rows": [[sample.file, sample.row, sample.sample]], "fault": asdict(sample.fault)}
            self.journal.append({"step": step, "epoch": epoch, "split": split, **place})


def table(rows: Sequence[Mapping[str, Any]], *, columns: list[str]) -> str:
    """Aligned text of the given columns; values that a row lacks, or that are NaN, stay blank."""
    texts = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(text[k]) for text in texts)) for k, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *texts]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
