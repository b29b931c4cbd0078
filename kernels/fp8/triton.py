"""FP8 on GPUs: the kernel that brings rows to e4m3; the product is that of linear/triton.py."""

# T = rows of a matrix, K = its columns

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Launch
from . import LARGEST, SMALLEST_ROW

TILE = 4096
"""Elements of a program's tile: 32 per thread of four warps."""


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,
    quantized_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    largest: tl.tensor,
    smallest_row: tl.tensor,
    rounds: tl.constexpr,
    tile_T: tl.constexpr,
    tile_K: tl.constexpr,
) -> None:
    """Find the scales of some rows, and divide the rows by them."""
    rows_T, inner_K = tl.program_id(0).to(tl.int64) * tile_T + tl.arange(0, tile_T), tl.arange(0, tile_K)
    has_row = rows_T < num_rows
    max_TK = tl.zeros((tile_T, tile_K), tl.float32)
    for start in range(0, width, tile_K):
        mask_TK = has_row[:, None] & (start + inner_K < width)[None, :]
        x_TK = tl.load(x_ptr + rows_T[:, None] * width + (start + inner_K)[None, :], mask=mask_TK, other=0.0)
        x_TK = x_TK.to(tl.float32)
        # A maximum leaves NaN out; infinity stands in for it, and makes of the row what NaN would.
        max_TK = tl.maximum(max_TK, tl.where(x_TK == x_TK, tl.abs(x_TK), float("inf")))
    # Divisions that are rounded as IEEE says: the same bits as on the CPU.
    scale_T = tl.div_rn(tl.maximum(tl.max(max_TK, 1), smallest_row), largest)
    tl.store(scale_ptr + rows_T, scale_T, mask=has_row)
    for start in range(0, width, tile_K):
        mask_TK = has_row[:, None] & (start + inner_K < width)[None, :]
        place_TK = rows_T[:, None] * width + (start + inner_K)[None, :]
        x_TK = tl.load(x_ptr + place_TK, mask=mask_TK, other=0.0).to(tl.float32)
        scale_TK = tl.broadcast_to(scale_T[:, None], (tile_T, tile_K))
        x_TK = tl.div_rn(x_TK, scale_TK)
        if rounds:
            x_TK = _rounded_to_e4m3(x_TK)
        tl.store(quantized_ptr + place_TK, x_TK.to(tl.float8e4nv), mask=mask_TK)


@triton.jit
def _rounded_to_e4m3(x: tl.tensor) -> tl.tensor:
    """The nearest number of e4m3, of two the even one, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFFF + ((bits >> 20) & 1)
    normal = (bits & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 e4m3 has multiples of 2^-9, as float32 has beside this number.
    beside = 1.5 * 2.0**14
    return tl.where(tl.abs(x) < 2.0**-6, (x + beside) - beside, normal)


def quantize(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3 `[T, K]` and the scale of each row `[T, 1]`; bit for bit what plain torch gives."""
    quantized_TK = x_TK.new_empty(x_TK.shape, dtype=torch.float8_e4m3fn)
    scale_T1 = x_TK.new_empty((len(x_TK), 1), dtype=torch.float32)
    quantize_launch(x_TK.contiguous(), quantized_TK, scale_T1).start()
    return quantized_TK, scale_T1


def quantize_launch(x_TK: Tensor, quantized_TK: Tensor, scale_T1: Tensor) -> Launch:
    """Write the quantised rows and their scales; all contiguous."""
    tile_K = min(1024, triton.next_power_of_2(x_TK.shape[1]))
    tile_T = min(64, TILE // tile_K)
    arguments = {
        "x_ptr": x_TK,
        "quantized_ptr": quantized_TK,
        "scale_ptr": scale_T1,
        "num_rows": len(x_TK),
        "width": x_TK.shape[1],
        "largest": LARGEST,
        "smallest_row": SMALLEST_ROW,
        # The interpreter rounds wrongly where a GPU's conversion does not.
        "rounds": x_TK.device.type == "cpu",
        "tile_T": tile_T,
        "tile_K": tile_K,
    }
    return Launch(quantize_kernel, (triton.cdiv(len(x_TK), tile_T),), arguments)
