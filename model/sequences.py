"""What backbones know of their tokens: which form a sequence, what each is in it, and when it happened."""

# S = tokens of all sequences, M = targets of all, B = sequences, C = contextual tokens per sequence, E = model width

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import AttentionMask, jagged_concat, jagged_split


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a sequence `[contextual | history | targets]` can be, and what its front sees."""

    num_contextual: int
    max_history: int
    max_targets: int
    tokens_per_event: int = 1
    """2 where what an event of the history shows and what came of it are tokens of their own."""
    actions: tuple[str, ...] = ()
    """The dataset's actions, in the order of their bits."""
    context_sees_history: bool
    """Contextual tokens attend to the whole history; else they are the first tokens of a causal sequence."""
    only_targets: bool = False
    """The head reads targets alone: backbones give theirs, [M, E], and need not make other tokens."""

    @property
    def max_seq_len(self) -> int:
        """N, the longest sequence possible."""
        return self.num_contextual + self.tokens_per_event * self.max_history + self.max_targets

    def newest(self, num_events: int) -> Limits:
        """The limits of sequences cut to the newest `num_events` events of their history."""
        return replace(self, max_history=min(num_events, self.max_history))

    def mask(self, *, window: int = 0, full_tail: int = 0, prefix: int = 0) -> AttentionMask:
        """The causal mask of these sequences, semi-local where a window is given."""
        num_contextual = self.num_contextual if self.context_sees_history else 0
        return AttentionMask(window=window, full_tail=full_tail, prefix=prefix, num_contextual=num_contextual)

    def read_by_head(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Of encoded tokens those that the head reads: all [S, E], or the targets' [M, E]."""
        return x_SE.index_select(0, sequences.target_rows) if self.only_targets else x_SE


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which tokens form a sequence, and when they happened; every tensor is int64."""

    offsets: Tensor
    """[B+1], where each sequence begins and ends among the S tokens."""
    num_targets: Tensor
    """[B], trailing tokens that see the tokens before them and themselves, but not each other."""
    timestamps: Tensor
    """[S]"""
    query_timestamps: Tensor
    """[S], the time a token counts from when it looks at others."""
    actions: Tensor | None = None
    """[S], bitmask of what came of an event, 0 of contextual tokens and targets; only where the backbone reads it."""
    total_targets: int | None = None
    """M; where the host does not know it, it waits for a GPU to say so."""

    @property
    def sequence_of_token(self) -> Tensor:
        """The sequence of each token, [S]."""
        sequences = torch.arange(self.num_targets.numel(), device=self.offsets.device)
        return torch.repeat_interleave(sequences, self.offsets.diff(), output_size=self.timestamps.numel())

    @property
    def history_ends(self) -> Tensor:
        """How many tokens of each sequence stand before its targets, [B]."""
        return self.offsets.diff() - self.num_targets

    @property
    def indices(self) -> Tensor:
        """Each token's number in its sequence, from 0, [S]."""
        tokens = torch.arange(self.timestamps.numel(), device=self.offsets.device)
        return tokens - self.offsets[self.sequence_of_token]

    @property
    def positions(self) -> Tensor:
        """As `indices`, but targets share that of the first: one is scored alike alone and among others; [S]."""
        return torch.minimum(self.indices, self.history_ends[self.sequence_of_token])

    @property
    def is_target(self) -> Tensor:
        """Whether each token is a target, [S] bool."""
        return self.indices >= self.history_ends[self.sequence_of_token]

    @property
    def target_rows(self) -> Tensor:
        """The rows of the targets among the S tokens, [M]."""
        before = self.offsets[1:] - self.num_targets.cumsum(0)
        before = torch.repeat_interleave(before, self.num_targets, output_size=self.total_targets)
        return before + torch.arange(before.numel(), device=before.device)

    def truncate(self, num_events: int, limits: Limits) -> Truncation:
        """Leave behind the events of each history but the newest `num_events`; contextual tokens and targets stay.

        How many are left behind is known to the device only: a GPU makes the host wait here, once per call.
        """
        num_kept = limits.num_contextual + num_events * limits.tokens_per_event
        num_older_B = (self.history_ends - num_kept).clamp(min=0)
        older_offsets = torch.cat([num_older_B.new_zeros(1), num_older_B.cumsum(0)])
        return Truncation(self, older_offsets, int(older_offsets[-1]), limits.num_contextual)

    def keep(self, is_kept: Tensor) -> tuple[Tensor, Sequences]:
        """The rows of some of the tokens, [kept], and the sequences that they form; `is_kept` [S] keeps all targets.

        How many there are is known to the device only: a GPU makes the host wait here, once per call.
        """
        (rows,) = is_kept.nonzero(as_tuple=True)
        kept_before = torch.cat([self.offsets.new_zeros(1), is_kept.cumsum(0)])
        return rows, Sequences(
            offsets=kept_before[self.offsets],
            num_targets=self.num_targets,
            timestamps=self.timestamps[rows],
            query_timestamps=self.query_timestamps[rows],
            actions=None if self.actions is None else self.actions[rows],
            total_targets=self.total_targets,
        )


@dataclass(frozen=True, slots=True)
class Truncation:
    """Sequences `[contextual | older | newest | targets]`, and those without their older events."""

    whole: Sequences
    older_offsets: Tensor
    """[B+1], where the older events of each sequence begin and end among themselves."""
    num_older: int
    num_contextual: int

    @property
    def kept_offsets(self) -> Tensor:
        """[B+1], where each truncated sequence begins and ends."""
        return self.whole.offsets - self.older_offsets

    @property
    def kept(self) -> Sequences:
        """The truncated sequences."""
        whole = self.whole
        fields = [whole.timestamps, whole.query_timestamps]
        if whole.actions is not None:
            fields.append(whole.actions)
        _, kept = self.split(torch.stack(fields, dim=1))
        timestamps, query_timestamps, *actions = kept.unbind(1)
        return Sequences(
            offsets=self.kept_offsets,
            num_targets=whole.num_targets,
            timestamps=timestamps.contiguous(),
            query_timestamps=query_timestamps.contiguous(),
            actions=actions[0].contiguous() if actions else None,
            total_targets=whole.total_targets,
        )

    def split(self, x_S: Tensor) -> tuple[Tensor, Tensor]:
        """Values of all tokens [S, ...] as those of older events, and those of the truncated sequences."""
        prefix = self.num_contextual
        return jagged_split(x_S, self.older_offsets, self.kept_offsets, num_left=self.num_older, right_prefix=prefix)

    def join(self, older: Tensor, kept: Tensor) -> Tensor:
        """What `split` parted, [S, ...]."""
        return jagged_concat(older, kept, self.older_offsets, self.kept_offsets, right_prefix=self.num_contextual)
