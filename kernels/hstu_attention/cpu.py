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
from .packing import Output
from .part import Part, plan_for, run_parts, scaled, sum_dtype, tile_bias
from .products import add_product_


def _forward(problem: Problem) -> Tensor:
    plan = plan_for(problem)
    out = Output(plan.packing, problem.v, problem.v.dtype)
    run_parts(problem, plan, partial(_attend, problem, out))
    return out.finish()


def _attend(problem: Problem, out: Output, part: Part) -> None:
    """Write the output of a part."""
    group, dtype = part.plan.group, part.matmul_dtype(problem.q)
    q_MLD = part.rows_of(problem.q)
    k_MLD = scaled(part.rows_of(problem.k), problem.alpha, dtype)
    v_MLD = part.rows_of(problem.v).to(dtype).contiguous()
    scale_ML1 = group.scale_rows(problem.scale.to(sum_dtype(q_MLD)), part.matrices)
    out_MLD = out.part_of(group, part.matrices)
    bias = tile_bias(problem)
    for strips in part.plan.strips:
        rows = strips[0].rows
        q_MRD = q_MLD[:, rows].to(dtype).contiguous()
        out_MRD = scale_ML1.new_zeros(*q_MRD.shape[:2], v_MLD.shape[2])
        for strip in strips:
            bias_GRC = None if bias is None else bias.values(rows, strip.keys, part.plan.buckets(strip))
            for batch in part.batches():
                scores_MRC = part.scores(strip, q_MRD[batch], k_MLD[batch, strip.keys], bias_GRC)
                weights_MRC = F.silu(scores_MRC.to(scale_ML1.dtype), inplace=True)
                add_product_(out_MRD[batch], weights_MRC.to(dtype), v_MLD[batch, strip.keys])
        torch.mul(out_MRD, scale_ML1[:, rows], out=out_MLD[:, rows])


def _backward(problem: Problem, dout: Tensor, needs_dscale: bool) -> Gradients:
    q, k, v, scale, position_weight, time_weight = problem[:6]
    plan = plan_for(problem)
    dscale = Output(plan.packing, v[:, :, :1], torch.float64) if needs_dscale else None
    dq, dk, dv = (Output(plan.packing, x, x.dtype) for x in (q, k, v))
    grads = OutputGradients(dq, dk, dv, dscale)
    biases = run_parts(problem, plan, lambda part: PartBackward(problem, part, dout, grads).run())
    dposition, dtime = q.new_empty(0), q.new_empty(0)
    if position_weight is not None:
        dposition = _sum([bias.position_grad for bias in biases if bias is not None], position_weight)
    if time_weight is not None:
        dtime = _sum([bias.time_grad for bias in biases if bias is not None], time_weight)
    dscale_T = scale.new_empty(0) if dscale is None else dscale.finish().sum((1, 2)).to(scale.dtype)
    return dq.finish(), dk.finish(), dv.finish(), dscale_T, dposition, dtime


def _sum(grads: list[Tensor], weight: Tensor) -> Tensor:
    return torch.stack(grads).sum(0).to(weight.dtype) if grads else torch.zeros_like(weight)


attention = differentiable("hstu_attention_cpu", _forward, _backward)
"""The attention that reference.attention defines, as one differentiable operator; see hstu_attention."""
