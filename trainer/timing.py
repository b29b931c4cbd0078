"""Where a rank's time goes, phase by phase, and which rank the others wait for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from .parallel import gather_rows

T = TypeVar("T")

PHASES = (
    *("data", "exchange", "forward", "backward", "agreement", "tables", "optimizer"),
    *("checkpoint", "evaluation", "other"),
)
"""`data`: waiting for the loader; `exchange`: of ids, and of the looked-up vectors with their lookup; `forward` and
`backward`: of the model, the latter with the sum of gradients over ranks; `agreement`: on finite numbers; `tables`:
backward of the lookup, with the exchange of gradients and the tables' update; `checkpoint`: what saves hold up;
`evaluation`: of held-out splits; `other`: what is left of the time, as records, logging and the loop itself take it."""
ON_HOST = ("data", "checkpoint", "evaluation")
"""Phases that a device has no part in."""
OWN = ("data", "forward", "optimizer")
"""Phases in which no rank waits for another: only they tell who is slow."""
SLOW_FACTOR = 1.25
"""Of the median rank's own time; and the excess must be SLOW_SHARE of the step, or nobody would notice it."""
SLOW_SHARE = 0.1
SLOW_READINGS = 3
"""Readings in a row."""


class Timer:
    """Seconds of each phase since the last reading; on CUDA from events, which are read only then.

    A phase inside another counts for itself alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()
        self._open: list[str] = []
        self._events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        on_device = self._is_cuda and name not in ON_HOST
        begin, start = self._mark() if on_device else None, time.perf_counter()
        try:
            yield
        finally:
            self._open.pop()
            if begin is not None:
                self._events.append((name, outer, begin, self._mark()))
            else:
                self._add(name, outer, time.perf_counter() - start)

    def read(self) -> dict[str, float]:
        """The seconds of every phase since the last reading; together, all the time since then.

        On CUDA less, or more, as far as the host waits for the device, or phases overlap there.
        """
        for name, outer, begin, end in self._events:
            end.synchronize()
            self._add(name, outer, begin.elapsed_time(end) / 1000)
        self._events.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        since, self._since = self._since, time.perf_counter()
        seconds["other"] = max(self._since - since - sum(seconds.values()), 0.0)
        return seconds

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the wait for each counts as `data`."""
        iterator = iter(batches)
        while True:
            with self.phase("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def watch_module(self, module: nn.Module, name: str) -> None:
        """Count a module's forward passes in training as a phase."""
        phases: list[object] = []

        def enter(*_: object) -> None:
            if torch.is_grad_enabled():
                phase = self.phase(name)
                phase.__enter__()
                phases.append(phase)

        def leave(*_: object) -> None:
            if phases:
                phases.pop().__exit__(None, None, None)  # type: ignore[attr-defined]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def over_ranks(seconds: dict[str, float], *, steps: int) -> Tensor:
    """[ranks, phases] seconds per step, the same on every rank."""
    return gather_rows(torch.tensor([list(seconds.values())], dtype=torch.float64)) / max(steps, 1)


def metrics_of(per_rank: Tensor) -> dict[str, float | int]:
    """Of every phase: mean over ranks, largest, and the rank of the largest."""
    largest, ranks = per_rank.max(0)
    metrics: dict[str, float | int] = {}
    for place, name in enumerate(PHASES):
        metrics[f"seconds/{name}"] = round(float(per_rank[:, place].mean()), 6)
        metrics[f"seconds/{name}/max"] = round(float(largest[place]), 6)
        metrics[f"seconds/{name}/max_rank"] = int(ranks[place])
    return metrics


def seconds_of_ranks(per_rank: Tensor) -> dict[str, list[float]]:
    """Of every phase, the seconds per step of each rank."""
    return {name: [round(value, 6) for value in per_rank[:, place].tolist()] for place, name in enumerate(PHASES)}


class Stragglers:
    """Notices a rank that is slower than the others reading after reading."""

    def __init__(self) -> None:
        self._rank, self._readings = -1, 0

    def take(self, per_rank: Tensor) -> str | None:
        """A sentence about the slow rank, once when it becomes one; `per_rank` is [ranks, phases] seconds."""
        own = per_rank[:, [PHASES.index(name) for name in OWN]]
        totals = own.sum(1)
        rank, usual = int(totals.argmax()), float(totals.median())
        excess = float(totals[rank]) - usual
        is_slow = excess > (SLOW_FACTOR - 1) * usual and excess > SLOW_SHARE * float(per_rank[rank].sum())
        self._readings = self._readings + 1 if is_slow and rank == self._rank else int(is_slow)
        self._rank = rank
        if self._readings != SLOW_READINGS:
            return None
        parts = ", ".join(f"{name} {own[rank, place]:.3f} s" for place, name in enumerate(OWN))
        return (
            f"rank {rank} is slow: {totals[rank]:.3f} s per step of its own ({parts}), the median rank {usual:.3f} s; "
            "the others wait for it in every step"
        )
