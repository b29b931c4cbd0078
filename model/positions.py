"""Learned vectors for where and when an event stands in its sequence, added to the tokens before the stack."""

# T = events of all samples, B = samples, C = contextual tokens per sample, E = model width, N = longest sequence

from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels import elapsed_buckets, elapsed_thresholds
from .layout import Layout

NUM_TIME_BUCKETS = 2048


class PositionEncoder(nn.Module):
    """A vector per position of the sequence.

    `from_start` counts from the oldest token (research variant); `from_end` gives an event its distance to the end of
    the history (industrial variant), behind the C positions of the contextual tokens. Either way all targets of a
    sample share one position, so that a target's prediction does not depend on how many others are scored with it.
    """

    def __init__(self, kind: Literal["from_start", "from_end"], *, max_seq_len: int, width: int) -> None:
        super().__init__()
        self.from_end = kind == "from_end"
        self.vectors = nn.Embedding(max_seq_len, width)
        if self.from_end:
            bound = max_seq_len**-0.5
            nn.init.uniform_(self.vectors.weight, -bound, bound)
        else:
            std = width**-0.5
            nn.init.trunc_normal_(self.vectors.weight, std=std, a=-2 * std, b=2 * std)

    def positions(self, layout: Layout, *, second: bool = False) -> Tensor:
        """The position of each event's token, [T] int64; interleaved, of its first, or, if `second`, of its second."""
        end = layout.num_history[layout.sample_of_event]
        index = torch.minimum(layout.index_of_event, end)
        if layout.interleaved:
            # The second token of a target is never read; held at the end, so that its number stays within the table.
            end = 2 * end
            index = torch.minimum(2 * index + int(second), end)
        return layout.num_contextual + (end - index if self.from_end else index)

    def context(self, layout: Layout) -> Tensor:
        """Vectors [C, E], the same for every sample."""
        return self.vectors.weight[: layout.num_contextual]


class TimeEncoder(nn.Module):
    """A vector per bucket of the time from an event to the request (industrial variant).

    The request is the sample's first target, or its newest event if it has none; buckets are whole square roots, or
    logarithms, of minutes.
    """

    thresholds: Tensor

    def __init__(self, kind: Literal["sqrt", "log"], *, time_unit: float, width: int) -> None:
        super().__init__()
        thresholds = elapsed_thresholds(kind, num_buckets=NUM_TIME_BUCKETS, time_unit=time_unit)
        # They follow from the configuration, so a checkpoint need not hold them.
        self.register_buffer("thresholds", thresholds, persistent=False)
        bound = NUM_TIME_BUCKETS**-0.5
        self.vectors = nn.Embedding(NUM_TIME_BUCKETS + 1, width)
        nn.init.uniform_(self.vectors.weight, -bound, bound)

    def buckets(self, layout: Layout, timestamps: Tensor) -> Tensor:
        """The bucket of each event, [T] int64 in 0..NUM_TIME_BUCKETS."""
        newest = layout.event_offsets[1:] - 1
        request = torch.minimum(layout.event_offsets[:-1] + layout.num_history, newest)
        return elapsed_buckets(timestamps[request[layout.sample_of_event]] - timestamps, self.thresholds)
