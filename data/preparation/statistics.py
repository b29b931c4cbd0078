"""What is counted while histories are written: lengths of all users and training events of each item.

Memory is one number per item and one per distinct length, whatever the number of users and events.
"""

import numpy as np
import numpy.typing as npt

from ..schema import Lengths

Integers = npt.NDArray[np.int64]

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


class LengthCounter:
    """How many users have which number of events; exact, since the distinct lengths are few."""

    def __init__(self) -> None:
        self._lengths = np.zeros(0, np.int64)
        self._users = np.zeros(0, np.int64)

    def add(self, num_events: npt.NDArray[np.integer]) -> None:
        """Count these users."""
        lengths, users = np.unique(num_events, return_counts=True)
        both = np.concatenate([self._lengths, lengths.astype(np.int64)])
        self._lengths, place = np.unique(both, return_inverse=True)
        self._users = np.bincount(place, np.concatenate([self._users, users])).astype(np.int64)

    def summary(self) -> Lengths:
        """What `dataset.json` says of all users counted."""
        users, events = self._users, self._lengths * self._users
        up_to = np.cumsum(users)
        total = int(users.sum())
        quantiles = {}
        for share in QUANTILES:
            place = int(np.searchsorted(up_to, np.ceil(share * total)))
            quantiles[str(share)] = int(self._lengths[place]) if total else 0
        buckets = _buckets(int(self._lengths.max(initial=0)))
        bucket = np.searchsorted(buckets, self._lengths, side="right") - 1
        return Lengths(
            mean=round(int(events.sum()) / max(total, 1), 3),
            quantiles=quantiles,
            bucket_from=tuple(buckets),
            bucket_users=_sums(bucket, users, len(buckets)),
            bucket_events=_sums(bucket, events, len(buckets)),
        )


class ItemCounter:
    """[num_items] training events of each dense id, from 1."""

    def __init__(self, counts: Integers) -> None:
        self.counts = counts

    def add(self, items: Integers, *, sign: int = 1) -> None:
        """Count these ids, of which 0 is nobody's; `sign` -1 takes them back."""
        ids, found = np.unique(items[items > 0], return_counts=True)
        self.counts[ids - 1] += sign * found


def _buckets(longest: int) -> list[int]:
    """0, 1, 2, 4, 8, … up to the longest."""
    return [0] + [1 << k for k in range(longest.bit_length())]


def _sums(bucket: Integers, values: Integers, size: int) -> tuple[int, ...]:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, bucket, values)
    return tuple(sums.tolist())
