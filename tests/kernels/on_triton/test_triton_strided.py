"""Vectors and tables whose elements are not next to each other give what their copies give, on every backend."""

# T = events of all sequences, H = heads, D = head width, E = model width

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, needs_triton

from ultrarec.kernels import (
    AttentionMask,
    RelativeBias,
    gated_output,
    hstu_attention,
    jagged_concat,
    norm_uvqk,
    position_time_encoding,
)

pytestmark = needs_triton

LENGTHS, H, D, E = (13, 0, 20), 1, 16, 16
T, N = sum(LENGTHS), 25

Inputs = dict[str, Tensor]


def strided(x: Tensor) -> Tensor:
    """The same numbers, each followed by another one in memory: read as if contiguous, half of them are wrong."""
    wrong = x.flip(0) + 1
    return torch.stack([x, wrong], -1)[..., 0]


def attend(x: Inputs, backend: str) -> Tensor:
    bias = RelativeBias(x["position_weight"], x["time_weight"], x["timestamps"], x["query_timestamps"])
    return hstu_attention(
        x["q"],
        x["k"],
        x["v"],
        x["offsets"],
        max_seq_len=N,
        scale=x["scale"],
        num_targets=x["num_targets"],
        mask=AttentionMask(window=9, full_tail=4),
        bias=bias,
        backend=backend,
    )


def project(x: Inputs, backend: str) -> Tensor:
    weights = {"bias_N": x["bias"], "norm_weight_E": x["norm_weight"], "norm_bias_E": x["norm_bias"]}
    return norm_uvqk(x["x"], x["weight"], **weights, num_activated=2 * D, backend=backend)


def gate(x: Inputs, backend: str) -> Tensor:
    weights = {"bias_E": x["bias"], "norm_weight_V": x["norm_weight"], "norm_bias_V": x["norm_bias"]}
    return gated_output(
        x["u"], x["a"], x["x"], x["weight"], **weights, dropout=0.3, seed=torch.tensor([5], device=DEVICE),
        backend=backend,
    )  # fmt: skip


def encode(x: Inputs, backend: str) -> Tensor:
    return position_time_encoding(
        x["x"],
        position_weight_PE=x["position_weight"],
        positions_T=x["positions"],
        time_weight_KE=x["time_weight"],
        buckets_T=x["buckets"],
        backend=backend,
    )


def join(x: Inputs, backend: str) -> Tensor:
    return jagged_concat(x["left"], x["right"], x["left_offsets"], x["right_offsets"], backend=backend)


def inputs_of(op: Callable[[Inputs, str], Tensor]) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(high: int, num: int) -> Tensor:
        return torch.randint(0, high, (num,), generator=generator)

    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    norms = {"bias": randn(4 * D), "norm_weight": randn(E), "norm_bias": randn(E)}
    inputs: dict[Callable[[Inputs, str], Tensor], Inputs] = {
        attend: {
            **{name: randn(T, H, D) for name in "qkv"},
            "position_weight": randn(2 * N - 1),
            "time_weight": randn(41),
            "scale": randn(T),
            "timestamps": integers(10**6, T),
            "query_timestamps": integers(10**6, T),
            "offsets": offsets,
            "num_targets": torch.tensor([3, 0, 5]),
        },
        project: {"x": randn(T, E), "weight": randn(4 * D, E), **norms},
        gate: {
            "u": randn(T, D),
            "a": randn(T, H, D),
            "x": randn(T, E),
            "weight": randn(E, D),
            "bias": randn(E),
            "norm_weight": randn(D),
            "norm_bias": randn(D),
        },
        encode: {
            "x": randn(T, E),
            "position_weight": randn(N, E),
            "time_weight": randn(7, E),
            "positions": integers(N, T),
            "buckets": integers(7, T),
        },
        join: {"left": randn(T, E), "right": randn(T, E), "left_offsets": offsets, "right_offsets": offsets},
    }
    return {name: x.to(DEVICE) for name, x in inputs[op].items()}


def outputs_and_gradients(op: Callable[[Inputs, str], Tensor], inputs: Inputs, backend: str) -> Inputs:
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    out = op(leaves, backend)
    names = [name for name, x in leaves.items() if x.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), [leaves[name] for name in names])
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("op", [attend, project, gate, encode, join])
def test_strided_inputs_give_what_their_copies_give(op: Callable[[Inputs, str], Tensor], backend: str) -> None:
    inputs = inputs_of(op)
    wanted = outputs_and_gradients(op, inputs, backend)
    for name, x in inputs.items():
        assert not strided(x).is_contiguous()
        got = outputs_and_gradients(op, inputs | {name: strided(x)}, backend)
        for result, value in got.items():
            torch.testing.assert_close(value, wanted[result], rtol=1e-4, atol=1e-4, msg=f"{result} with strided {name}")
