"""Which keys a query sees: causal, semi-local, candidates that ignore each other, contextual tokens in front."""

import operator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The visibility rule of one attention layer; causal, and with all values 0 nothing but causal.

    Every token has an id: its position, except that all contextual tokens share the first id, and all targets share the
    last, the history end. A query sees itself and keys of smaller id; tokens of the same id do not see each other.
    Contextual tokens see the whole history. The window is the local part of the semi-local attention of ULTRA-HSTU
    (arXiv 2602.16986, equations 6 and 7); full_tail and prefix are the two readings of its global part.
    """

    window: int = 0
    """How far back, in ids, a query sees (itself and `window` more); 0 is all the way."""
    full_tail: int = 0
    """The last `full_tail` events of the history, and the targets, are exempt from the window."""
    prefix: int = 0
    """The first `prefix` keys are seen from beyond the window, and targets are exempt from the window."""
    num_contextual: int = 0
    """How many tokens in front of every sequence describe the user rather than an event."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            count = _count(value)
            if count is None:
                raise ValueError(f"AttentionMask {field.name}={value!r} is not a count; 0 switches it off")
            if count is not value:
                object.__setattr__(self, field.name, count)

    @property
    def depends_on_history_end(self) -> bool:
        """Whether, without targets, sequences of different length have different masks."""
        return self.full_tail > 0 or self.num_contextual > 0

    def history_end(self, length: int, num_targets: int) -> int:
        """The id that all targets share, one above that of the last event of the history."""
        return length - num_targets - max(self.num_contextual - 1, 0)

    def visible(self, rows: Tensor, keys: Tensor, history_end: Tensor) -> Tensor:
        """Whether each query sees each key.

        Args:
            rows: positions of queries in their sequence, integers `[..., R, 1]`.
            keys: positions of keys, integers `[..., 1, C]`; those behind the end of the sequence are hidden.
            history_end: `history_end` of the sequences, integers, broadcast against both.

        Returns:
            bool `[..., R, C]`.
        """
        row_ids, key_ids = self.ids(rows, history_end), self.ids(keys, history_end)
        seen = row_ids > key_ids
        if self.window:
            exempt = row_ids - key_ids <= self.window
            if self.full_tail:
                exempt = exempt | (row_ids >= history_end - self.full_tail)
            if self.prefix:
                exempt = exempt | (keys < max(self.prefix, self.num_contextual)) | (row_ids == history_end)
            seen = seen & exempt
        if self.num_contextual:
            seen = seen | ((row_ids == 0) & (key_ids < history_end))
        return seen | (rows == keys)

    def is_alike_along(self, rows: slice, keys: slice, history_end: int) -> bool:
        """Whether these queries see these keys by their distance alone."""
        first, last = min(rows.start, keys.start), max(rows.stop, keys.stop) - 1
        begins = max(self.num_contextual, self.prefix)
        return first >= begins and last - max(self.num_contextual - 1, 0) < history_end - self.full_tail

    def ids(self, positions: Tensor, history_end: Tensor) -> Tensor:
        """The id of each position, integers, broadcast against `history_end`."""
        if self.num_contextual:
            positions = (positions - self.num_contextual + 1).clamp(min=0)
        return torch.minimum(positions, history_end)

    def id_of(self, position: int, history_end: int) -> int:
        """The id of one position."""
        return min(max(position - max(self.num_contextual - 1, 0), 0), history_end)

    def first_position(self, token_id: int) -> int:
        """Where the tokens of this id, or of 0 if it is negative, begin."""
        return token_id + max(self.num_contextual - 1, 0) if token_id > 0 else 0


def _count(value: Any) -> int | None:
    """The int that an integer of any library stands for, such as numpy's; None if it is negative or none at all."""
    if type(value) is not int:
        try:
            value = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            return None
    return None if value is None or value < 0 else value
