"""The relative bias of one tile of scores, and the gradient of its weights from the gradient of the scores."""

# G = sequences of a group, L = length of its longest, H = heads, R = queries and C = keys of a tile

import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import RelativeBias, bucket_thresholds, time_buckets


class TileBias:
    """Bias values of tiles, and running sums, in float64, of the gradients of position_weight and time_weight."""

    def __init__(self, bias: RelativeBias, max_seq_len: int, dtype: torch.dtype) -> None:
        self.max_seq_len = max_seq_len
        self.position_weight = None if bias.position_weight is None else bias.position_weight.detach().to(dtype)
        self.time_weight = None if bias.time_weight is None else bias.time_weight.detach().to(dtype)
        self.timestamps = bias.timestamps
        self.query_timestamps = bias.timestamps if bias.query_timestamps is None else bias.query_timestamps
        if self.position_weight is not None:
            self.position_grad = torch.zeros_like(self.position_weight, dtype=torch.float64)
        if self.time_weight is not None:
            self.time_grad = torch.zeros_like(self.time_weight, dtype=torch.float64)
            self.thresholds = bucket_thresholds(len(self.time_weight) - 1, self.time_weight.device)

    def buckets(self, tokens_GL: Tensor, rows: slice, keys: slice) -> Tensor | None:
        """The time bucket of every score of a tile, int32 `[G, R, C]`; None without a time bias."""
        if self.time_weight is None or self.timestamps is None or self.query_timestamps is None:
            return None
        queries = self.query_timestamps[tokens_GL[:, rows]]
        elapsed = (queries[:, :, None] - self.timestamps[tokens_GL[:, keys]][:, None, :]).abs_()
        return time_buckets(elapsed, self.thresholds)

    def values(self, rows: slice, keys: slice, buckets: Tensor | None) -> Tensor:
        """The bias of a tile, `[1 or G, R, C]`."""
        if buckets is None or self.time_weight is None:
            return self._position_values(rows, keys)
        values = self.time_weight.index_select(0, buckets.flatten()).view(buckets.shape)
        return values if self.position_weight is None else values.add_(self._position_values(rows, keys))

    def add_gradient(self, dscores_GHRC: Tensor, rows: slice, keys: slice, buckets: Tensor | None) -> None:
        """Add what the gradient of a tile of scores contributes to the gradients of the weights."""
        dbias_GRC = dscores_GHRC.sum(1)
        if self.position_weight is not None:
            self.position_grad[self._offsets(rows, keys)] += _sum_of_diagonals(dbias_GRC.sum(0))
        if buckets is not None:
            weights = dbias_GRC.flatten().to(torch.float64)
            self.time_grad += torch.bincount(buckets.flatten(), weights, minlength=len(self.time_grad))

    def _position_values(self, rows: slice, keys: slice) -> Tensor:
        assert self.position_weight is not None, "a RelativeBias has at least one weight"
        num_keys = keys.stop - keys.start
        return self.position_weight[self._offsets(rows, keys)].unfold(0, num_keys, 1).flip(1)[None]

    def _offsets(self, rows: slice, keys: slice) -> slice:
        """The entries of position_weight that a tile uses: one per diagonal, from its last key's at the first query."""
        first = rows.start - (keys.stop - 1) + self.max_seq_len - 1
        return slice(first, first + (rows.stop - rows.start) + (keys.stop - keys.start) - 1)


def _sum_of_diagonals(x_RC: Tensor) -> Tensor:
    """`[R + C - 1]`: the sums of x over constant r - c, ascending."""
    num_rows, num_keys = x_RC.shape
    # Padding each row by R and reading rows one shorter moves row r by r places: diagonals become columns.
    padded = F.pad(x_RC.flip(1), (0, num_rows)).flatten()
    return padded[: num_rows * (num_rows + num_keys - 1)].view(num_rows, -1).sum(0)
