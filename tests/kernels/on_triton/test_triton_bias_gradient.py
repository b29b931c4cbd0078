"""The gradients of the bias weights in Triton, where integers sum them up; see test_triton_attention.py."""

import pytest
import torch
from attention_cases import Case, attend, inputs_of
from triton_device import DEVICE, needs_triton

from ultrarec.kernels import RelativeBias, hstu_attention

pytestmark = needs_triton


@pytest.mark.parametrize(
    ("poisoned", "value"),
    [("q", torch.nan), ("k", torch.nan), ("v", torch.inf), ("scale", torch.nan)],
)
def test_what_is_not_finite_reaches_the_gradients_of_its_pairs_only(poisoned: str, value: float) -> None:
    case = Case(lengths=(40, 20), num_heads=1, dqk=8, dv=8, bias="position time", scale="tensor", device=DEVICE)
    grads = {}
    for backend in ("reference", "triton"):
        inputs = inputs_of(case)
        inputs[poisoned][5] = value
        weights = [inputs[name].requires_grad_() for name in ("position_weight", "time_weight")]
        grads[backend] = torch.autograd.grad(attend(case, inputs, backend).sum(), weights)
    for wanted, got in zip(grads["reference"], grads["triton"], strict=True):
        wanted = torch.where(wanted.isfinite(), wanted, torch.nan)
        assert wanted.isnan().any()
        assert wanted.isfinite().any()
        torch.testing.assert_close(torch.where(got.isfinite(), got, torch.nan), wanted, equal_nan=True)


def time_gradient(backend: str, dtype: torch.dtype, outlier: float) -> torch.Tensor:
    """Of the buckets that no pair with the last event of the first sequence is in."""
    generator, num_events = torch.Generator().manual_seed(0), 200
    q, k, v, dout = (torch.randn(num_events, 1, 8, generator=generator).to(DEVICE, dtype) for _ in range(4))
    # Gradients of one sign: what rounding takes from each adds up.
    v, dout = v.abs(), dout.abs()
    dout[99] *= outlier
    timestamps = 10 * torch.arange(num_events, device=DEVICE)
    timestamps[99] += 1_000_000
    weight = torch.zeros(41, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = RelativeBias(time_weight=weight, timestamps=timestamps)
    offsets = torch.tensor([0, 100, 200], device=DEVICE)
    out = hstu_attention(q, k, v, offsets, max_seq_len=100, bias=bias, backend=backend)
    return torch.autograd.grad(out, weight, dout)[0][1:40]


def test_an_event_with_a_far_larger_gradient_takes_no_digits_from_those_of_others() -> None:
    outlier = 3e10
    exact = time_gradient("reference", torch.float64, outlier)
    plain = time_gradient("reference", torch.float32, outlier)
    error = (time_gradient("triton", torch.float32, outlier) - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
