"""The backward of the blocked implementation, for one part of the work.

Factors are multiplied into what a product takes, not into what it gives: bfloat16 results would be rounded twice.
"""

# T = events of all sequences, H = heads, D = head width, G = sequences of a group, L = length of its longest,
# M = matrices of a part or of a batch of it, R = queries and C = keys of a strip

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Problem
from .packing import Output
from .part import Part, scaled, sum_dtype, tile_bias
from .products import add_product_, product
from .tile_bias import TileBias
from .tiles import Strip

PIECE = 256
"""Events that are transposed at once."""


@dataclass(frozen=True)
class OutputGradients:
    """What the parts write to."""

    dq: Output
    dk: Output
    dv: Output
    dscale: Output | None
    """Per head, `[T, H, 1]`, float64: it is a long sum of large terms; None if nobody asks for it."""


@dataclass(frozen=True)
class _Row:
    """What the strips of the same queries share: inputs, and sums that grow strip by strip."""

    q: Tensor
    """`[M, R, D]`."""
    q_by_alpha: Tensor
    dout: Tensor
    """Times the scale, unless the weights take it."""
    scale: Tensor | None
    """`[M, R, 1]`, for the weights."""
    dq: Tensor
    dscale: Tensor | None


class PartBackward:
    """Scores again, and from them the gradients of a part."""

    def __init__(self, problem: Problem, part: Part, dout: Tensor, grads: OutputGradients) -> None:
        self.problem, self.part, self.plan, self.grads = problem, part, part.plan, grads
        self.dtype, self.sum_dtype = part.matmul_dtype(problem.q), sum_dtype(problem.q)
        self.q_MLD, self.dout_MLD = part.rows_of(problem.q), part.rows_of(dout)
        self.k_MLD = scaled(part.rows_of(problem.k), problem.alpha, self.dtype)
        self.v_MLD = part.rows_of(problem.v).to(self.dtype).contiguous()
        self.scale_ML1 = part.plan.group.scale_rows(problem.scale.to(self.sum_dtype), part.matrices)
        self.dk_MDL, self.dv_MDL = (self._zero_columns(x) for x in (self.k_MLD, self.v_MLD))
        self.bias = tile_bias(problem)
        # A rounded product of dout and scale would be seen in the sums over many scores that dscale and dbias are.
        self.scales_weights = self.bias is not None or grads.dscale is not None

    def run(self) -> TileBias | None:
        """Write the gradients of q, k, v and scale; returns those of the bias."""
        group, matrices = self.plan.group, self.part.matrices
        dq_MLD = self.grads.dq.part_of(group, matrices)
        dscale_ML1 = None if self.grads.dscale is None else self.grads.dscale.part_of(group, matrices)
        for strips in self.plan.strips:
            rows = strips[0].rows
            row = self._row(rows)
            for strip in strips:
                self._add_strip(row, strip)
            dq_MLD[:, rows] = row.dq
            if dscale_ML1 is not None and row.dscale is not None:
                dscale_ML1[:, rows] = row.dscale
        for output, x_MDL in ((self.grads.dk, self.dk_MDL), (self.grads.dv, self.dv_MDL)):
            x_MLD = output.part_of(group, matrices)
            # In pieces that fit in the cache: all at once it took 10 ns per element of a long sequence.
            for to_MRD, from_MDR in zip(torch.split(x_MLD, PIECE, 1), torch.split(x_MDL, PIECE, 2), strict=True):
                to_MRD.copy_(from_MDR.mT)
        return self.bias

    def _row(self, rows: slice) -> _Row:
        q_MRD = self.q_MLD[:, rows].to(self.dtype).contiguous()
        scale_MR1 = self.scale_ML1[:, rows]
        return _Row(
            q=q_MRD,
            q_by_alpha=scaled(q_MRD, self.problem.alpha, self.dtype),
            dout=scaled(self.dout_MLD[:, rows], 1.0 if self.scales_weights else scale_MR1, self.dtype),
            scale=scale_MR1 if self.scales_weights else None,
            dq=torch.zeros_like(q_MRD, dtype=self.sum_dtype),
            dscale=None if self.grads.dscale is None else torch.zeros_like(scale_MR1, dtype=torch.float64),
        )

    def _add_strip(self, row: _Row, strip: Strip) -> None:
        buckets_GRC = self.plan.buckets(strip)
        bias_GRC = dbias_GRC = None
        if self.bias is not None:
            bias_GRC = self.bias.values(strip.rows, strip.keys, buckets_GRC)
            dbias_GRC = bias_GRC.new_zeros(len(self.plan.group.sequences), *bias_GRC.shape[1:])
        for batch in self.part.batches():
            scores_MRC = self.part.scores(strip, row.q[batch], self.k_MLD[batch, strip.keys], bias_GRC)
            if self.scales_weights:
                scores_MRC = scores_MRC.to(self.sum_dtype)
            weights_MRC, dscores_MRC = self._weights_and_gradient(row, batch, strip.keys, scores_MRC)
            add_product_(self.dv_MDL[batch, :, strip.keys], row.dout[batch].mT, weights_MRC.to(self.dtype))
            torch.ops.aten.silu_backward.grad_input(dscores_MRC, scores_MRC, grad_input=dscores_MRC)
            if dbias_GRC is not None:
                dbias_GRC += self.part.sum_of_heads(dscores_MRC)
            dscores_MRC = dscores_MRC.to(self.dtype)
            add_product_(row.dq[batch], dscores_MRC, self.k_MLD[batch, strip.keys])
            add_product_(self.dk_MDL[batch, :, strip.keys], row.q_by_alpha[batch].mT, dscores_MRC)
        if self.bias is not None and dbias_GRC is not None:
            self.bias.add_gradient(dbias_GRC, strip.rows, strip.keys, buckets_GRC)

    def _weights_and_gradient(self, row: _Row, batch: slice, keys: slice, scores_MRC: Tensor) -> tuple[Tensor, Tensor]:
        """Weights with the scale if they take it, and the gradient of those without; adds to that of the scale."""
        weights_MRC = F.silu(scores_MRC)
        dweights_MRC = product(row.dout[batch], self.v_MLD[batch, keys].mT).to(scores_MRC.dtype)
        if row.scale is not None:
            if row.dscale is not None:
                row.dscale[batch] += (weights_MRC * dweights_MRC).sum(2, keepdim=True, dtype=torch.float64)
            weights_MRC.mul_(row.scale[batch])
            dweights_MRC.mul_(row.scale[batch])
        return weights_MRC, dweights_MRC

    def _zero_columns(self, x_MLD: Tensor) -> Tensor:
        """`[M, D, L]` to sum into."""
        if self.plan.group.is_short:
            return torch.zeros_like(x_MLD, dtype=self.sum_dtype).mT
        # A product that sums over the queries of a strip is up to twice as fast if it gives columns. The gap after each
        # row keeps those of 2^n events apart in the caches.
        num_matrices, length, width = x_MLD.shape
        return x_MLD.new_zeros(num_matrices, width, length + 16, dtype=self.sum_dtype)[..., :length]
