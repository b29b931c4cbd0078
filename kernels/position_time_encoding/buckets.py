"""Buckets of elapsed time by integer thresholds, so that every implementation and device agrees exactly."""

from decimal import Decimal, localcontext
from functools import lru_cache
from math import ceil
from typing import Literal

import torch
from torch import Tensor

SECONDS_PER_MINUTE = 60
LARGEST = 2**63 - 1


def elapsed_thresholds(kind: Literal["sqrt", "log"], *, num_buckets: int, time_unit: float) -> Tensor:
    """For each k in 1..num_buckets the least elapsed time that is in bucket k, as far as int64 reaches.

    An elapsed time of m minutes is in the bucket of the whole square root of m, or of its whole natural logarithm (0
    below one minute), but in none above num_buckets; HSTUPositionalEncoder of the released HSTU models (arXiv
    2402.17152). A square root of floats puts 60 s * k^2 below k for some k; integers do not.

    Args:
        kind: "sqrt" or "log".
        num_buckets: K.
        time_unit: seconds per unit of elapsed time, read as the decimal number that it prints as.

    Returns:
        `[K]` int64, or less of them; for elapsed_buckets.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in ("sqrt", "log"):
        raise ValueError(f"kind={kind!r}; choose 'log' or 'sqrt'")
    return torch.tensor(_thresholds(kind, num_buckets, str(time_unit)), dtype=torch.int64)


def elapsed_buckets(elapsed: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds each elapsed time (int64, any shape; negative ones count as 0) has reached, as int64."""
    return torch.bucketize(elapsed, thresholds, right=True)


@lru_cache
def _thresholds(kind: str, num_buckets: int, time_unit: str) -> list[int]:
    thresholds = []
    with localcontext() as context:
        context.prec = 60
        units_per_minute = SECONDS_PER_MINUTE / Decimal(time_unit)
        for k in range(1, num_buckets + 1):
            minutes = Decimal(k * k) if kind == "sqrt" else Decimal(k).exp()
            threshold = ceil(minutes * units_per_minute)
            if threshold > LARGEST:
                break
            thresholds.append(threshold)
    return thresholds
