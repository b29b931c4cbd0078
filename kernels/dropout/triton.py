"""The bits of the seeded dropout inside Triton kernels, equal to those of the torch version."""

# T = rows of a tile, C = its columns

import triton
import triton.language as tl

from . import COLUMN_SALT, MULTIPLIERS

FIRST = tl.constexpr(MULTIPLIERS[0])
SECOND = tl.constexpr(MULTIPLIERS[1])
SALT = tl.constexpr(COLUMN_SALT)


@triton.jit
def is_kept(seed_ptr: tl.tensor, rows_T: tl.tensor, columns_C: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Bool `[T, C]`: which elements of these rows and columns are kept."""
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    row_keys_T = _hash(_hash(rows_T.to(tl.uint32) ^ low) ^ high)
    column_keys_C = _hash(_hash(columns_C.to(tl.uint32) ^ high ^ SALT) ^ low)
    bits = (row_keys_T[:, None] ^ column_keys_C[None, :]) * FIRST
    bits = (bits ^ (bits >> 15)) * SECOND
    return bits.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _hash(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 15)) * SECOND
    return x ^ (x >> 16)
