"""The blocked implementation of HSTU attention in plain torch: forward and hand-written backward.

Scores exist one tile at a time, for a group of sequences of nearly one length; the backward computes them again.
Sums run in float32 (float64 for float64 inputs), whatever the dtype of the inputs, and always in the same order.
"""

# T = events of all sequences, H = heads, D = head width, G = sequences of a group, L = length of its longest,
# M = G * H matrices of a group, P = packed rows of all groups, R = queries and C = keys of a tile

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Gradients, Problem, differentiable
from .packing import Group
from .scores import BlockedScores


def _forward(problem: Problem) -> Tensor:
    scores = BlockedScores.of(problem)
    v, scale = problem.v.contiguous(), problem.scale
    out_PD = scores.zeros_like(v)
    for group in scores.packing.groups:
        q_MLD, k_MLD = scores.queries_and_keys(group)
        v_MLD, out_MLD = group.pack(v).to(scores.dtype), group.part_of(out_PD)
        for tile in scores.tiles(group):
            weights_MRC = tile.hide_(F.silu(scores.of_tile(tile, q_MLD, k_MLD), inplace=True))
            out_MLD[:, tile.rows].baddbmm_(weights_MRC, v_MLD[:, tile.keys])
        out_MLD.mul_(group.pack_scale(scale).to(scores.dtype))
    return scores.packing.unpack(out_PD).to(v.dtype)


@dataclass(frozen=True)
class _PackedSums:
    """What the backward sums up tile by tile, in packed rows `[P, D]`."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dscale: Tensor | None
    """`[P, 1]`, per head, float64: it is a long sum of large terms; None if nobody asks for it."""


def _backward(problem: Problem, dout: Tensor, needs_dscale: bool) -> Gradients:
    scores = BlockedScores.of(problem)
    q, k, scale = problem.q, problem.k, problem.scale
    v, dout = problem.v.contiguous(), dout.contiguous()
    sums = _PackedSums(
        dq=scores.zeros_like(q),
        dk=scores.zeros_like(k),
        dv=scores.zeros_like(v),
        dscale=scores.zeros_like(v[:, :, :1]).double() if needs_dscale else None,
    )
    for group in scores.packing.groups:
        _add_group_gradients(scores, group, v, dout, scale, sums)
    dq, dk, dv = (scores.packing.unpack(x).to(q.dtype) for x in (sums.dq, sums.dk, sums.dv))
    dscale = scale.new_empty(0)
    if sums.dscale is not None:
        dscale = scores.packing.unpack(sums.dscale).sum((1, 2)).to(scale.dtype)
    dposition, dtime = q.new_empty(0), q.new_empty(0)
    if scores.bias is not None and problem.position_weight is not None:
        dposition = scores.bias.position_grad.to(problem.position_weight.dtype)
    if scores.bias is not None and problem.time_weight is not None:
        dtime = scores.bias.time_grad.to(problem.time_weight.dtype)
    return dq, dk, dv, dscale, dposition, dtime


def _add_group_gradients(
    scores: BlockedScores,
    group: Group,
    v: Tensor,
    dout: Tensor,
    scale: Tensor,
    sums: _PackedSums,
) -> None:
    """Add the gradients of a group to its part of the sums, and those of the bias to scores.bias."""
    dq_MLD, dk_MLD, dv_MLD = (group.part_of(x) for x in (sums.dq, sums.dk, sums.dv))
    q_MLD, k_MLD = scores.queries_and_keys(group)
    v_MLD = group.pack(v).to(scores.dtype)
    dout_MLD, scale_ML1 = group.pack(dout).to(scores.dtype), group.pack_scale(scale).to(scores.dtype)
    scaled_dout_MLD = dout_MLD * scale_ML1
    for tile in scores.tiles(group):
        rows, keys = tile.rows, tile.keys
        scores_MRC = scores.of_tile(tile, q_MLD, k_MLD)
        weights_MRC = tile.hide_(F.silu(scores_MRC))
        dv_MLD[:, keys].baddbmm_(weights_MRC.mT, scaled_dout_MLD[:, rows])
        products_MRC = torch.bmm(dout_MLD[:, rows], v_MLD[:, keys].mT)
        if sums.dscale is not None:
            group.part_of(sums.dscale)[:, rows] += (weights_MRC * products_MRC).sum(
                2, keepdim=True, dtype=torch.float64
            )
        dweights_MRC = products_MRC.mul_(scale_ML1[:, rows])
        dscores_MRC = tile.hide_(torch.ops.aten.silu_backward(dweights_MRC, scores_MRC))
        if scores.bias is not None:
            scores.bias.add_gradient(tile.of_heads(dscores_MRC), rows, keys, tile.buckets)
        dq_MLD[:, rows].baddbmm_(dscores_MRC, k_MLD[:, keys], alpha=scores.alpha)
        dk_MLD[:, keys].baddbmm_(dscores_MRC.mT, q_MLD[:, rows])


attention = differentiable("hstu_attention_cpu", _forward, _backward)
"""The attention that reference.attention defines, as one differentiable operator; see hstu_attention."""
