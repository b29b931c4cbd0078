"""One matrix product for both projections of a layer, with what follows it done before it leaves the chip.

Why fuse the epilogue and nothing more, per token at width 512 and 2048 columns in bf16 (estimates from data sheets of
an H100, 3.3 TB/s and about 600 TFLOP/s reached, not measurements): the product takes 3.5 ns; writing its result 1.2 and
SiLU in a pass of its own 2.5 more. The norm in front is a pass of its own: each row of its output is read by every
column of tiles, so that inside the product its statistics would be computed sixteen times.
"""

# T = tokens, N = columns of the result, K = columns of a token, A = activated columns

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import check_native
from ..fp8.triton import quantize
from ..launching import Launch, contiguous

TILES = {
    torch.float32: (64, 64, 32),
    torch.bfloat16: (128, 128, 64),
    torch.float16: (128, 128, 64),
    torch.float8_e4m3fn: (128, 128, 128),
}
"""Rows, columns and depth of a program's tile, by the dtype of what is multiplied."""
SMALL_TILE = 64
"""Rows and columns where results lie at no multiple of ALIGNMENT: stored one by one, tiles of 128 spilled 872 bytes."""
ALIGNMENT = 16
"""Elements: what Triton asks of a stride before it moves 16 bytes at once."""


@triton.jit
def linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    before_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    width: tl.tensor,
    num_activated: tl.tensor,
    scale: tl.tensor,
    widen: tl.constexpr,
    longest_sum: tl.constexpr,
    tile_T: tl.constexpr,
    tile_N: tl.constexpr,
    tile_K: tl.constexpr,
) -> None:
    """A tile of `scale * x W^T + bias + residual`, its first columns through SiLU and, before it, into before.

    With scales of their rows, x and W are e4m3.
    """
    # Tiles of the same tokens run side by side and share them in the cache; the weight stays there anyway.
    num_tiles_N = tl.cdiv(num_columns, tile_N)
    rows_T = (tl.program_id(0) // num_tiles_N).to(tl.int64) * tile_T + tl.arange(0, tile_T)
    columns_N = (tl.program_id(0) % num_tiles_N) * tile_N + tl.arange(0, tile_N)
    has_row, has_column = rows_T < num_rows, columns_N < num_columns
    inner_K = tl.arange(0, tile_K)
    x_TK = x_ptr + rows_T[:, None] * width + inner_K[None, :]
    weight_KN = weight_ptr + columns_N[None, :].to(tl.int64) * width + inner_K[:, None]
    sum_TN = tl.zeros((tile_T, tile_N), dtype=tl.float32)
    for start in range(0, width, tile_K):
        has_inner = start + inner_K < width
        x = tl.load(x_TK + start, mask=has_row[:, None] & has_inner[None, :], other=0.0)
        weight = tl.load(weight_KN + start, mask=has_inner[:, None] & has_column[None, :], other=0.0)
        if widen:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        # Products of float32 keep all its bits, as those of torch.mm do.
        sum_TN = tl.dot(x, weight, sum_TN, input_precision="ieee", max_num_imprecise_acc=longest_sum)

    sum_TN *= scale
    if x_scale_ptr is not None:
        sum_TN *= tl.load(x_scale_ptr + rows_T, mask=has_row, other=0.0)[:, None]
        sum_TN *= tl.load(weight_scale_ptr + columns_N, mask=has_column, other=0.0)[None, :]
    if bias_ptr is not None:
        sum_TN += tl.load(bias_ptr + columns_N, mask=has_column, other=0.0).to(tl.float32)[None, :]
    place_TN = rows_T[:, None] * num_columns + columns_N[None, :]
    mask_TN = has_row[:, None] & has_column[None, :]
    if residual_ptr is not None:
        sum_TN += tl.load(residual_ptr + place_TN, mask=mask_TN, other=0.0).to(tl.float32)
    if before_ptr is not None:
        is_activated = columns_N < num_activated
        before = before_ptr + rows_T[:, None] * num_activated + columns_N[None, :]
        tl.store(before, sum_TN.to(before_ptr.dtype.element_ty), mask=mask_TN & is_activated[None, :])
        sum_TN = tl.where(is_activated[None, :], sum_TN * tl.sigmoid(sum_TN), sum_TN)
    tl.store(out_ptr + place_TN, sum_TN.to(out_ptr.dtype.element_ty), mask=mask_TN)


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    *,
    residual_TN: Tensor | None = None,
    before_TA: Tensor | None = None,
    scale: float = 1.0,
    fp8: bool,
) -> None:
    """Do what linear_launch says, with `fp8` of x and W in e4m3; ValueError if the GPU does not multiply that."""
    scales = None
    if fp8:
        check_native(x_TK.device)
        (x_TK, x_scale_T1), (weight_NK, weight_scale_N1) = quantize(x_TK), quantize(weight_NK)
        scales = (x_scale_T1, weight_scale_N1)
    epilogue = {"residual_TN": residual_TN, "before_TA": before_TA}
    linear_launch(x_TK, weight_NK.contiguous(), bias_N, out_TN, **epilogue, scale=scale, scales=scales).start()


def linear_launch(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    *,
    residual_TN: Tensor | None = None,
    before_TA: Tensor | None = None,
    scale: float = 1.0,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Launch:
    """Write `scale * x W^T + b + residual` to out; with `before`, its first A columns there, and through SiLU to out.

    x and W are contiguous, and of one dtype; if that is e4m3, each of their rows has one of the scales. Rows of no
    multiple of ALIGNMENT are copied, with zeros behind: loaded one by one, elements of rows of 50 spilled 880 bytes.
    """
    num_rows, num_columns = out_TN.shape
    num_activated = 0 if before_TA is None else before_TA.shape[1]
    x_scale_T1, weight_scale_N1 = (None, None) if scales is None else scales
    if num_missing := -x_TK.shape[1] % ALIGNMENT:
        x_TK, weight_NK = F.pad(x_TK, (0, num_missing)), F.pad(weight_NK, (0, num_missing))
    tile_T, tile_N, tile_K = TILES[x_TK.dtype]
    if num_columns % ALIGNMENT or num_activated % ALIGNMENT:
        tile_T = tile_N = SMALL_TILE
    arguments = {
        "x_ptr": x_TK,
        "weight_ptr": weight_NK,
        "bias_ptr": contiguous(bias_N),
        "residual_ptr": residual_TN,
        "out_ptr": out_TN,
        "before_ptr": before_TA,
        "x_scale_ptr": x_scale_T1,
        "weight_scale_ptr": weight_scale_N1,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "width": x_TK.shape[1],
        "num_activated": num_activated,
        "scale": scale,
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        "widen": x_TK.device.type == "cpu",
        # In a sum of FP8 products the tensor cores of sm_90 keep about 14 bits (DeepSeek-V3, arXiv 2412.19437, section
        # 3.3.2), so each tile's sum is added to the others outside of them.
        "longest_sum": 0 if scales is None else tile_K,
        "tile_T": tile_T,
        "tile_N": tile_N,
        "tile_K": tile_K,
    }
    grid = (triton.cdiv(num_rows, tile_T) * triton.cdiv(num_columns, tile_N),)
    return Launch(
        linear_kernel, grid, arguments, {"num_warps": 4 if x_TK.dtype == torch.float32 else 8, "num_stages": 3}
    )
