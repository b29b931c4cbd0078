"""The gradients of the bias weights from what bias_kernel sums up."""

# T = events of all sequences, N = max_seq_len, H = heads, R = C = queries and keys of a tile

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launching import Launch
from .operator import Problem
from .triton_blocks import Blocks
from .triton_kernels.bias_gradient import Buckets, bias_kernel
from .triton_launch import bias_of, blocks_for, events_of, options_of, scale_of, sequences_of, variant_of

NUM_PROGRAMS = 2048
"""About how many programs there are if sequences allow it: several for every multiprocessor of any device."""
NUM_COPIES = 64
LARGEST_SUM = 2.0**62


@dataclass(frozen=True)
class BiasPass:
    """The sums of bias_kernel and its launch, which fills them."""

    max_seq_len: int
    num_tiles: int
    bands: Tensor | None
    """`[bands, chunks, R, C]` float32, from the band farthest above the diagonal to that farthest below."""
    buckets: Buckets | None
    launch: Launch

    @classmethod
    def of(cls, problem: Problem, dout: Tensor, target: str, blocks: Blocks | None = None) -> "BiasPass":
        """The pass for a problem with a bias and at least one event."""
        blocks = blocks or blocks_for("bias", problem, target)
        sequences = sequences_of(problem, blocks.rows)
        # Only contextual queries see keys behind themselves.
        num_bands = 2 * sequences.num_tiles - 1 if problem.mask.num_contextual else sequences.num_tiles
        num_sequences = len(problem.offsets) - 1
        num_chunks = min(max(1, NUM_PROGRAMS // num_bands), num_sequences)
        bands = buckets = None
        if problem.position_weight is not None:
            shape = (num_bands, num_chunks, blocks.rows, blocks.keys)
            bands = torch.empty(shape, dtype=torch.float32, device=dout.device)
        if problem.time_weight is not None:
            num_buckets = len(problem.time_weight)
            sums = torch.zeros(NUM_COPIES, num_buckets, dtype=torch.int64, device=dout.device)
            not_finite = torch.zeros(num_buckets, dtype=torch.float32, device=dout.device)
            buckets = Buckets(sums, _units_per_one(problem, dout), NUM_COPIES, num_buckets, not_finite)
        arguments = {
            **{name: events_of(x) for name, x in zip("qkv", problem[:3], strict=True)},
            "dout": events_of(dout),
            "bands": bands,
            "buckets": buckets,
            "scale": scale_of(problem),
            "sequences": sequences,
            "num_sequences": num_sequences,
            "num_chunks": num_chunks,
            "num_bands": num_bands,
            "bias": bias_of(problem),
            "half_alpha": problem.alpha / 2,
            "VARIANT": variant_of(problem, blocks, target),
        }
        launch = Launch(bias_kernel, (num_bands * num_chunks,), arguments, options_of(blocks, target))
        return cls(problem.max_seq_len, sequences.num_tiles, bands, buckets, launch)

    def position_gradient(self) -> Tensor:
        """`[2 N - 1]` float64."""
        assert self.bands is not None, "there are bands where there are position weights"
        sums_BRC = self.bands.sum(1, dtype=torch.float64)
        num_bands, tile, _ = sums_BRC.shape
        # Padding each row by R and reading rows one shorter moves row r by r places: diagonals become columns.
        padded = F.pad(sums_BRC.flip(2), (0, tile)).flatten(1)
        diagonals = padded[:, : tile * (2 * tile - 1)].view(num_bands, tile, 2 * tile - 1).sum(1)
        # The diagonals of a band are the last ones of the band before, and new ones.
        grad = F.pad(diagonals[:, :tile].flatten(), (0, tile))
        grad[tile:] += F.pad(diagonals[:, tile:], (0, 1)).flatten()
        first = (self.num_tiles - num_bands) * tile - (tile - 1)
        wanted = -(self.max_seq_len - 1)
        grad = F.pad(grad, (max(first - wanted, 0), 2 * self.max_seq_len))
        return grad[max(wanted - first, 0) :][: 2 * self.max_seq_len - 1]

    def time_gradient(self) -> Tensor:
        """`[K + 1]` float64."""
        assert self.buckets is not None, "there are buckets where there are time weights"
        return self.buckets.sums.sum(0) / self.buckets.units_per_one.double() + self.buckets.not_finite


def _units_per_one(problem: Problem, dout: Tensor) -> Tensor:
    """How many integer units make 1: as many as leave room for the sum of all gradients of scores, without their signs.

    Of a score that is at most scale |dout| |v| times the derivative of SiLU, which is below 1.1. Summed over queries,
    one with a far larger gradient than all others takes few bits from those; for keys the longest v counts.
    """
    dout_TH, v_TH = (torch.linalg.vector_norm(x, dim=2, dtype=torch.float64) for x in (dout, problem.v))
    # What is not finite is not summed up.
    dout_TH, v_TH = (x.nan_to_num(nan=0, posinf=0) for x in (dout_TH * problem.scale.abs()[:, None], v_TH))
    bound = 1.2 * problem.max_seq_len * (dout_TH.sum(0) * v_TH.amax(0)).sum()
    return torch.exp2((LARGEST_SUM / bound).log2().floor().clamp(-126, 126)).float()
