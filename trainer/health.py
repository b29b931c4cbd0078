"""How a run is doing: batches skipped since their numbers went wrong, and losses that leap."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

RECENT_LOSSES = 64
FEWEST_LOSSES = 16
"""Losses that a median needs before a batch is held against it."""


class NotFiniteError(RuntimeError):
    """More batches had losses or gradients that were infinite or NaN than the run tolerates."""


@dataclass
class Health:
    """Equal on every rank, and part of a checkpoint."""

    skipped: int = 0
    """Batches of the whole run that changed nothing, since their loss or a gradient was not finite."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOSSES))
    """Mean losses of the last good batches."""

    def is_spike(self, loss: float, *, factor: float) -> bool:
        """Whether a loss exceeds `factor` times the median of the recent ones."""
        return len(self.recent) >= FEWEST_LOSSES and loss > factor * self.median

    @property
    def median(self) -> float:
        """Of the recent losses; NaN before the first."""
        return statistics.median(self.recent) if self.recent else math.nan

    def to_tensor(self) -> Tensor:
        """[1 + 64] float64 for a checkpoint: the count, then the recent losses, infinite where there is none yet."""
        missing = [math.inf] * (RECENT_LOSSES - len(self.recent))
        return torch.tensor([self.skipped, *self.recent, *missing], dtype=torch.float64)

    @staticmethod
    def of(values: Tensor) -> Health:
        """What `to_tensor` wrote."""
        skipped, *recent = values.tolist()
        return Health(int(skipped), deque((loss for loss in recent if math.isfinite(loss)), maxlen=RECENT_LOSSES))
