"""The scores of HSTU attention a tile at a time, the same for forward and backward: bias, mask, and their order."""

# T = events of all sequences, H = heads, D = head width, P = packed rows of all groups, G = sequences of a group,
# L = length of its longest, M = G * H matrices of a group, R = queries and C = keys of a tile

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bias import RelativeBias
from .inputs import check_values
from .mask import AttentionMask
from .operator import Problem
from .packing import TILE, Group, pack_sequences
from .tile_bias import TileBias
from .tiles import visible_tiles


@dataclass(frozen=True)
class Tile:
    """Some queries and some keys of every sequence of a group."""

    num_heads: int
    rows: slice
    keys: slice
    visible: Tensor | None
    """1 where a query sees a key and 0 elsewhere, `[1 or G, 1, R, C]`; None if all of the tile is visible."""
    buckets: Tensor | None
    """The time buckets `[G, R, C]`, if there is a time bias."""

    def hide_(self, x_MRC: Tensor) -> Tensor:
        """Set to zero, in place, what the mask hides."""
        if self.visible is not None:
            self.of_heads(x_MRC).mul_(self.visible)
        return x_MRC

    def of_heads(self, x_MRC: Tensor) -> Tensor:
        """The view `[G, H, R, C]`."""
        return x_MRC.view(-1, self.num_heads, *x_MRC.shape[1:])


class BlockedScores:
    """`alpha * <q_i, k_j> + bias_ij` of a batch, by groups of sequences and tiles of their scores."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        offsets: Tensor,
        num_targets: Tensor | None,
        *,
        max_seq_len: int,
        alpha: float,
        mask: AttentionMask,
        bias: RelativeBias | None,
    ) -> None:
        bounds, targets = check_values(offsets, num_targets, num_events=q.shape[0], max_seq_len=max_seq_len)
        self.q, self.k, self.alpha, self.mask = q.contiguous(), k.contiguous(), alpha, mask
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.packing = pack_sequences(bounds, num_heads=q.shape[1], device=q.device)
        self.history_ends = [mask.history_end(bounds[b + 1] - bounds[b], num) for b, num in enumerate(targets)]
        self.mask_differs = num_targets is not None or mask.depends_on_history_end
        self.bias = None if bias is None else TileBias(bias, max_seq_len, self.dtype)

    @classmethod
    def of(cls, problem: Problem) -> "BlockedScores":
        """The scores of what an operator was called with."""
        return cls(
            problem.q,
            problem.k,
            problem.offsets,
            problem.num_targets,
            max_seq_len=problem.max_seq_len,
            alpha=problem.alpha,
            mask=problem.mask,
            bias=problem.bias,
        )

    def zeros_like(self, x_THD: Tensor) -> Tensor:
        """Packed rows `[P, D]` to sum into."""
        return torch.zeros(self.packing.num_rows, x_THD.shape[2], dtype=self.dtype, device=x_THD.device)

    def queries_and_keys(self, group: Group) -> tuple[Tensor, Tensor]:
        """`[M, L, D]` twice; the queries carry the factor alpha."""
        return group.pack(self.q).to(self.dtype).mul_(self.alpha), group.pack(self.k).to(self.dtype)

    def tiles(self, group: Group) -> Iterator[Tile]:
        """The tiles of a group that are not hidden entirely."""
        ends = [self.history_ends[b] for b in group.sequences]
        position = torch.arange(group.length, device=self.q.device)
        end_G11 = torch.tensor(ends if self.mask_differs else ends[:1], device=self.q.device)[:, None, None]
        for rows, keys, all_visible in visible_tiles(self.mask, group.length, ends, TILE):
            visible = None
            if not all_visible:
                seen = self.mask.visible(position[rows, None], position[None, keys], end_G11)
                visible = seen[:, None].to(self.dtype)
            buckets = None if self.bias is None else self.bias.buckets(group.tokens_GL, rows, keys)
            yield Tile(self.q.shape[1], rows, keys, visible, buckets)

    def of_tile(self, tile: Tile, q_MLD: Tensor, k_MLD: Tensor) -> Tensor:
        """The scores `[M, R, C]` of a tile, hidden ones included."""
        q_MRD, k_MDC = q_MLD[:, tile.rows], k_MLD[:, tile.keys].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(q_MRD, k_MDC)
        bias = self.bias.values(tile.rows, tile.keys, tile.buckets)[:, None]
        num_matrices, num_rows, num_keys = q_MRD.shape[0], q_MRD.shape[1], k_MDC.shape[2]
        bias_GHRC = bias.expand(num_matrices // tile.num_heads, tile.num_heads, num_rows, num_keys)
        return torch.baddbmm(bias_GHRC.reshape(num_matrices, num_rows, num_keys), q_MRD, k_MDC)
