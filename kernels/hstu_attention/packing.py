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

    @property
    def length(self) -> int:
        """L."""
        return self.tokens_GL.shape[1]

    def rows_of(self, x_THD: Tensor, matrices: slice) -> Tensor:
        """Some of the group's matrices `[M, L, D]`, by sequence and head: a copy, or a view if it is one sequence."""
        if len(self.sequences) == 1:
            return self._view(x_THD)[matrices]
        rows = self._rows[matrices]
        return x_THD.contiguous().flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)

    def open(self, x_THD: Tensor, matrices: slice) -> Tensor:
        """Space `[M, L, D]` for what close_ will write into x: part of x itself if it is one sequence."""
        if len(self.sequences) == 1:
            return self._view(x_THD)[matrices]
        return x_THD.new_empty(*self._rows[matrices].shape, x_THD.shape[2])

    def close_(self, x_THD: Tensor, rows_MLD: Tensor) -> None:
        """Write all rows that stand for events to their places in x."""
        if len(self.sequences) > 1:
            places, packed = self._events
            x_THD.view(-1, x_THD.shape[2]).index_copy_(0, places, rows_MLD.flatten(0, 1).index_select(0, packed))

    def scale_rows(self, scale_T: Tensor, matrices: slice) -> Tensor:
        """`[M, L, 1]` of one number per event, 0 on padding."""
        scale_GL = scale_T[self.tokens_GL] * self.is_event_GL
        return scale_GL.repeat_interleave(self.num_heads, 0)[matrices, :, None]

    def _view(self, x_THD: Tensor) -> Tensor:
        return x_THD[self._first : self._first + self.length].transpose(0, 1)

    @cached_property
    def _first(self) -> int:
        return int(self.tokens_GL[0, 0])

    @cached_property
    def _rows(self) -> Tensor:
        """`[G * H, L]`: which row of a `[T * H, D]` tensor each row holds."""
        heads = torch.arange(self.num_heads, device=self.tokens_GL.device)[:, None]
        return (self.tokens_GL[:, None, :] * self.num_heads + heads).flatten(0, 1)

    @cached_property
    def _events(self) -> tuple[Tensor, Tensor]:
        """The rows of a `[T * H, D]` tensor, and the rows of the group, that stand for the same events."""
        is_event = self.is_event_GL.repeat_interleave(self.num_heads, 0).flatten()
        return self._rows.flatten()[is_event], is_event.nonzero().flatten()


def pack_sequences(bounds: list[int], *, num_heads: int, device: torch.device) -> list[Group]:
    """Group the sequences, events `bounds[b]` to `bounds[b + 1]`, by length; a pure function of its arguments."""
    lengths = [end - start for start, end in pairwise(bounds)]
    groups = []
    for members in group_by_length(lengths, num_heads):
        starts = torch.tensor([bounds[b] for b in members])[:, None]
        sizes = torch.tensor([lengths[b] for b in members])[:, None]
        position = torch.arange(lengths[members[0]])
        tokens = starts + torch.minimum(position, sizes - 1)
        groups.append(Group(members, tokens.to(device), (position < sizes).to(device), num_heads))
    return groups


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
