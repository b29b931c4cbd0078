"""Time buckets, exact to the last integer, and a bias that refuses to exist wrong."""

from decimal import Decimal, localcontext

import pytest
import torch

from ultrarec.kernels import RelativeBias
from ultrarec.kernels.hstu_attention.bias import bucket_thresholds, time_buckets

CPU = torch.device("cpu")


def buckets_of(elapsed: list[int], num_buckets: int) -> list[int]:
    """The rule word by word: how many k in 1..K have exp(0.301 k) <= elapsed."""
    with localcontext() as context:
        context.prec = 50
        starts = [(Decimal(301) / 1000 * k).exp() for k in range(1, num_buckets + 1)]
    return [sum(start <= dt for start in starts) for dt in elapsed]


@pytest.mark.parametrize("num_buckets", [0, 1, 2, 20, 128, 200])
def test_buckets_change_exactly_at_their_thresholds(num_buckets: int) -> None:
    thresholds = bucket_thresholds(num_buckets, CPU)
    edges = [max(t + step, 0) for t in thresholds.tolist() for step in (-2, -1, 0, 1, 2)]
    elapsed = torch.tensor([*edges, 0, 1, 2, 2**53, 2**63 - 1])
    assert time_buckets(elapsed, thresholds).tolist() == buckets_of(elapsed.tolist(), num_buckets)


def test_every_second_of_the_first_day_has_the_bucket_of_its_logarithm() -> None:
    elapsed = torch.arange(86_400)
    wanted = (elapsed.clamp(min=1).double().log() / 0.301).floor().clamp(max=128).to(torch.int32)
    assert torch.equal(time_buckets(elapsed, bucket_thresholds(128, CPU)), wanted)


def test_buckets_keep_the_shape_of_the_elapsed_times() -> None:
    assert time_buckets(torch.zeros(2, 3, 4, dtype=torch.int64), bucket_thresholds(5, CPU)).shape == (2, 3, 4)


def test_a_bias_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no position_weight and no time_weight; give one, or leave the bias out"):
        RelativeBias(timestamps=torch.arange(3))


def test_a_time_weight_without_timestamps_is_refused() -> None:
    with pytest.raises(ValueError, match="time_weight but no timestamps; give the int64 time of every event"):
        RelativeBias(time_weight=torch.zeros(5))


@pytest.mark.parametrize("weight", [torch.zeros(2, 3), torch.zeros(0), torch.zeros(3, dtype=torch.int64)])
@pytest.mark.parametrize("name", ["position_weight", "time_weight"])
def test_weights_that_are_no_vector_of_floats_are_refused(name: str, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"{name} is torch.* of shape .*; it takes a vector of floats"):
        RelativeBias(**{name: weight}, timestamps=torch.arange(3))


@pytest.mark.parametrize("name", ["timestamps", "query_timestamps"])
def test_times_that_are_not_int64_are_refused(name: str) -> None:
    times = {"timestamps": torch.arange(3), name: torch.arange(3.0)}
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 of shape \(3,\); it takes an int64 vector"):
        RelativeBias(time_weight=torch.zeros(5), **times)
