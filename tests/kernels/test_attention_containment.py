"""NaN and infinity in some events reach those alone that see them."""

import pytest
import torch
from attention_cases import MASKS, Case, attend, inputs_of, num_targets_of
from torch import Tensor

from ultrarec.kernels import AttentionMask

LENGTHS = (5, 40, 0, 270, 40)
BROKEN = [7, 44, 200, 352]
"""Events: early and late in a short sequence, within a long one, and a target."""


def results(case: Case, inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The output and the gradients of q, k and v, `[T, H]`: a number per event and head, NaN or not."""
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    out = attend(case, dict(zip(inputs, leaves, strict=True)), backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [x.float().sum(-1) for x in (out.detach(), *torch.autograd.grad(out, leaves[:3], dout))]


def broken(inputs: dict[str, Tensor], names: str, value: float) -> dict[str, Tensor]:
    copies = {name: x.clone() for name, x in inputs.items()}
    for name in names.split():
        copies[name][BROKEN, 1] = value
    return copies


def visible_pairs(case: Case) -> Tensor:
    """Whether event i sees event j, over the whole batch."""
    pairs = [torch.zeros(0, 0, dtype=torch.bool)]
    for length, num_targets in zip(case.lengths, num_targets_of(case).tolist(), strict=True):
        position = torch.arange(length)
        end = torch.tensor(case.mask.history_end(length, num_targets))
        pairs.append(case.mask.visible(position[:, None], position[None, :], end))
    return torch.block_diag(*pairs).bool()


@pytest.mark.parametrize(
    ("names", "value"), [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("q k v", torch.inf)]
)
@pytest.mark.parametrize("mask", [MASKS["causal"], MASKS["all"]], ids=["causal", "all"])
def test_what_is_not_finite_touches_only_events_that_see_it_or_are_seen_by_it(
    mask: AttentionMask, names: str, value: float
) -> None:
    case = Case(lengths=LENGTHS, mask=mask, targets=True, bias="position")
    inputs = broken(inputs_of(case), names, value)
    visible = visible_pairs(case)
    sees, is_seen = visible[:, BROKEN].any(1), visible[BROKEN, :].any(0)
    exact, got = (results(case, inputs, backend) for backend in ("reference", "cpu"))
    for name, a, b in zip(("out", "dq", "dk", "dv"), exact, got, strict=True):
        untouched = ~(sees if name in ("out", "dq") else is_seen)
        assert untouched.any(), name
        for head, events in ((0, slice(None)), (1, untouched)):
            assert a[events, head].isfinite().all(), name
            torch.testing.assert_close(b[events, head], a[events, head], rtol=1e-4, atol=1e-4, msg=name)
    assert not got[0][BROKEN, 1].isfinite().any()
    assert torch.equal(exact[0].isfinite(), got[0].isfinite())


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_the_sign_of_alpha_hides_nothing_that_is_broken(alpha: float) -> None:
    case = Case(lengths=LENGTHS, mask=MASKS["all"], targets=True, alpha=alpha)
    inputs = broken(inputs_of(case), "q k v", torch.nan)
    exact, got = (results(case, inputs, backend) for backend in ("reference", "cpu"))
    for name, a, b in zip(("out", "dq", "dk", "dv"), exact, got, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
    sees = visible_pairs(case)[:, BROKEN].any(1)
    assert not got[0][sees, 1].isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("bias", ["", "position"])
def test_a_broken_scale_touches_its_query_and_the_gradients_of_what_that_sees(bias: str, value: float) -> None:
    case = Case(lengths=LENGTHS, mask=MASKS["all"], targets=True, bias=bias, scale="tensor")
    inputs = inputs_of(case)
    inputs["scale"][BROKEN] = value
    is_seen = visible_pairs(case)[BROKEN, :].any(0)
    queries = torch.zeros(len(is_seen), dtype=torch.bool)
    queries[BROKEN] = True
    exact, got = (results(case, inputs, backend) for backend in ("reference", "cpu"))
    for name, a, b in zip(("out", "dq", "dk", "dv"), exact, got, strict=True):
        touched = queries if name in ("out", "dq") else is_seen
        assert not b[touched].isfinite().any(), name
        torch.testing.assert_close(b[~touched], a[~touched], rtol=1e-4, atol=1e-4, msg=name)
        assert a[~touched].isfinite().all(), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_event_beyond_the_window_changes_nothing(backend: str) -> None:
    case = Case(lengths=(300,), mask=AttentionMask(window=20), num_heads=2)
    whole = inputs_of(case)
    expected = attend(case, whole, backend)
    hidden = {name: x.clone() for name, x in whole.items()}
    for x in hidden.values():
        x[100] = torch.nan
    got = attend(case, hidden, backend)
    sees = torch.zeros(300, dtype=torch.bool)
    sees[100:121] = True
    assert got[sees].isnan().all()
    torch.testing.assert_close(got[~sees], expected[~sees])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_broken_target_touches_no_other_target_and_no_history(backend: str) -> None:
    case = Case(lengths=(30, 270), targets=True, mask=AttentionMask(window=9))
    inputs = inputs_of(case)
    expected = attend(case, inputs, backend)
    for x in inputs.values():
        x[298] = torch.nan
    got = attend(case, inputs, backend)
    others = torch.arange(300) != 298
    assert got[298].isnan().all()
    torch.testing.assert_close(got[others], expected[others])
