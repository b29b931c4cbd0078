"""The blocked implementation of HSTU attention in plain torch: forward and hand-written backward.

Scores exist one strip of tiles at a time; the backward computes them again. Products of bfloat16 are bfloat16 where the
processor multiplies it; sums over strips run in float32 (float64 for float64 inputs), always in the same order.
"""

# T = events of all sequences, H = heads, D = head width, L = length of the longest sequence of a group, R = queries and
# C = keys of a strip; see part.py for the batches that names of two dimensions stand for

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import add_product
from .band import attend
from .containment import contained_gradients, contained_output, is_finite
from .cpu_backward import OutputGradients, PartBackward
from .operator import Gradients, Problem, differentiable
from .packing import Output
from .part import Part, at, plan_for, run_parts, scaled, sum_dtype, tile_bias


def _forward(problem: Problem) -> Tensor:
    out = _output(problem)
    return out if is_finite(out) else contained_output(problem, out, _output)


def _output(problem: Problem) -> Tensor:
    plan = plan_for(problem)
    out = Output(plan.packing, problem.v, problem.v.dtype)
    run_parts(problem, plan, partial(_attend, problem, out))
    return out.finish()


def _attend(problem: Problem, out: Output, part: Part) -> None:
    """Write the output of a part."""
    dtype, total_dtype, bias = part.matmul_dtype(problem.q), sum_dtype(problem.q), tile_bias(problem)
    queries, outputs = part.rows_of(problem.q), part.outputs_of(out)
    keys = [scaled(k_LD, problem.alpha, dtype) for k_LD in part.rows_of(problem.k)]
    values = [scaled(v_LD, 1.0, dtype) for v_LD in part.rows_of(problem.v)]
    scales = part.scale_of(problem.scale.to(total_dtype))
    band = part.band_of(problem)
    if band is not None:
        for batch in zip(queries, keys, values, scales, outputs, strict=True):
            attend(band, *batch)
    for strips in part.plan.strips(0 if band is None else band.num_queries):
        rows = strips[0].rows
        totals: list[Tensor | None] = [None] * len(queries)
        row_queries = [at(q_LD, rows).to(dtype).contiguous() for q_LD in queries]
        for strip in strips:
            bias_GRC = None if bias is None else bias.values(rows, strip.keys, part.plan.buckets(strip))
            for n, (q_RD, k_LD, v_LD) in enumerate(zip(row_queries, keys, values, strict=True)):
                weights_RC = F.silu(
                    part.scores(strip, q_RD, at(k_LD, strip.keys), bias_GRC).to(total_dtype), inplace=True
                )
                totals[n] = add_product(totals[n], weights_RC.to(dtype), at(v_LD, strip.keys), total_dtype)
        for total_RD, scale_L1, out_LD in zip(totals, scales, outputs, strict=True):
            assert total_RD is not None, "every query has a strip: it sees itself"
            torch.mul(total_RD, at(scale_L1, rows), out=at(out_LD, rows))


def _backward(problem: Problem, dout: Tensor, needs_dscale: bool) -> Gradients:
    grads = _gradients(problem, dout, needs_dscale)
    # Every query sees itself: whatever is broken, its gradient shows it.
    return grads if is_finite(grads[0]) else contained_gradients(problem, dout, grads, _output, _gradients)


def _gradients(problem: Problem, dout: Tensor, needs_dscale: bool) -> Gradients:
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
