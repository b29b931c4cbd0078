"""What the attention over a batch needs to know besides numbers to compute with: its groups, strips, hidden scores and
time buckets. Made once for all layers, forward and backward.
"""

# T = events of all sequences, B = sequences, H = heads, G = sequences of a group, R = queries and C = keys of a strip

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from .band import band_of
from .bias import bucket_thresholds, time_buckets
from .inputs import check_values
from .mask import AttentionMask
from .packing import SHORT, Group, Packing, pack_sequences
from .tiles import Strip, strips_of

STRIP_KEYS = 1024
"""Most keys of a strip: 256 by 1024 float32 fill an EPYC core's second cache; 512 keys took a seventh longer."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a floating point number, the integers that have its bits."""
NUM_REMEMBERED = 4
"""Batches whose plans are kept: layers may attend in a few different ways to the same one."""


@dataclass(frozen=True)
class Times:
    """What the time bias looks at."""

    queries: Tensor
    """`[T]` int64."""
    keys: Tensor
    """`[T]` int64."""
    thresholds: Tensor
    """From which elapsed time on each bucket counts."""


class GroupPlan:
    """How to compute the scores of a group, strip by strip."""

    def __init__(self, group: Group, mask: AttentionMask, history_ends: list[int], times: Times | None) -> None:
        self.group, self.mask, self.history_ends, self.times = group, mask, history_ends, times
        self.band = None if group.is_short else band_of(mask, history_ends[0])
        self._strips: dict[int, list[list[Strip]]] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}
        self._shown: dict[tuple[object, ...], list[Tensor]] = {}
        self._buckets: dict[tuple[int, int], Tensor] = {}

    def strips(self, first_row: int = 0) -> list[list[Strip]]:
        """All strips, of queries from a first one on, in which some sequence of the group sees something; those of the
        same queries together.
        """
        if first_row not in self._strips:
            length = self.group.length
            tile = _tile_of(length)
            strips = strips_of(
                self.mask, length, self.history_ends, tile=tile, most_keys=STRIP_KEYS, first_row=first_row
            )
            self._strips[first_row] = [list(row) for _, row in groupby(strips, key=lambda strip: strip.rows.start)]
        return self._strips[first_row]

    def hide_(self, strip: Strip, x_RC: Tensor) -> None:
        """Make zeros, in place, of what the mask hides, whatever it was: a product with zero would let NaN through."""
        if not strip.masked:
            return
        bits_RC = x_RC.view(BITS[x_RC.element_size()])
        place = (bits_RC.dtype, strip.rows.start, strip.rows.stop, strip.keys.start, strip.keys.stop)
        if place not in self._shown:
            self._shown[place] = [self._mask(strip.rows, keys, bits_RC) for keys in strip.masked]
        for keys, mask in zip(strip.masked, self._shown[place], strict=True):
            part = bits_RC.narrow(-1, keys.start - strip.keys.start, keys.stop - keys.start)
            if mask.dim() > 2:
                part = part.view(len(mask), -1, *part.shape[-2:])
            part.bitwise_and_(mask)

    def buckets(self, strip: Strip) -> Tensor | None:
        """The time bucket of every score of a strip, int32 `[G, R, C]`; None without a time bias."""
        if self.times is None:
            return None
        if not self.group.is_short:
            return self._compute_buckets(strip)
        place = (strip.rows.start, strip.keys.start)
        if place not in self._buckets:
            # A byte holds the number of any bucket; a short sequence has at most 256 of them per event.
            self._buckets[place] = self._compute_buckets(strip).to(torch.uint8)
        return self._buckets[place].to(torch.int32)

    def _compute_buckets(self, strip: Strip) -> Tensor:
        assert self.times is not None
        queries = self.times.queries[self.group.tokens_GL[:, strip.rows]]
        keys = self.times.keys[self.group.tokens_GL[:, strip.keys]]
        return time_buckets((queries[:, :, None] - keys[:, None, :]).abs_(), self.times.thresholds)

    def _mask(self, rows: slice, keys: slice, bits: Tensor) -> Tensor:
        """All bits where a query sees a key, else none, `[R, C]` or `[G, 1, R, C]`; alike places share one."""
        place: tuple[object, ...] = (bits.dtype, rows.start, rows.stop, keys.start, keys.stop)
        depends_on_place = not self.mask.is_alike_along(rows, keys, min(self.history_ends))
        if not depends_on_place:
            place = (bits.dtype, rows.start - keys.start, rows.stop - keys.start, keys.stop - keys.start)
        if place not in self._masks:
            row = torch.arange(rows.start, rows.stop, device=bits.device)[:, None]
            key = torch.arange(keys.start, keys.stop, device=bits.device)
            ends = self.history_ends if depends_on_place else self.history_ends[:1]
            end = torch.tensor(ends, device=bits.device)[:, None, None, None]
            visible = self.mask.visible(row, key, end)
            self._masks[place] = (visible if len(visible) > 1 else visible[0, 0]).to(bits.dtype).neg_()
        return self._masks[place]


@dataclass(frozen=True)
class Plan:
    """The groups of a batch, longest sequences first."""

    packing: Packing
    groups: list[GroupPlan]


@dataclass(frozen=True)
class Batch:
    """All that a plan depends on, by value."""

    offsets: Tensor
    num_targets: Tensor | None
    timestamps: Tensor | None
    query_timestamps: Tensor | None
    num_buckets: int
    num_heads: int
    max_seq_len: int
    num_events: int
    mask: AttentionMask
    device: torch.device

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may change in place."""
        return self.offsets, self.num_targets, self.timestamps, self.query_timestamps

    def settings(self) -> tuple[object, ...]:
        """What cannot."""
        return self.num_buckets, self.num_heads, self.max_seq_len, self.num_events, self.mask, self.device

    def copy(self) -> "Batch":
        """The same values in memory of its own."""
        return replace(
            self,
            offsets=self.offsets.clone(),
            num_targets=_copy(self.num_targets),
            timestamps=_copy(self.timestamps),
            query_timestamps=_copy(self.query_timestamps),
        )

    def equals(self, other: "Batch") -> bool:
        """Whether all values are the same."""
        same = self.settings() == other.settings()
        return same and all(_same(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))


def plan_of(batch: Batch) -> Plan:
    """The plan of a batch; the one made before, if still remembered.

    Raises:
        ValueError: offsets or num_targets do not describe the batch.
    """
    for known, plan in _remembered:
        if known.equals(batch):
            return plan
    batch = batch.copy()
    plan = _make(batch)
    _remembered.insert(0, (batch, plan))
    del _remembered[NUM_REMEMBERED:]
    return plan


_remembered: list[tuple[Batch, Plan]] = []


def _make(batch: Batch) -> Plan:
    bounds, targets = check_values(
        batch.offsets, batch.num_targets, num_events=batch.num_events, max_seq_len=batch.max_seq_len
    )
    times = None
    if batch.num_buckets and batch.timestamps is not None:
        queries = batch.timestamps if batch.query_timestamps is None else batch.query_timestamps
        times = Times(queries, batch.timestamps, bucket_thresholds(batch.num_buckets, batch.device))
    packing, plans = pack_sequences(bounds, num_heads=batch.num_heads, device=batch.device), []
    for group in packing.groups:
        ends = [batch.mask.history_end(bounds[b + 1] - bounds[b], targets[b]) for b in group.sequences]
        if batch.num_targets is None and not batch.mask.depends_on_history_end:
            ends = [group.length]
        plans.append(GroupPlan(group, batch.mask, ends, times))
    return Plan(packing, plans)


def _tile_of(length: int) -> int:
    """How many queries, and keys, a tile has.

    Smaller ones compute fewer hidden scores along the edges, larger ones multiply faster: with 128 instead of 256 for
    long sequences, batches of up to 1024 and 4096 events took a seventh longer, and so did a window of 256.
    """
    most = 64 if length <= SHORT else 256
    # As equal as can be, in whole vectors of 16 floats.
    return -(-length // -(-length // most) // 16) * 16 if length > most else length


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype is b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
