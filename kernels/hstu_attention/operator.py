"""One differentiable operator for each implementation of HSTU attention that writes its own backward."""

# T = events of all sequences, H = heads, D = head width

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import outside_autocast
from .bias import RelativeBias
from .mask import AttentionMask


class Problem(NamedTuple):
    """What an operator is called with, in the order of its schema; see hstu_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    position_weight: Tensor | None
    time_weight: Tensor | None
    timestamps: Tensor | None
    query_timestamps: Tensor | None
    offsets: Tensor
    num_targets: Tensor | None
    max_seq_len: int
    alpha: float
    rule: list[int]
    """The fields of the mask."""

    @property
    def mask(self) -> AttentionMask:
        """Which keys a query sees."""
        return AttentionMask(*self.rule)

    @property
    def bias(self) -> RelativeBias | None:
        """The relative bias, if any."""
        if self.position_weight is None and self.time_weight is None:
            return None
        return RelativeBias(self.position_weight, self.time_weight, self.timestamps, self.query_timestamps)


INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor scale, Tensor? position_weight, Tensor? time_weight, Tensor? timestamps, "
    "Tensor? query_timestamps, Tensor offsets, Tensor? num_targets, SymInt max_seq_len, float alpha, SymInt[] rule"
)
"""The fields of a Problem, in the schema of an operator."""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Those of q, k, v, scale, position_weight and time_weight; empty where there is none."""


def differentiable(
    name: str, forward: Callable[[Problem], Tensor], backward: Callable[[Problem, Tensor, bool], Gradients]
) -> Callable[..., Tensor]:
    """Register `ultrarec::name` and `ultrarec::name_backward`; returns the function that hstu_attention calls.

    The backward gets the gradient of the output, and whether that of the scale is wanted.
    """
    forward_op = torch.library.custom_op(
        f"ultrarec::{name}",
        lambda *inputs: forward(Problem(*inputs)),
        mutates_args=(),
        schema=f"({INPUTS}) -> Tensor",
    )
    backward_op = torch.library.custom_op(
        f"ultrarec::{name}_backward",
        lambda dout, needs_dscale, *inputs: backward(Problem(*inputs), dout, needs_dscale),
        mutates_args=(),
        schema=f"(Tensor dout, bool needs_dscale, {INPUTS}) -> ({', '.join(['Tensor'] * 6)})",
    )
    forward_op.register_fake(lambda q, k, v, *_: v.new_empty(v.shape))
    backward_op.register_fake(_gradient_shapes)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.max_seq_len, ctx.alpha, ctx.rule = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        # As the forward runs: autocast would round some of the factors to bfloat16, and only in the caller's thread.
        with outside_autocast(dout):
            grads = backward_op(dout, needs[3], *ctx.saved_tensors, ctx.max_seq_len, ctx.alpha, ctx.rule)
        wanted = [grad if needed else None for grad, needed in zip(grads, needs[:6], strict=True)]
        return (*wanted, None, None, None, None, None, None, None)

    forward_op.register_autograd(gradients, setup_context=save_inputs)

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
        weights: tuple[Tensor | None, ...] = (None, None, None, None)
        if bias is not None:
            weights = (bias.position_weight, bias.time_weight, bias.timestamps, bias.query_timestamps)
        rule = [mask.window, mask.full_tail, mask.prefix, mask.num_contextual]
        return forward_op(q, k, v, scale, *weights, offsets, num_targets, max_seq_len, alpha, rule)

    return attention


def _gradient_shapes(
    dout: Tensor,
    needs_dscale: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    *_: Any,
) -> Gradients:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dscale = scale.new_empty(scale.shape if needs_dscale else 0)
    dposition, dtime = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (position_weight, time_weight))
    return dq, dk, dv, dscale, dposition, dtime
