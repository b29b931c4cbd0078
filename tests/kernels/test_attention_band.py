"""Windows and causal sequences of middling length, computed block by block in one loop instead of in strips."""

import pytest
import torch
from attention_cases import Case, assert_as_exact_as_plain_torch, attend, inputs_of, outputs_and_gradients

from ultrarec.kernels import AttentionMask
from ultrarec.kernels.hstu_attention.band import BLOCK, MOST_KEYS, Band, band_of
from ultrarec.kernels.products import HAS_ONEDNN, multiplies_bfloat16

LONG = 8 * BLOCK + 200
WITH_BFLOAT16 = pytest.mark.skipif(
    not multiplies_bfloat16(torch.empty(0)), reason="without instructions for bfloat16 strips compute it"
)
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=WITH_BFLOAT16)]
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="blocks are multiplied by oneDNN, which this torch is without")


def case_of(mask: AttentionMask, **changes: object) -> Case:
    return Case(**{"lengths": (LONG, 30), "num_heads": 1, "dqk": 64, "dv": 80, "mask": mask} | changes)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("window", [1, 100, 128, 129, 512])
    def test_windows_of_less_and_more_than_a_block(self, window: int, dtype: torch.dtype) -> None:
        assert_as_exact_as_plain_torch(case_of(AttentionMask(window=window), dtype=dtype))

    @pytest.mark.parametrize("length", [257, 3 * BLOCK, 700])
    @pytest.mark.parametrize("targets", [False, True], ids=["history", "targets"])
    def test_all_before_without_a_window(self, length: int, targets: bool, dtype: torch.dtype) -> None:
        assert_as_exact_as_plain_torch(case_of(AttentionMask(), lengths=(length,), targets=targets, dtype=dtype))

    @pytest.mark.parametrize("full_tail", [1, 72, 200])
    @pytest.mark.parametrize("targets", [False, True], ids=["history", "targets"])
    def test_a_tail_behind_the_band(self, full_tail: int, targets: bool, dtype: torch.dtype) -> None:
        assert_as_exact_as_plain_torch(
            case_of(AttentionMask(window=200, full_tail=full_tail), targets=targets, dtype=dtype)
        )

    def test_a_scale_per_query_whose_gradient_is_asked_for(self, dtype: torch.dtype) -> None:
        # The forward is the band's, the backward that of strips, with one plan.
        assert_as_exact_as_plain_torch(
            case_of(AttentionMask(window=90, full_tail=50), scale="tensor", num_heads=2, dtype=dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_those_alone_that_see_it(dtype: torch.dtype) -> None:
    case, window, broken = case_of(AttentionMask(window=150), dtype=dtype), 150, 700
    inputs = inputs_of(case)
    expected = attend(case, inputs, "cpu")
    for x in inputs.values():
        x[broken] = torch.nan
    got = attend(case, inputs, "cpu")
    sees = torch.zeros(len(got), dtype=torch.bool)
    sees[broken : broken + window + 1] = True
    assert got[sees].isnan().all()
    torch.testing.assert_close(got[~sees], expected[~sees])


def test_finite_numbers_too_large_to_multiply_disturb_nobody_who_does_not_see_them() -> None:
    case, window, large = case_of(AttentionMask(window=20)), 20, 700
    inputs = inputs_of(case)
    expected = attend(case, inputs, "cpu")
    inputs["k"][large] = 3e38
    got = attend(case, inputs, "cpu")
    others = torch.ones(len(got), dtype=torch.bool)
    others[large : large + window + 1] = False
    torch.testing.assert_close(got[others], expected[others])


@pytest.mark.parametrize("num_heads", [1, 3])
def test_the_number_of_threads_changes_no_bit(num_heads: int) -> None:
    case = case_of(AttentionMask(window=256, full_tail=40), lengths=(2 * LONG,), num_heads=num_heads)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3, 3):
            torch.set_num_threads(num_threads)
            results.append(outputs_and_gradients(case, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_band_ends_where_the_tail_begins() -> None:
    assert band_of(AttentionMask(window=150, full_tail=100), 2000) == Band(
        num_queries=1900 // BLOCK * BLOCK, window=150
    )


def test_without_a_window_a_band_is_all_of_a_history_that_is_not_too_long() -> None:
    assert band_of(AttentionMask(full_tail=500), 2000) == Band(num_queries=2000 // BLOCK * BLOCK, window=2000)
    assert band_of(AttentionMask(), MOST_KEYS + 1) is None


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(window=MOST_KEYS + 1),
        AttentionMask(window=99, prefix=1),
        AttentionMask(window=99, num_contextual=1),
        AttentionMask(window=99, full_tail=1900),
    ],
)
def test_other_masks_are_left_to_strips(mask: AttentionMask) -> None:
    assert band_of(mask, 2000) is None
