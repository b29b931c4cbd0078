"""Random numbers that depend on their arguments only, and not on what was drawn before them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]


def mix(bits: Bits) -> Bits:
    """SplitMix64's output function (Steele et al., OOPSLA 2014): each input bit flips about half of the output's."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keys(seed: int, epoch: int, rows: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> Bits:
    """[S] one key per sample of an epoch, from its row and its number."""
    bits = mix(np.full(len(rows), seed % 2**64, np.uint64))
    bits = mix(bits ^ np.uint64(epoch))
    for column in (rows, numbers):
        bits = mix(bits ^ column.astype(np.uint64))
    return bits


def uniform(bits: Bits) -> npt.NDArray[np.float64]:
    """[S] a number in [0, 1) for each key, a multiple of 2**-53."""
    return (mix(bits) >> np.uint64(11)).astype(np.float64) * 2.0**-53
