"""The Triton implementation of HSTU attention.

Scores exist a tile at a time, on chip; nothing but the inputs is kept for the backward, which computes them again.
Sums run in float32 and in a fixed order: repeated calls give the same bits.
"""

# T = events of all sequences, H = heads, D = head width

import torch
import triton
from torch import Tensor

from .inputs import assert_values, check_values
from .operator import Gradients, Problem, differentiable
from .triton_bias_launch import BiasPass
from .triton_blocks import target_of
from .triton_kernels.forward import forward_kernel
from .triton_launch import forward_launch, keys_launch, queries_launch
from .triton_padding import narrowed, padded, padded_problem


def _forward(problem: Problem) -> Tensor:
    _check(problem)
    width = problem.v.shape[2]
    problem = padded_problem(problem)
    out = problem.v.new_empty(problem.v.shape)
    forward_launch(problem, out, target_of(out.device)).start()
    return narrowed(out, width)


def _backward(problem: Problem, dout: Tensor, needs_dscale: bool) -> Gradients:
    dqk_width, dv_width = problem.q.shape[2], problem.v.shape[2]
    problem, dout = padded_problem(problem), padded(dout)
    q, k, v, scale, position_weight, time_weight = problem[:6]
    target = target_of(q.device)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    keys_launch(problem, dout, dk, dv, target).start()
    dscale_TH1 = torch.empty(*q.shape[:2], 1, dtype=torch.float32, device=q.device) if needs_dscale else None
    queries_launch(problem, dout, dq, dscale_TH1, target).start()
    dscale = scale.new_empty(0)
    if dscale_TH1 is not None:
        dscale = dscale_TH1.sum((1, 2), dtype=torch.float64).to(scale.dtype)
    dposition, dtime = (q.new_empty(0) if w is None else torch.zeros_like(w) for w in (position_weight, time_weight))
    if problem.bias is not None and q.shape[0]:
        bias_pass = BiasPass.of(problem, dout, target)
        bias_pass.launch.start()
        if position_weight is not None:
            dposition = bias_pass.position_gradient().to(position_weight.dtype)
        if time_weight is not None:
            dtime = bias_pass.time_gradient().to(time_weight.dtype)
    dq, dk, dv = narrowed(dq, dqk_width), narrowed(dk, dqk_width), narrowed(dv, dv_width)
    return dq, dk, dv, dscale, dposition, dtime


def _check(problem: Problem) -> None:
    """Raise ValueError for what only this implementation refuses; on a GPU it is the device that checks values."""
    q = problem.q
    if q.dtype == torch.float64:
        raise ValueError("backend='triton' takes no float64; choose backend='cpu', which runs on every device")
    widest = max(q.shape[2], problem.v.shape[2])
    if widest > 256:
        raise ValueError(f"backend='triton' takes heads up to 256 wide, not {widest}; choose backend='cpu'")
    if q.device.type == "cpu" and isinstance(forward_kernel, triton.runtime.JITFunction):
        raise ValueError(
            "backend='triton' got tensors on cpu; move them to a GPU, choose backend='cpu', or set "
            "TRITON_INTERPRET=1 before Python starts, which interprets the kernels, slowly"
        )
    check = check_values if q.device.type == "cpu" else assert_values
    check(problem.offsets, problem.num_targets, num_events=q.shape[0], max_seq_len=problem.max_seq_len)


attention = differentiable("hstu_attention_triton", _forward, _backward)
"""The attention that reference.attention defines, as one differentiable operator; see hstu_attention."""
