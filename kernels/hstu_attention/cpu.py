"""The blocked implementation of HSTU attention in plain torch: forward, hand-written backward, and their registration.

Scores exist one tile at a time, for a group of sequences of nearly one length; the backward computes them again.
Sums run in float32 (float64 for float64 inputs), whatever the dtype of the inputs, and always in the same order.
"""

# T = events of all sequences, H = heads, D = head width, G = sequences of a group, L = length of its longest,
# M = G * H matrices of a group, P = packed rows of all groups, R = queries and C = keys of a tile

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import RelativeBias
from .mask import AttentionMask
from .packing import Group
from .scores import BlockedScores


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seq_len: int,
    alpha: float,
    scale: Tensor,
    num_targets: Tensor | None,
    mask: AttentionMask,
    bias: RelativeBias | None,
) -> Tensor:
    """The attention that reference.attention defines, as one differentiable operator; see hstu_attention."""
    weights: tuple[Tensor | None, ...] = (None, None, None, None)
    if bias is not None:
        weights = (bias.position_weight, bias.time_weight, bias.timestamps, bias.query_timestamps)
    rule = [mask.window, mask.full_tail, mask.prefix, mask.num_contextual]
    out: Tensor = _forward(q, k, v, scale, *weights, offsets, num_targets, max_seq_len, alpha, rule)
    return out


@torch.library.custom_op("ultrarec::hstu_attention_cpu", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seq_len: int,
    alpha: float,
    rule: list[int],
) -> Tensor:
    bias = _bias(position_weight, time_weight, timestamps, query_timestamps)
    scores = BlockedScores(
        q, k, offsets, num_targets, max_seq_len=max_seq_len, alpha=alpha, mask=AttentionMask(*rule), bias=bias
    )
    v = v.contiguous()
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


@torch.library.custom_op("ultrarec::hstu_attention_cpu_backward", mutates_args=())
def _backward(
    dout: Tensor,
    needs_dscale: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    offsets: Tensor,
    num_targets: Tensor | None,
    max_seq_len: int,
    alpha: float,
    rule: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, scale, position_weight and time_weight; empty where there is none."""
    bias = _bias(position_weight, time_weight, timestamps, query_timestamps)
    scores = BlockedScores(
        q, k, offsets, num_targets, max_seq_len=max_seq_len, alpha=alpha, mask=AttentionMask(*rule), bias=bias
    )
    v, dout = v.contiguous(), dout.contiguous()
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
    if scores.bias is not None and position_weight is not None:
        dposition = scores.bias.position_grad.to(position_weight.dtype)
    if scores.bias is not None and time_weight is not None:
        dtime = scores.bias.time_grad.to(time_weight.dtype)
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


def _bias(
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
) -> RelativeBias | None:
    if position_weight is None and time_weight is None:
        return None
    return RelativeBias(position_weight, time_weight, timestamps, query_timestamps)


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    needs_dscale: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dscale = scale.new_empty(scale.shape if needs_dscale else 0)
    dposition, dtime = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (position_weight, time_weight))
    return dq, dk, dv, dscale, dposition, dtime


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_seq_len, ctx.alpha, ctx.rule = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads = _backward(dout, needs[3], *ctx.saved_tensors, ctx.max_seq_len, ctx.alpha, ctx.rule)
    wanted = [grad if needed else None for grad, needed in zip(grads, needs[:6], strict=True)]
    return (*wanted, None, None, None, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_save_inputs)
