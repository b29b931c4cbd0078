"""From a column's values to the ids that embedding tables look up."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .config import FeatureConfig
from .hashing import mix
from .samples import Integers


def encode(feature: FeatureConfig, values: npt.NDArray[Any], is_valid: npt.NDArray[np.bool_]) -> Integers:
    """Ids in 0..num_values by the rule of the feature's kind; 0 where a value is missing or out of range.

    `values` are booleans or integers, for `bucket` also floats; what stands where `is_valid` is False does not matter.
    """
    return np.where(is_valid, _RULES[feature.kind](feature, values), 0)


def number_bits(values: npt.NDArray[Any], is_valid: npt.NDArray[np.bool_]) -> Integers:
    """Values as float32, NaN where one is missing, each in the low bits of an integer: columns are integers here."""
    numbers = np.where(is_valid, values, np.nan).astype(np.float32)
    return numbers.view(np.int32).astype(np.int64)


def numbers_of(bits: Integers) -> npt.NDArray[np.float32]:
    """The float32 values that `number_bits` put into integers."""
    return bits.astype(np.int32).view(np.float32)


def _category(feature: FeatureConfig, values: npt.NDArray[Any]) -> Integers:
    is_known = (values >= 0) & (values < feature.num_values)
    ids = np.zeros(len(values), np.int64)
    ids[is_known] = values[is_known].astype(np.int64) + 1
    return ids


def _bucket(feature: FeatureConfig, values: npt.NDArray[Any]) -> Integers:
    numbers = values.astype(np.float64)
    is_known = numbers >= 0
    octaves = np.log2(1 + numbers[is_known])
    ids = np.zeros(len(values), np.int64)
    # Capped while still a float: infinity has no integer.
    ids[is_known] = np.minimum(1 + np.floor(feature.per_octave * octaves), feature.num_values).astype(np.int64)
    return ids


def _hash(feature: FeatureConfig, values: npt.NDArray[Any]) -> Integers:
    bits = values.astype(np.uint64 if values.dtype.kind == "u" else np.int64).view(np.uint64)
    return (mix(bits) % np.uint64(feature.num_values)).astype(np.int64) + 1


_RULES = {"category": _category, "bucket": _bucket, "hash": _hash}
