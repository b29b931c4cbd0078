"""The Triton backend of hstu_attention on random problems; see test_triton_attention.py."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_as_exact_as_plain_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_device import DEVICE, INTERPRETED, needs_triton

from ultrarec.kernels import AttentionMask

pytestmark = needs_triton

COUNTS = st.sampled_from([0, 0, 1, 3, 17, 40])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    lengths, widths = draw(st.lists(st.integers(0, 40), max_size=1)), [1, 5, 16, 25, 32, 50]
    if dtype is torch.float32:
        lengths.append(draw(st.integers(0, 60)))
    else:
        # The largest error of few 16-bit numbers is too much a matter of luck to be compared.
        lengths.append(draw(st.integers(33, 60)))
        widths = widths[2:]
    return Case(
        lengths=tuple(lengths[::-1] if draw(st.booleans()) else lengths),
        num_heads=draw(st.sampled_from([1, 1, 1, 2])),
        dqk=draw(st.sampled_from(widths)),
        dv=draw(st.sampled_from(widths)),
        slack=draw(st.integers(0, 9)),
        mask=draw(st.builds(AttentionMask, window=COUNTS, full_tail=COUNTS, prefix=COUNTS, num_contextual=COUNTS)),
        targets=draw(st.booleans()),
        bias=draw(st.sampled_from(["", "", "position", "time", "position time query"])),
        scale=draw(st.sampled_from(["default", "number", "tensor"])),
        dtype=dtype,
        device=DEVICE,
    )


@pytest.fixture(scope="module")
def unchecked_integers() -> Iterator[None]:
    """Without the interpreter's checks for integer overflow, another third of its time; test_triton_attention.py
    has them.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import interpreter_builder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, sanitize_overflow=False))
        yield


@pytest.mark.usefixtures("nan_filled_empty", "unchecked_integers")
@pytest.mark.timeout(600)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(cases())
def test_random_problems_are_as_exact_as_plain_torch(case: Case) -> None:
    assert_as_exact_as_plain_torch(case, "triton")
