"""The backward of the blocked implementation, for one part of the work.

Factors are multiplied into what a product takes or into sums of products, not into what one product gives: bfloat16
results would be rounded twice.
"""

# T = events of all sequences, H = heads, D = head width, G = sequences of a group, L = length of its longest,
# R = queries and C = keys of a strip; see part.py for the batches that names of two dimensions stand for

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pages import in_huge_pages
from ..products import add_product, add_product_, product, transposed
from .band import differentiate
from .operator import Problem
from .packing import Output
from .part import Part, at, scaled, sum_dtype, tile_bias
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
class _Batch:
    """Inputs of one batch, all its events; where its gradients go, and sums of those of keys and values."""

    q_LD: Tensor
    k_LD: Tensor
    """Times alpha."""
    v_LD: Tensor
    dout_LD: Tensor
    scale_L1: Tensor
    dq_LD: Tensor
    dk_DL: Tensor
    """Without alpha."""
    dv_DL: Tensor


class _Row:
    """What the strips of the same queries of a batch share: inputs, and sums that grow strip by strip."""

    def __init__(self, batch: _Batch, rows: slice, dtype: torch.dtype, *, scales_weights: bool) -> None:
        scale_R1 = at(batch.scale_L1, rows)
        self.q_RD = at(batch.q_LD, rows).to(dtype).contiguous()
        self.dout_RD = scaled(at(batch.dout_LD, rows), 1.0 if scales_weights else scale_R1, dtype)
        self.q_DR, self.dout_DR = transposed(self.q_RD), transposed(self.dout_RD)
        self.scale_R1 = scale_R1 if scales_weights else None
        self.dq_RD: Tensor | None = None
        self.dscale_R1: Tensor | None = None


class PartBackward:
    """Scores again, and from them the gradients of a part."""

    def __init__(self, problem: Problem, part: Part, dout: Tensor, grads: OutputGradients) -> None:
        self.problem, self.part, self.plan, self.grads = problem, part, part.plan, grads
        self.dtype, self.sum_dtype = part.matmul_dtype(problem.q), sum_dtype(problem.q)
        self.bias = tile_bias(problem)
        # A rounded product of dout and scale would be seen in the sums over many scores that dscale and dbias are.
        self.scales_weights = self.bias is not None or grads.dscale is not None
        self.batches = [
            _Batch(
                q_LD=q_LD,
                k_LD=scaled(k_LD, problem.alpha, self.dtype),
                v_LD=scaled(v_LD, 1.0, self.dtype),
                dout_LD=dout_LD,
                scale_L1=scale_L1,
                dq_LD=dq_LD,
                dk_DL=self._zero_columns(k_LD),
                dv_DL=self._zero_columns(v_LD),
            )
            for q_LD, k_LD, v_LD, dout_LD, scale_L1, dq_LD in zip(
                part.rows_of(problem.q),
                part.rows_of(problem.k),
                part.rows_of(problem.v),
                part.rows_of(dout),
                part.scale_of(problem.scale.to(self.sum_dtype)),
                part.outputs_of(grads.dq),
                strict=True,
            )
        ]

    def run(self) -> TileBias | None:
        """Write the gradients of q, k, v and scale; returns those of the bias."""
        dscales = None if self.grads.dscale is None else self.part.outputs_of(self.grads.dscale)
        band = None if self.scales_weights else self.part.band_of(self.problem)
        if band is not None:
            for batch in self.batches:
                differentiate(band, **vars(batch))
        for strips in self.plan.strips(0 if band is None else band.num_queries):
            rows = strips[0].rows
            batch_rows = [_Row(batch, rows, self.dtype, scales_weights=self.scales_weights) for batch in self.batches]
            for strip in strips:
                self._add_strip(batch_rows, strip)
            for n, (batch, row) in enumerate(zip(self.batches, batch_rows, strict=True)):
                assert row.dq_RD is not None, "every query has a strip: it sees itself"
                at(batch.dq_LD, rows).copy_(row.dq_RD)
                if dscales is not None and row.dscale_R1 is not None:
                    at(dscales[n], rows).copy_(row.dscale_R1)
        for batch, dk_LD, dv_LD in zip(
            self.batches, self.part.outputs_of(self.grads.dk), self.part.outputs_of(self.grads.dv), strict=True
        ):
            _write_columns(batch.dk_DL, dk_LD, self.problem.alpha)
            _write_columns(batch.dv_DL, dv_LD, 1.0)
        return self.bias

    def _add_strip(self, rows: list[_Row], strip: Strip) -> None:
        buckets_GRC = self.plan.buckets(strip)
        bias_GRC = dbias_GRC = None
        if self.bias is not None:
            bias_GRC = self.bias.values(strip.rows, strip.keys, buckets_GRC)
            dbias_GRC = bias_GRC.new_zeros(len(self.plan.group.sequences), *bias_GRC.shape[1:])
        for batch, row in zip(self.batches, rows, strict=True):
            dscores_RC = self._add_batch(batch, row, strip, bias_GRC)
            if dbias_GRC is not None:
                dbias_GRC += self.part.sum_of_heads(dscores_RC)
        if self.bias is not None and dbias_GRC is not None:
            self.bias.add_gradient(dbias_GRC, strip.rows, strip.keys, buckets_GRC)

    def _add_batch(self, batch: _Batch, row: _Row, strip: Strip, bias_GRC: Tensor | None) -> Tensor:
        """Add to the gradients of a batch what a strip contributes; returns the gradient of its scores."""
        k_CD, v_CD = at(batch.k_LD, strip.keys), at(batch.v_LD, strip.keys)
        scores_RC = self.part.scores(strip, row.q_RD, k_CD, bias_GRC)
        if self.scales_weights:
            scores_RC = scores_RC.to(self.sum_dtype)
        weights_RC = F.silu(scores_RC)
        dweights_RC = product(row.dout_RD, v_CD.mT).to(scores_RC.dtype)
        self.plan.hide_(strip, dweights_RC)
        if row.scale_R1 is not None:
            self._add_dscale(row, weights_RC, dweights_RC)
            weights_RC.mul_(row.scale_R1)
            dweights_RC.mul_(row.scale_R1)
        add_product_(_columns(batch.dv_DL, strip), row.dout_DR, weights_RC.to(self.dtype))
        dscores_RC = torch.ops.aten.silu_backward.grad_input(dweights_RC, scores_RC, grad_input=dweights_RC)
        rounded_RC = dscores_RC.to(self.dtype)
        row.dq_RD = add_product(row.dq_RD, rounded_RC, k_CD, self.sum_dtype)
        add_product_(_columns(batch.dk_DL, strip), row.q_DR, rounded_RC)
        return dscores_RC

    def _add_dscale(self, row: _Row, weights_RC: Tensor, dweights_RC: Tensor) -> None:
        if self.grads.dscale is None:
            return
        dscale_R1 = (weights_RC * dweights_RC).sum(-1, keepdim=True, dtype=torch.float64)
        row.dscale_R1 = dscale_R1 if row.dscale_R1 is None else row.dscale_R1.add_(dscale_R1)

    def _zero_columns(self, x_LD: Tensor) -> Tensor:
        """`[D, L]` to sum into."""
        if self.plan.group.is_short:
            return torch.zeros_like(x_LD, dtype=self.sum_dtype).mT
        # A product that sums over the queries of a strip is up to twice as fast if it gives columns. The gap after each
        # row keeps those of 2^n events apart in the caches.
        length, width = x_LD.shape
        return in_huge_pages(x_LD.new_empty(width, length + 16, dtype=self.sum_dtype)).zero_()[:, :length]


def _columns(x_DL: Tensor, strip: Strip) -> Tensor:
    return x_DL.narrow(-1, strip.keys.start, strip.keys.stop - strip.keys.start)


def _write_columns(x_DL: Tensor, out_LD: Tensor, factor: float) -> None:
    # In pieces that fit in the cache: all at once took 10 ns per element of a long sequence.
    for to_RD, from_DR in zip(torch.split(out_LD, PIECE, -2), torch.split(x_DL, PIECE, -1), strict=True):
        torch.mul(from_DR.mT, factor, out=to_RD)
