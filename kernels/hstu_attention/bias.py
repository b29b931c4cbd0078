"""The relative position and time bias of HSTU, shared by the heads."""

# T = events of all sequences, N = max_seq_len, K = time buckets beside bucket 0

from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural logarithm: log10(2), so that three and a third buckets make a factor e."""
LAST_BUCKET = 145
"""exp(0.301 * 146) is above the largest int64: no elapsed time gets further."""


@dataclass(frozen=True)
class RelativeBias:
    """`bias_ij = position_weight[i - j + N - 1] + time_weight[bucket(|query_timestamp_i - timestamp_j|)]`.

    i and j count from the first token of the sequence. `bucket(dt)` is how many k in 1..K have `exp(0.301 k) <= dt`.
    Source: the released HSTU models (RelativeBucketedTimeAndPosition); HSTU, arXiv 2402.17152, writes it rab^{p,t}.
    """

    position_weight: Tensor | None = None
    """`[2 N - 1]`, floating point, N being the max_seq_len of the call; None leaves the position out."""
    time_weight: Tensor | None = None
    """`[K + 1]`, floating point; None leaves the time out."""
    timestamps: Tensor | None = None
    """`[T]` int64: when each event happened, in any unit."""
    query_timestamps: Tensor | None = None
    """`[T]` int64: from when each query looks back, such as the time of what it predicts; timestamps unless given."""

    def __post_init__(self) -> None:
        if self.position_weight is None and self.time_weight is None:
            raise ValueError("RelativeBias has no position_weight and no time_weight; give one, or leave the bias out")
        if self.time_weight is not None and self.timestamps is None:
            raise ValueError("RelativeBias has a time_weight but no timestamps; give the int64 time of every event")
        for name in ("position_weight", "time_weight"):
            weight = getattr(self, name)
            if weight is not None and (weight.dim() != 1 or weight.shape[0] == 0 or not weight.dtype.is_floating_point):
                raise ValueError(
                    f"RelativeBias {name} is {weight.dtype} of shape {tuple(weight.shape)}; it takes a vector of floats"
                )
        for name in ("timestamps", "query_timestamps"):
            times = getattr(self, name)
            if times is not None and (times.dim() != 1 or times.dtype != torch.int64):
                shape = tuple(times.shape)
                raise ValueError(f"RelativeBias {name} is {times.dtype} of shape {shape}; it takes an int64 vector")


def bucket_thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """0, then for each k in 1..num_buckets the smallest integer not below `exp(0.301 k)`, as far as int64 reaches."""
    return torch.tensor(_exact_thresholds(num_buckets), device=device)


def time_buckets(elapsed: Tensor, thresholds: Tensor) -> Tensor:
    """For each elapsed time dt >= 0 (int64, any shape) how many k >= 1 have `exp(0.301 k) <= dt`, as int32.

    A logarithm only guesses, an integer threshold decides: all implementations and devices agree exactly.
    """
    # The guess is the bucket or one below it. torch.bucketize took 18 ns per element on one core of an EPYC, this 6.
    guess = elapsed.to(torch.float32).clamp_(min=1).log_().div_(BUCKET_WIDTH).sub_(0.001)
    guess = guess.clamp_(min=0, max=len(thresholds) - 2).to(torch.int32)
    next_threshold = thresholds.index_select(0, guess.flatten() + 1).view_as(elapsed)
    return guess.add_(elapsed >= next_threshold)


@lru_cache
def _exact_thresholds(num_buckets: int) -> tuple[int, ...]:
    last = min(num_buckets, LAST_BUCKET)
    with localcontext() as context:
        context.prec = 60
        return (0, *(ceil((Decimal("0.301") * k).exp()) for k in range(1, last + 1)))
