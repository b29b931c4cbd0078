"""Triton without a GPU: its tests in the interpreter, which a process must choose before it imports Triton."""

import os
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_device import assert_passes_in_the_interpreter

from ultrarec.kernels import RelativeBias, hstu_attention

TESTS = Path(__file__).parent / "on_triton"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_promises_of_the_triton_backend_hold_in_the_interpreter() -> None:
    # Random problems have a test file of their own, which another worker can run meanwhile.
    assert_passes_in_the_interpreter(TESTS, f"--ignore={TESTS / 'test_triton_attention_random.py'}")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_tensors_on_the_cpu_are_refused_outside_the_interpreter() -> None:
    x = torch.ones(2, 1, 4)
    with pytest.raises(
        ValueError, match=r"backend='triton' got tensors on cpu; move them to a GPU, .* TRITON_INTERPRET=1"
    ):
        hstu_attention(x, x, x, torch.tensor([0, 2]), max_seq_len=2, backend="triton")


def test_on_a_gpu_the_operator_is_traced_without_one() -> None:
    """What torch.compile and torch.export see of a call on cuda: shapes and dtypes of the output and all gradients."""
    with FakeTensorMode():
        q, k = (torch.empty(9, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        v = torch.empty(9, 2, 32, device="cuda", dtype=torch.bfloat16)
        scale, weight = torch.empty(9, device="cuda"), torch.empty(13, device="cuda")
        offsets = torch.empty(3, device="cuda", dtype=torch.int64)
        out = hstu_attention(q, k, v, offsets, max_seq_len=7, scale=scale, bias=RelativeBias(weight))
        inputs = (q, k, v, scale, weight)
        rest = (None, None, None, offsets, None, 7, 0.25, [0, 0, 0, 0])
        grads = torch.ops.ultrarec.hstu_attention_triton_backward(out, True, *inputs, *rest)
    assert (out.shape, out.dtype, out.device.type) == (v.shape, v.dtype, "cuda")
    for x, grad in zip(inputs, grads, strict=False):
        assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)
