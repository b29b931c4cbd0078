"""What a sample costs to train, in whole numbers: every rank, on whatever processor, finds the same sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .samples import Integers, Numbers

UNITS_PER_TOKEN = 1024


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of a sample by the length of its history, looked up: what a model spends is not for this folder to know.

    A target's share depends on the history it sees, and not on the other targets, which it does not see.
    """

    history: Integers
    """[N+1] cost of a sample of 0..N history events and no target, in 1/1024 of a token's."""
    target: Integers
    """[N+1] what each target adds to it."""

    @classmethod
    def in_tokens(cls, history: Numbers, target: Numbers) -> CostModel:
        """From the same costs in tokens."""
        return cls(*(np.rint(each * UNITS_PER_TOKEN).astype(np.int64) for each in (history, target)))

    @classmethod
    def of_tokens_alone(cls, max_history: int) -> CostModel:
        """Every event costs the same."""
        return cls.in_tokens(np.arange(max_history + 1.0), np.ones(max_history + 1))

    def units(self, history: Integers, targets: Integers) -> Integers:
        """[S] cost of samples with so many history events and targets, in 1/1024 of a token's."""
        return self.history[history] + targets * self.target[history]
