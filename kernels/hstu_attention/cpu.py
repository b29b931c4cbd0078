"""The blocked implementation of HSTU attention in plain torch: forward and hand-written backward.

Scores exist one strip of tiles at a time; the backward computes them again. Products of bfloat16 are bfloat16 where the
processor multiplies it; sums over strips run in float32 (float64 for float64 inputs), always in the same order.
"""

# T = events of all sequences, H = heads, D = head width, L = length of the longest sequence of a group, M = matrices of
# a part, R = queries and C = keys of a strip

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_backward import OutputGradients, PartBackward
from .operator import Gradients, Problem, differentiable
from .part import Part, run_parts, scaled, sum_dtype, tile_bias
from .products import add_product_


def _forward(problem: Problem) -> Tensor:
    out_THD = torch.empty_like(problem.v, memory_format=torch.contiguous_format)
    run_parts(problem, partial(_attend, problem, out_THD))
    return out_THD


def _attend(problem: Problem, out_THD: Tensor, part: Part) -> None:
    """Write the output of a part."""
    group, dtype = part.plan.group, part.matmul_dtype(problem.q)
    q_MLD = part.rows_of(problem.q)
    k_MLD, v_MLD = (part.rows_of(x).to(dtype).contiguous() for x in (problem.k, problem.v))
    scale_ML1 = group.scale_rows(problem.scale.to(sum_dtype(q_MLD)), part.matrices)
    out_MLD = group.open(out_THD, part.matrices)
    bias = tile_bias(problem)
    for strips in part.plan.strips:
        rows = strips[0].rows
        q_MRD = scaled(q_MLD[:, rows], problem.alpha, dtype)
        out_MRD = scale_ML1.new_zeros(*q_MRD.shape[:2], v_MLD.shape[2])
        for strip in strips:
            bias_GRC = None if bias is None else bias.values(rows, strip.keys, part.plan.buckets(strip))
            for batch in part.batches():
                scores_MRC = part.scores(q_MRD[batch], k_MLD[batch, strip.keys], bias_GRC)
                weights_MRC = part.plan.hide_(strip, F.silu(scores_MRC, inplace=True))
                add_product_(out_MRD[batch], weights_MRC.to(dtype), v_MLD[batch, strip.keys])
        out_MLD[:, rows] = out_MRD.mul_(scale_ML1[:, rows])
    group.close_(out_THD, out_MLD)


def _backward(problem: Problem, dout: Tensor, needs_dscale: bool) -> Gradients:
    q, k, v, scale, position_weight, time_weight = problem[:6]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dscale_TH1 = v.new_empty(*v.shape[:2], 1, dtype=torch.float64) if needs_dscale else None
    grads = OutputGradients(dq, dk, dv, dscale_TH1)
    biases = run_parts(problem, lambda part: PartBackward(problem, part, dout, grads).run())
    dscale = scale.new_empty(0) if dscale_TH1 is None else dscale_TH1.sum((1, 2)).to(scale.dtype)
    dposition, dtime = q.new_empty(0), q.new_empty(0)
    if position_weight is not None:
        dposition = _sum([bias.position_grad for bias in biases if bias is not None], position_weight)
    if time_weight is not None:
        dtime = _sum([bias.time_grad for bias in biases if bias is not None], time_weight)
    return dq, dk, dv, dscale, dposition, dtime


def _sum(grads: list[Tensor], weight: Tensor) -> Tensor:
    return torch.stack(grads).sum(0).to(weight.dtype) if grads else torch.zeros_like(weight)


attention = differentiable("hstu_attention_cpu", _forward, _backward)
"""The attention that reference.attention defines, as one differentiable operator; see hstu_attention."""
