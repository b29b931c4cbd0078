"""The backward of the blocked implementation, for one part of the work.

Scores and weights stay without the scale: it multiplies rows of what they are multiplied with, or of the result.
"""

# T = events of all sequences, H = heads, D = head width, G = sequences of a group, L = length of its longest,
# M = matrices of a part or of a batch of it, R = queries and C = keys of a strip

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Problem
from .part import Part, scaled, sum_dtype, tile_bias
from .products import add_product_, product
from .tile_bias import TileBias
from .tiles import Strip


@dataclass(frozen=True)
class OutputGradients:
    """What the parts write to, `[T, H, D]`."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dscale: Tensor | None
    """`[T, H, 1]`, float64: it is a long sum of large terms; None if nobody asks for it."""


@dataclass(frozen=True)
class _Row:
    """What the strips of the same queries share: inputs, and sums that grow strip by strip."""

    q: Tensor
    """`[M, R, D]`, times alpha."""
    scaled_q: Tensor
    """That times the scale."""
    dout: Tensor
    scaled_dout: Tensor
    scale: Tensor
    """`[M, R, 1]`."""
    dq: Tensor
    dscale: Tensor | None


class PartBackward:
    """Scores again, and from them the gradients of a part."""

    def __init__(self, problem: Problem, part: Part, dout: Tensor, grads: OutputGradients) -> None:
        self.problem, self.part, self.plan, self.grads = problem, part, part.plan, grads
        self.dtype, self.sum_dtype = part.matmul_dtype(problem.q), sum_dtype(problem.q)
        self.q_MLD, self.dout_MLD = part.rows_of(problem.q), part.rows_of(dout)
        self.k_MLD, self.v_MLD = (part.rows_of(x).to(self.dtype).contiguous() for x in (problem.k, problem.v))
        self.scale_ML1 = part.plan.group.scale_rows(problem.scale.to(self.sum_dtype), part.matrices)
        # A product that sums over the queries of a strip is up to twice as fast if it gives columns.
        self.dk_MDL, self.dv_MDL = (self._zero_columns(x) for x in (self.k_MLD, self.v_MLD))
        self.bias = tile_bias(problem)

    def run(self) -> TileBias | None:
        """Write the gradients of q, k, v and scale; returns those of the bias."""
        group, matrices = self.plan.group, self.part.matrices
        dq_MLD = group.open(self.grads.dq, matrices)
        dscale_ML1 = None if self.grads.dscale is None else group.open(self.grads.dscale, matrices)
        for strips in self.plan.strips:
            rows = strips[0].rows
            row = self._row(rows)
            for strip in strips:
                self._add_strip(row, strip)
            dq_MLD[:, rows] = row.dq.mul_(row.scale * self.problem.alpha)
            if dscale_ML1 is not None and row.dscale is not None:
                dscale_ML1[:, rows] = row.dscale
        group.close_(self.grads.dq, dq_MLD)
        if self.grads.dscale is not None and dscale_ML1 is not None:
            group.close_(self.grads.dscale, dscale_ML1)
        for x_THD, x_MDL in ((self.grads.dk, self.dk_MDL), (self.grads.dv, self.dv_MDL)):
            x_MLD = group.open(x_THD, matrices)
            x_MLD.copy_(x_MDL.mT)
            group.close_(x_THD, x_MLD)
        return self.bias

    def _row(self, rows: slice) -> _Row:
        q_MRD = scaled(self.q_MLD[:, rows], self.problem.alpha, self.dtype)
        scale_MR1 = self.scale_ML1[:, rows]
        return _Row(
            q=q_MRD,
            scaled_q=scaled(self.q_MLD[:, rows], scale_MR1 * self.problem.alpha, self.dtype),
            dout=scaled(self.dout_MLD[:, rows], 1.0, self.dtype),
            scaled_dout=scaled(self.dout_MLD[:, rows], scale_MR1, self.dtype),
            scale=scale_MR1,
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
            scores_MRC = self.part.scores(row.q[batch], self.k_MLD[batch, strip.keys], bias_GRC)
            weights_MRC = self.plan.hide_(strip, F.silu(scores_MRC)).to(self.dtype)
            add_product_(self.dv_MDL[batch, :, strip.keys], row.scaled_dout[batch].mT, weights_MRC)
            dscores_MRC = product(row.dout[batch], self.v_MLD[batch, strip.keys].mT).to(scores_MRC.dtype)
            if row.dscale is not None:
                row.dscale[batch] += (weights_MRC * dscores_MRC).sum(2, keepdim=True, dtype=torch.float64)
            torch.ops.aten.silu_backward.grad_input(dscores_MRC, scores_MRC, grad_input=dscores_MRC)
            self.plan.hide_(strip, dscores_MRC)
            if dbias_GRC is not None:
                dbias_GRC += self.part.sum_of_heads(dscores_MRC)
            dscores_MRC = dscores_MRC.to(self.dtype)
            add_product_(row.dq[batch], dscores_MRC, self.k_MLD[batch, strip.keys])
            add_product_(self.dk_MDL[batch, :, strip.keys], row.scaled_q[batch].mT, dscores_MRC)
        if self.bias is not None and dbias_GRC is not None:
            num_sequences = len(self.plan.group.sequences)
            dbias_GRC *= row.scale[:: len(row.scale) // num_sequences]
            self.bias.add_gradient(dbias_GRC, strip.rows, strip.keys, buckets_GRC)

    def _zero_columns(self, x_MLD: Tensor) -> Tensor:
        """`[M, D, L]` to sum into; the gap after each row keeps those of 2^n events apart in the caches."""
        num_matrices, length, width = x_MLD.shape
        return x_MLD.new_zeros(num_matrices, width, length + 16, dtype=self.sum_dtype)[..., :length]
