import math

import numpy as np
import pytest

from ultrarec.data.config import FeatureConfig
from ultrarec.data.features import encode


def ids_of(values, is_valid=None, **config):
    array = np.asarray(values)
    mask = np.ones(len(array), bool) if is_valid is None else np.asarray(is_valid)
    return encode(FeatureConfig(role="event", **config), array, mask).tolist()


def defined_bucket(value, per_octave, num_values):
    if math.isnan(value) or value < 0:
        return 0
    if math.isinf(value):
        return num_values
    return min(1 + math.floor(per_octave * math.log2(1 + value)), num_values)


def test_a_category_is_one_plus_its_value_and_unknown_outside_the_range():
    assert ids_of([0, 1, 4, 5, -1, 2**40], kind="category", num_values=5) == [1, 2, 5, 0, 0, 0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_a_category_may_have_any_integer_type(dtype):
    assert ids_of(np.array([0, 3, 100], dtype), kind="category", num_values=1000) == [1, 4, 101]


def test_a_boolean_is_a_category_of_two_values():
    assert ids_of([False, True], kind="category", num_values=2) == [1, 2]


@pytest.mark.parametrize("kind", ["category", "bucket", "hash"])
def test_a_missing_value_is_unknown(kind):
    known, missing = ids_of([3, 3], [True, False], kind=kind, num_values=10)
    assert known > 0
    assert missing == 0


@pytest.mark.parametrize("per_octave", [0.5, 1.0, 2.5])
def test_buckets_follow_their_definition(per_octave):
    values = [0.0, 0.4, 1.0, 3.0, 7.0, 1e3, 1e18, -0.5, -1e9, math.nan, math.inf, -math.inf]
    expected = [defined_bucket(value, per_octave, 12) for value in values]
    assert ids_of(values, kind="bucket", num_values=12, per_octave=per_octave) == expected


def test_buckets_of_integers_double_in_width():
    assert ids_of([0, 1, 2, 3, 6, 7, 8, 2**62], kind="bucket", num_values=9) == [1, 2, 2, 3, 3, 4, 4, 9]


def test_hashes_are_fixed_for_all_time():
    # The first output of SplitMix64 seeded with 0 is 0xE220A8397B1DCDAF; trained tables depend on it.
    assert ids_of([0], kind="hash", num_values=10**9) == [1 + 0xE220A8397B1DCDAF % 10**9]


def test_hashes_fill_the_range_evenly_whatever_the_pattern_of_the_integers():
    for values in (np.arange(10_000), np.arange(10_000) * 1024, -np.arange(10_000)):
        sizes = np.bincount(ids_of(values, kind="hash", num_values=10), minlength=11)
        assert sizes[0] == 0
        assert sizes[1:].min() > 850
        assert sizes[1:].max() < 1150


def test_hashes_keep_integers_apart_that_floats_would_merge():
    big = 2**62
    assert len(set(ids_of([big, big + 1, -big, -big - 1], kind="hash", num_values=10**9))) == 4
