"""The relative bias of one tile of scores, and the gradient of its weights from the gradient of the scores."""

# G = sequences of a group, R = queries and C = keys of a tile

import torch
import torch.nn.functional as F
from torch import Tensor


class TileBias:
    """Bias values of tiles, and running sums, in float64, of the gradients of position_weight and time_weight."""

    def __init__(
        self, position_weight: Tensor | None, time_weight: Tensor | None, max_seq_len: int, dtype: torch.dtype
    ) -> None:
        self.max_seq_len = max_seq_len
        self.position_weight = None if position_weight is None else position_weight.detach().to(dtype)
        self.time_weight = None if time_weight is None else time_weight.detach().to(dtype)
        if self.position_weight is not None:
            self.position_grad = torch.zeros_like(self.position_weight, dtype=torch.float64)
        if self.time_weight is not None:
            self.time_grad = torch.zeros_like(self.time_weight, dtype=torch.float64)

    def values(self, rows: slice, keys: slice, buckets_GRC: Tensor | None) -> Tensor:
        """The bias of a tile, `[1 or G, R, C]`."""
        if buckets_GRC is None or self.time_weight is None:
            return self._position_values(rows, keys)
        values = self.time_weight.index_select(0, buckets_GRC.flatten()).view(buckets_GRC.shape)
        return values if self.position_weight is None else values.add_(self._position_values(rows, keys))

    def add_gradient(self, dbias_GRC: Tensor, rows: slice, keys: slice, buckets_GRC: Tensor | None) -> None:
        """Add what the gradient of a tile's bias, summed over the heads, contributes to those of the weights."""
        if self.position_weight is not None:
            self.position_grad[self._offsets(rows, keys)] += _sum_of_diagonals(dbias_GRC.sum(0))
        if buckets_GRC is not None:
            weights = dbias_GRC.flatten().to(torch.float64)
            self.time_grad += torch.bincount(buckets_GRC.flatten(), weights, minlength=len(self.time_grad))

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
