"""position_time_encoding against its definition in float64, and its buckets of time against exact arithmetic."""

# T = tokens, E = model width, P = positions, K = time buckets

from decimal import Decimal
from math import isqrt

import pytest
import torch
from fused_ops import (
    BACKENDS,
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_as_exact_as_plain_torch,
    assert_compiles,
    saved_bytes_per_row,
)
from torch import Tensor

from ultrarec.kernels import elapsed_buckets, elapsed_thresholds, position_time_encoding

NUM_POSITIONS, NUM_BUCKETS = 11, 6


def inputs_of(num_tokens=37, width=24, dtype=torch.float32, token_dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Half of the tokens share position 0, as targets do; the last bucket is nobody's.
    positions_T = torch.randint(0, 2 * NUM_POSITIONS, (num_tokens,), generator=generator) % (2 * NUM_POSITIONS - 1)
    return {
        "x_TE": randn(num_tokens, width).to(token_dtype),
        "position_weight_PE": randn(NUM_POSITIONS, width).to(dtype),
        "positions_T": torch.where(positions_T < NUM_POSITIONS, positions_T, 0),
        "time_weight_KE": randn(NUM_BUCKETS, width).to(dtype),
        "buckets_T": torch.randint(0, NUM_BUCKETS - 1, (num_tokens,), generator=generator),
    }


def encode(inputs: dict[str, Tensor], backend: str = "auto") -> Tensor:
    return position_time_encoding(**inputs, scale=3.7, backend=backend)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgainstTheDefinition:
    @DTYPES
    def test_every_dtype(self, backend, dtype, token_dtype):
        assert_as_exact_as_plain_torch(encode, inputs_of(dtype=dtype, token_dtype=token_dtype), backend)

    @pytest.mark.parametrize("left_out", [("position_weight_PE", "positions_T"), ("time_weight_KE", "buckets_T")])
    def test_either_table_alone(self, backend, left_out):
        inputs = {name: x for name, x in inputs_of().items() if name not in left_out}
        assert_as_exact_as_plain_torch(encode, inputs, backend)

    @pytest.mark.parametrize("num_tokens", [0, 1, 63, 65, 600])
    def test_numbers_of_tokens_at_the_edges_of_tiles_and_of_parts(self, backend, num_tokens):
        assert_as_exact_as_plain_torch(encode, inputs_of(num_tokens=num_tokens), backend)

    @pytest.mark.parametrize("width", [1, 50, 64, 300])
    def test_widths(self, backend, width):
        assert_as_exact_as_plain_torch(encode, inputs_of(width=width), backend)

    def test_strided_tokens_and_tables(self, backend):
        inputs = inputs_of()
        inputs |= {name: inputs[name].t().contiguous().t() for name in ("x_TE", "time_weight_KE")}
        assert_as_exact_as_plain_torch(encode, inputs, backend)

    def test_repeated_calls_give_the_same_bits(self, backend):
        results = []
        for _ in range(2):
            inputs = {name: x.to(DEVICE) for name, x in inputs_of(num_tokens=600).items()}
            leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
            out = encode(inputs, backend)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))

    def test_a_row_that_the_table_lacks_does_not_pass_unnoticed(self, backend):
        inputs = {name: x.to(DEVICE) for name, x in inputs_of().items()}
        for position in (NUM_POSITIONS, -1):
            inputs["positions_T"][5] = position
            if backend == "cpu":
                with pytest.raises(IndexError):
                    encode(inputs, backend)
            else:
                assert encode(inputs, backend).isnan().any(1).nonzero().tolist() == [[5]]


def test_gradients_match_finite_differences():
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_of(num_tokens=5, width=2).items()}
    floats = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    assert torch.autograd.gradcheck(
        lambda *tensors: encode(inputs | dict(zip(floats, tensors, strict=True))), tuple(floats.values())
    )


def test_the_backward_keeps_positions_and_buckets_only():
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs_of().items()}
    assert saved_bytes_per_row(lambda: encode(inputs), 37) == 2 * 8


def test_torch_compile_makes_one_graph_with_the_same_result():
    assert_compiles(encode, inputs_of())


def test_the_operator_passes_opcheck():
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs_of().items()}
    torch.library.opcheck(torch.ops.ultrarec.position_time_encoding.default, (*inputs.values(), 3.7, "cpu"))
    x_TE, positions_T = inputs["x_TE"].detach(), inputs["positions_T"]
    torch.library.opcheck(torch.ops.ultrarec.row_sums.default, (x_TE, positions_T, NUM_POSITIONS, "cpu"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_TE": torch.zeros(37)}, r"x is torch.float32 of shape \(37,\); it takes a matrix of floats"),
        ({"positions_T": None}, "position_weight and positions go together"),
        ({"time_weight_KE": torch.zeros(6, 23)}, r"time_weight is torch.float32 of shape \(6, 23\); .* rows of 24"),
        ({"buckets_T": torch.zeros(37)}, r"buckets is torch.float32 of shape \(37,\); it takes an int64 per token, 37"),
        ({"buckets_T": torch.zeros(3).long()}, r"buckets is torch.int64 of shape \(3,\); it takes an int64 per token"),
    ],
)
def test_wrong_inputs_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        encode(inputs_of() | changed)


@pytest.mark.skipif(INTERPRETED, reason="no kernel is involved")
class TestBucketsOfTime:
    @pytest.mark.parametrize(("time_unit", "per_minute"), [(1.0, 60), (0.001, 60_000), (1e-6, 60_000_000), (60.0, 1)])
    def test_square_roots_are_exact_at_every_threshold(self, time_unit, per_minute):
        thresholds = elapsed_thresholds("sqrt", num_buckets=2048, time_unit=time_unit)
        edges = torch.tensor([k * k * per_minute for k in range(1, 2049)])
        elapsed = torch.cat([edges - 1, edges, edges + 1])
        exact = [min(2048, isqrt(dt // per_minute)) for dt in elapsed.tolist()]
        assert elapsed_buckets(elapsed, thresholds).tolist() == exact

    def test_logarithms_are_exact_at_every_threshold(self):
        thresholds = elapsed_thresholds("log", num_buckets=2048, time_unit=0.001)
        elapsed = torch.cat([thresholds - 1, thresholds])
        exact = [max(0, int((Decimal(dt) / 60_000).ln())) if dt >= 60_000 else 0 for dt in elapsed.tolist()]
        assert elapsed_buckets(elapsed, thresholds).tolist() == exact
        assert len(thresholds) == 32  # exp(33) minutes are above the largest int64 of milliseconds

    def test_times_ahead_are_in_bucket_0_and_the_longest_in_the_last(self):
        for kind in ("sqrt", "log"):
            thresholds = elapsed_thresholds(kind, num_buckets=20, time_unit=1.0)
            elapsed = torch.tensor([-(2**63), -1, 0, 2**63 - 1])
            assert elapsed_buckets(elapsed, thresholds).tolist() == [0, 0, 0, 20]

    def test_an_unknown_kind_is_named(self):
        with pytest.raises(ValueError, match="kind='cube'; choose 'log' or 'sqrt'"):
            elapsed_thresholds("cube", num_buckets=20, time_unit=1.0)
