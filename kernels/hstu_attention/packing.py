"""Sequences of nearly one length side by side, so that many short ones cost one matrix product.

A group is padded to its own longest sequence, never to the longest of the batch.
"""

# T = events of all sequences, H = heads, D = width of a row, G = sequences of a group, L = length of its longest,
# M = some of the G * H matrices of a group

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..pages import in_huge_pages

SHORT = 256
"""Sequences up to this length share matrix products; those of longer ones are large enough alone."""
GROUP_SCORES = 1 << 18
"""Most scores of a group, 1 MB in float32; on an EPYC core 2**16 and 2**19 were up to a fifth slower."""
LEAST_FILL = 0.8
"""A sequence joins a group if it fills this share of the longest: so at most 36% of the scores are padding."""


@dataclass(frozen=True)
class Group:
    """G sequences, each padded to L events by repeating its last one; one sequence if it is not short."""

    sequences: list[int]
    tokens_GL: Tensor
    is_event_GL: Tensor
    """False where tokens_GL is padding."""
    num_heads: int
    packed: slice
    """Where its rows are among those of all short groups; nowhere if it is not short."""
    first: int
    """The first event of the first sequence."""

    @property
    def length(self) -> int:
        """L."""
        return self.tokens_GL.shape[1]

    @property
    def is_short(self) -> bool:
        """Whether the group's matrices are multiplied together, not one by one."""
        return self.length <= SHORT

    @cached_property
    def rows(self) -> Tensor:
        """`[G * H, L]`: which row of a `[T * H, D]` tensor each row holds; by sequence, head, position."""
        heads = torch.arange(self.num_heads, device=self.tokens_GL.device)[:, None]
        return (self.tokens_GL[:, None, :] * self.num_heads + heads).flatten(0, 1)

    def rows_of(self, x_THD: Tensor, matrices: slice) -> Tensor:
        """Some of the group's matrices `[M, L, D]`; a view unless it is short."""
        if not self.is_short:
            return self.view_of(x_THD)[matrices]
        rows = self.rows[matrices]
        return x_THD.contiguous().flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x_THD.shape[2])

    def scale_rows(self, scale_T: Tensor, matrices: slice) -> Tensor:
        """`[M, L, 1]` of one number per event, 0 on padding."""
        scale_GL = scale_T[self.tokens_GL] * self.is_event_GL
        return scale_GL.repeat_interleave(self.num_heads, 0)[matrices, :, None]

    def view_of(self, x_THD: Tensor) -> Tensor:
        """All matrices `[H, L, D]` of the only sequence."""
        return x_THD[self.first : self.first + self.length].transpose(0, 1)


@dataclass(frozen=True)
class Packing:
    """All events of a batch in groups, and the way back from the rows of the short ones."""

    groups: list[Group]
    num_rows: int
    """Rows of all short groups, padding included."""
    packed_rows: Tensor
    """The rows that stand for events."""
    event_rows: Tensor
    """Their places in a `[T * H, D]` tensor, ascending."""


class Output:
    """A `[T, H, D]` tensor that is written group by group: short groups through rows of their own."""

    def __init__(self, packing: Packing, like_THD: Tensor, dtype: torch.dtype) -> None:
        self.packing = packing
        self.packed = like_THD.new_empty(packing.num_rows, like_THD.shape[2], dtype=dtype)
        self.x_THD = in_huge_pages(like_THD.new_empty(like_THD.shape, dtype=dtype))

    def part_of(self, group: Group, matrices: slice) -> Tensor:
        """Where some matrices `[M, L, D]` of a group are to be written."""
        if group.is_short:
            return self.packed[group.packed].view(-1, group.length, self.packed.shape[1])[matrices]
        return group.view_of(self.x_THD)[matrices]

    def finish(self) -> Tensor:
        """The tensor, once all groups are written."""
        if not self.packing.num_rows:
            return self.x_THD
        rows = self.packed.index_select(0, self.packing.packed_rows)
        if len(rows) == self.x_THD.shape[:2].numel():
            return rows.view_as(self.x_THD)
        # Scattering takes four times as long per row as gathering; but next to long sequences neither counts.
        self.x_THD.view(-1, rows.shape[1]).index_copy_(0, self.packing.event_rows, rows)
        return self.x_THD


def pack_sequences(bounds: list[int], *, num_heads: int, device: torch.device) -> Packing:
    """Group the sequences, events `bounds[b]` to `bounds[b + 1]`, by length; a pure function of its arguments."""
    lengths = [end - start for start, end in pairwise(bounds)]
    groups, num_rows = [], 0
    for members in group_by_length(lengths, num_heads):
        starts = torch.tensor([bounds[b] for b in members])[:, None]
        sizes = torch.tensor([lengths[b] for b in members])[:, None]
        position = torch.arange(lengths[members[0]])
        tokens, is_event = starts + torch.minimum(position, sizes - 1), position < sizes
        stop = num_rows + (tokens.numel() * num_heads if len(position) <= SHORT else 0)
        packed = slice(num_rows, stop)
        groups.append(Group(members, tokens.to(device), is_event.to(device), num_heads, packed, bounds[members[0]]))
        num_rows = stop
    return Packing(groups, num_rows, *_events_of([group for group in groups if group.is_short], device))


def _events_of(groups: list[Group], device: torch.device) -> tuple[Tensor, Tensor]:
    """The packed rows of these groups that stand for events, and their places among all events, ascending."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    is_event = [group.is_event_GL.repeat_interleave(group.num_heads, 0).flatten() for group in groups]
    packed = torch.cat([none.bool(), *is_event]).nonzero().flatten()
    places, order = torch.cat([none, *(group.rows.flatten() for group in groups)])[packed].sort()
    return packed[order], places


def group_by_length(lengths: list[int], num_heads: int) -> list[list[int]]:
    """The indices of all non-empty sequences, longest first, split into groups."""
    groups: list[list[int]] = []
    longest = capacity = 0
    for b in sorted((b for b, length in enumerate(lengths) if length), key=lambda b: -lengths[b]):
        if not groups or len(groups[-1]) >= capacity or lengths[b] < LEAST_FILL * longest:
            longest = lengths[b]
            capacity = 1 if longest > SHORT else max(1, GROUP_SCORES // (num_heads * longest**2))
            groups.append([])
        groups[-1].append(b)
    return groups
