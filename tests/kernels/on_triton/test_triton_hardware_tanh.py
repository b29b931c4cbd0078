"""Errors stay in their bounds though the hardware errs by all that is documented, in one direction.

On NVIDIA devices in the hyperbolic tangent, on AMD devices in the reciprocal (one unit in the last place).
"""

import hardware_tanh
import pytest
import torch
import triton
import triton.language as tl
from attention_cases import MASKS, Case, assert_as_exact_as_plain_torch
from triton_device import INTERPRETED, needs_triton

from ultrarec.kernels.hstu_attention.triton_kernels import backward, bias_gradient, forward, scores

pytestmark = [needs_triton, pytest.mark.skipif(not INTERPRETED, reason="a GPU has a tanh of its own")]


@triton.jit
def too_large(x, METHOD: tl.constexpr):
    return (1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))) * (1.0 + 0.00048828125)


@triton.jit
def too_small(x, METHOD: tl.constexpr):
    return (1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))) * (1.0 - 0.00048828125)


@triton.jit
def by_too_large_a_reciprocal(x, METHOD: tl.constexpr):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268)) * (1.0 + 0.00000011920929)


@triton.jit
def by_too_small_a_reciprocal(x, METHOD: tl.constexpr):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268)) * (1.0 - 0.00000011920929)


@pytest.mark.parametrize("tanh", [too_large, too_small], ids=["too large", "too small"])
@pytest.mark.parametrize("width", [64, 128])
def test_half_precision_with_the_worst_documented_tanh(tanh, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tanh, monkeypatch)
    monkeypatch.setattr(hardware_tanh, "is_used", lambda case, backend: backend == "triton")
    for mask, targets, bias in ((MASKS["causal"], False, ""), (MASKS["all"], True, "position time query")):
        rest = {"mask": mask, "targets": targets, "bias": bias, "scale": "tensor", "dtype": torch.float16}
        assert_as_exact_as_plain_torch(Case((70,), 1, width, width, **rest), "triton")


@pytest.mark.parametrize("tanh", [by_too_large_a_reciprocal, by_too_small_a_reciprocal], ids=["too large", "too small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_dtype_with_the_worst_documented_reciprocal(
    tanh, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tanh, monkeypatch)
    for mask, targets, bias in ((MASKS["causal"], False, ""), (MASKS["all"], True, "position time query")):
        rest = {"mask": mask, "targets": targets, "bias": bias, "scale": "tensor", "dtype": dtype}
        assert_as_exact_as_plain_torch(Case((70,), 1, 64, 64, **rest), "triton")


def use(tanh, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backward, bias_gradient, forward, scores):
        monkeypatch.setattr(module, "tanh", tanh, raising=False)
