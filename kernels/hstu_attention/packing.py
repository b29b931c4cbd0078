"""Sequences of nearly one length side by side, so that many short ones cost one matrix product.

A group is padded to its own longest sequence, never to the longest of the batch.
"""

# T = events of all sequences, H = heads, D = width of a row, G = sequences of a group, L = length of its longest,
# P = packed rows of all groups

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TILE = 256
"""Most queries, and most keys, whose scores are held at once, per sequence and head."""
GROUP_SCORES = 1 << 18
"""Most scores of a group held at once, 1 MB in float32; on an EPYC core 2**16 and 2**19 were up to a fifth slower."""
LEAST_FILL = 0.8
"""A sequence joins a group if it fills this share of the longest: so at most 36% of the scores are padding."""


@dataclass(frozen=True)
class Group:
    """G sequences, each padded to L events by repeating its last one."""

    sequences: list[int]
    tokens_GL: Tensor
    is_event_GL: Tensor
    """False where tokens_GL is padding."""
    rows: Tensor
    """`[G * H * L]`: which row of a `[T * H, D]` tensor each packed row holds; by sequence, head, position."""
    packed: slice
    """Where these rows are among those of all groups."""

    @property
    def length(self) -> int:
        """L."""
        return self.tokens_GL.shape[1]

    def pack(self, x_THD: Tensor) -> Tensor:
        """`[G * H, L, D]` of a contiguous `[T, H, D]`."""
        rows = x_THD.flatten(0, 1).index_select(0, self.rows)
        return rows.view(-1, self.length, x_THD.shape[2])

    def pack_scale(self, scale_T: Tensor) -> Tensor:
        """`[G * H, L, 1]` of one number per event, 0 on padding."""
        scale_GL = scale_T[self.tokens_GL] * self.is_event_GL
        num_heads = self.rows.shape[0] // scale_GL.numel()
        return scale_GL[:, None, :].expand(-1, num_heads, -1).reshape(-1, self.length, 1)

    def part_of(self, x_PD: Tensor) -> Tensor:
        """The view `[G * H, L, D]` of this group into packed rows `[P, D]`."""
        return x_PD[self.packed].view(-1, self.length, x_PD.shape[1])


@dataclass(frozen=True)
class Packing:
    """All events of a batch in groups, and the way back."""

    groups: list[Group]
    num_rows: int
    """P."""
    places_TH: Tensor
    """The packed row of each event and head."""

    def unpack(self, x_PD: Tensor) -> Tensor:
        """`[T, H, D]` of packed rows `[P, D]`; padding is dropped."""
        return x_PD.index_select(0, self.places_TH.flatten()).view(*self.places_TH.shape, x_PD.shape[1])


def pack_sequences(bounds: list[int], *, num_heads: int, device: torch.device) -> Packing:
    """Group the sequences, events `bounds[b]` to `bounds[b + 1]`, by length; a pure function of its arguments."""
    lengths = [end - start for start, end in pairwise(bounds)]
    places_TH = torch.empty(bounds[-1], num_heads, dtype=torch.int64)
    heads = torch.arange(num_heads)
    groups, num_rows = [], 0
    for members in group_by_length(lengths, num_heads):
        length = lengths[members[0]]
        starts = torch.tensor([bounds[b] for b in members])
        sizes = torch.tensor([lengths[b] for b in members])
        position = torch.arange(length)
        is_event = position < sizes[:, None]
        tokens = starts[:, None] + torch.minimum(position, sizes[:, None] - 1)
        rows = tokens[:, None, :] * num_heads + heads[:, None]
        packed = slice(num_rows, num_rows + rows.numel())
        places = torch.arange(packed.start, packed.stop).view(rows.shape).transpose(1, 2)
        places_TH[tokens[is_event]] = places[is_event]
        num_rows = packed.stop
        groups.append(Group(members, tokens.to(device), is_event.to(device), rows.flatten().to(device), packed))
    return Packing(groups, num_rows, places_TH.to(device))


def group_by_length(lengths: list[int], num_heads: int) -> list[list[int]]:
    """The indices of all non-empty sequences, longest first, split into groups."""
    groups: list[list[int]] = []
    longest = capacity = 0
    for b in sorted((b for b, length in enumerate(lengths) if length), key=lambda b: -lengths[b]):
        if not groups or len(groups[-1]) >= capacity or lengths[b] < LEAST_FILL * longest:
            longest = lengths[b]
            capacity = max(1, GROUP_SCORES // (num_heads * min(longest, TILE) ** 2))
            groups.append([])
        groups[-1].append(b)
    return groups
