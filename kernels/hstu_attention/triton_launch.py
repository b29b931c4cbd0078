"""What the Triton kernels of HSTU attention are launched with."""

# T = events of all sequences, B = sequences, H = heads, D = head width

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launching import Launch, contiguous
from .bias import bucket_thresholds
from .operator import Problem
from .triton_blocks import DESCRIPTOR_TARGETS, INTERPRETER, Blocks, blocks_of
from .triton_kernels.backward import keys_kernel, queries_kernel
from .triton_kernels.forward import forward_kernel
from .triton_kernels.scores import Bias, Events, Scale, Sequences, Variant
from .triton_tuned import Shape, choices_for, device_name_of

MAX_REGISTERS = 255
"""As many as a thread can have."""


def forward_launch(problem: Problem, out: Tensor, target: str, blocks: Blocks | None = None) -> Launch:
    """Write the attention to out `[T, H, Dv]`."""
    blocks = blocks or blocks_for("forward", problem, target)
    sequences = sequences_of(problem, blocks.rows)
    events = [events_of(x) for x in (problem.q, problem.k, problem.v, out)]
    tiles = [_tiles(x, blocks.keys, target) for x in (problem.k, problem.v)]
    return _launch(forward_kernel, problem, blocks, target, sequences, *events, *tiles)


def keys_launch(
    problem: Problem, dout: Tensor, dk: Tensor, dv: Tensor, target: str, blocks: Blocks | None = None
) -> Launch:
    """Write the gradients of k and v to dk and dv."""
    blocks = blocks or blocks_for("keys", problem, target)
    sequences = sequences_of(problem, blocks.keys)
    events = [events_of(x) for x in (problem.q, problem.k, problem.v, dout, dk, dv)]
    tiles = [_tiles(x, blocks.rows, target) for x in (problem.q, dout)]
    return _launch(keys_kernel, problem, blocks, target, sequences, *events, *tiles)


def queries_launch(
    problem: Problem, dout: Tensor, dq: Tensor, dscale: Tensor | None, target: str, blocks: Blocks | None = None
) -> Launch:
    """Write the gradient of q to dq, and that of the scale by head to dscale `[T, H, 1]`, if it is there."""
    blocks = blocks or blocks_for("queries", problem, target)
    sequences = sequences_of(problem, blocks.rows)
    events = [events_of(x) for x in (problem.q, problem.k, problem.v, dout, dq)]
    dscale_events = None if dscale is None else events_of(dscale)
    tiles = [_tiles(x, blocks.keys, target) for x in (problem.k, problem.v)]
    return _launch(queries_kernel, problem, blocks, target, sequences, *events, dscale_events, *tiles)


def blocks_for(kernel: str, problem: Problem, target: str) -> Blocks:
    """The tiles of a kernel for the dtype and head widths of a problem: those measured on its device, if any."""
    width, dtype, biased = max(problem.q.shape[2], problem.v.shape[2]), problem.q.dtype, problem.bias is not None
    device_name = device_name_of(problem.q.device, target)
    if device_name is not None:
        shape = Shape(kernel, str(dtype).removeprefix("torch."), _padded(width), biased)
        if shape in (tuned := choices_for(device_name)):
            return tuned[shape]
    return blocks_of(kernel, target, width, dtype, biased=biased)


def options_of(blocks: Blocks, target: str) -> dict[str, int]:
    """The launch options of a kernel."""
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    # Left to itself, ptxas settles for fewer registers in some kernels and spills: on sm_80 for 32, and kilobytes.
    return {**options, "maxnreg": MAX_REGISTERS} if target.startswith("sm_") else options


def variant_of(problem: Problem, blocks: Blocks, target: str) -> Variant:
    """What a kernel is compiled for."""
    dqk, dv = problem.q.shape[2], problem.v.shape[2]
    uniform_scale = problem.scale.stride(0) == 0
    return Variant(
        mask=problem.mask,
        has_targets=problem.num_targets is not None,
        uniform_scale=uniform_scale,
        tanh=_tanh_for(problem.q.dtype, target),
        interpreted=target == INTERPRETER,
        dqk=dqk,
        dv=dv,
        block_dqk=_padded(dqk),
        block_dv=_padded(dv),
        rows=blocks.rows,
        keys=blocks.keys,
        edge_rows=max(16, blocks.rows // (2 if uniform_scale else 4)),
        edge_keys=max(16, blocks.keys // 2),
    )


def _tanh_for(dtype: torch.dtype, target: str) -> str:
    if target.startswith("gfx"):
        return "fast division"
    return "hardware" if target.startswith("sm_") and dtype != torch.float32 else "portable"


def sequences_of(problem: Problem, tile: int) -> Sequences:
    """Where the sequences are, for kernels with a program per `tile` events of each."""
    order = torch.argsort(problem.offsets.diff(), descending=True, stable=True)
    num_tiles = triton.cdiv(problem.max_seq_len, tile)
    offsets, num_targets = problem.offsets.contiguous(), contiguous(problem.num_targets)
    return Sequences(offsets, num_targets, order, problem.q.shape[1], num_tiles)


def events_of(x_THD: Tensor) -> Events:
    """A tensor as the kernels take it; see triton_padding."""
    return Events(x_THD, x_THD.stride(0), x_THD.stride(1))


def scale_of(problem: Problem) -> Scale:
    """The scale as the kernels take it."""
    return Scale(problem.scale, problem.scale.stride(0))


def bias_of(problem: Problem) -> Bias | None:
    """The relative bias as the kernels take it."""
    bias = problem.bias
    if bias is None:
        return None
    position_weight, time_weight = contiguous(bias.position_weight), contiguous(bias.time_weight)
    if time_weight is None:
        return Bias(position_weight, None, None, None, None, 0, problem.max_seq_len)
    thresholds = bucket_thresholds(len(time_weight) - 1, problem.q.device)
    last = len(thresholds) - 1
    key_times = contiguous(bias.timestamps)
    query_times = key_times if bias.query_timestamps is None else bias.query_timestamps.contiguous()
    times = (key_times, query_times)
    return Bias(position_weight, time_weight, *times, thresholds, last, problem.max_seq_len)


def _tiles(x_THD: Tensor, rows: int, target: str) -> TensorDescriptor | None:
    """Tiles of `rows` events for the tensor memory accelerator, if the device has one."""
    # Without tensor cores products take operands from registers: with descriptors those of heads of 256 were spilled.
    is_suited = target == INTERPRETER or x_THD.dtype != torch.float32
    if target not in DESCRIPTOR_TARGETS or not is_suited or x_THD.shape[0] == 0:
        return None
    return TensorDescriptor(x_THD, list(x_THD.shape), list(x_THD.stride()), [rows, 1, _padded(x_THD.shape[2])])


def _padded(width: int) -> int:
    """How many columns a tile has for heads of this width."""
    return max(16, triton.next_power_of_2(width))


def _launch(kernel: Any, problem: Problem, blocks: Blocks, target: str, sequences: Sequences, *events: Any) -> Launch:
    num_programs = (len(problem.offsets) - 1) * sequences.num_heads * sequences.num_tiles
    inputs = (*events, scale_of(problem), sequences, bias_of(problem), problem.alpha / 2)
    arguments = dict(zip(kernel.arg_names, (*inputs, variant_of(problem, blocks, target)), strict=True))
    return Launch(kernel, (num_programs,), arguments, options_of(blocks, target))
