"""What a sample costs to train, in whole numbers: every rank, on whatever processor, finds the same sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .samples import Integers

UNITS_PER_TOKEN = 1024


@dataclass(frozen=True)
class CostModel:
    """Cost of a sample: its tokens, and its pairs of query and visible key at `pair` tokens each.

    The mask is that of the attention: causal, targets see the history and themselves; with `window` > 0 an event sees
    so many before it, but `full` rows (the newest, or every row of the oldest columns: equally many pairs) see all.
    """

    pair: float = 0.0
    """Work of one pair over the work that one token costs outside of the attention."""
    window: int = 0
    full: int = 0

    def units(self, history: Integers, targets: Integers) -> Integers:
        """[S] cost of samples with so many history events and targets, in 1/1024 of a token's."""
        pairs = self.pairs(history, targets)
        return (history + targets) * UNITS_PER_TOKEN + np.rint(pairs * (self.pair * UNITS_PER_TOKEN)).astype(np.int64)

    def pairs(self, history: Integers, targets: Integers) -> Integers:
        """[S] pairs (query, key) that the mask shows, of all targets and history events."""
        if not self.window:
            return _triangle(history) + targets * (history + 1)
        # Row i of the history sees min(i, window) events and itself; a full one sees the i - window further ones too.
        first = np.minimum(history, self.window + 1)
        near = _triangle(first) + (history - first) * (self.window + 1)
        far = _triangle(history - 1 - self.window) - _triangle(history - self.full - 1 - self.window)
        return near + far + targets * (history + 1)


def _triangle(number: Integers) -> Integers:
    """1 + 2 + … + number; 0 for negative numbers."""
    positive = np.maximum(number, 0)
    return positive * (positive + 1) // 2
