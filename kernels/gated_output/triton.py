"""gated_output on GPUs: a kernel makes what is projected, the product adds it to the residual; one for the backward.

The products of the backward are torch's: nothing follows them that could be fused.
"""

# T = tokens, H = heads, D = head width, V = H * D, E = model width, Y = columns that are projected,
# G = groups of W columns that are normalised together, P = programs per group

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import scale_of_kept, threshold
from ..dropout.triton import is_kept
from ..launching import Launch, contiguous
from ..linear.triton import linear

TILE = 2048
"""Elements of a program's tile; the backward holds a dozen such tiles, of 16 registers a thread each."""
WARP_ELEMENTS = 512
"""Of a tile, by warp: 16 a thread. Rows wider than TILE take more warps: with four, rows of 4096 spilled 976 bytes."""
MAX_WARPS = 32
MAX_PROGRAMS = 1024
"""Per group in the backward, each of which sums the gradients of scale and shift over many tokens; in a fixed order."""


@triton.jit
def gate_kernel(
    u_ptr: tl.tensor,
    a_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    u_stride: tl.tensor,
    num_values: tl.tensor,
    width: tl.tensor,
    dropped_below: tl.tensor,
    eps: tl.tensor,
    concat: tl.constexpr,
    tile_T: tl.constexpr,
    tile_W: tl.constexpr,
) -> None:
    """Make what is projected, of one group of columns of some tokens, and keep the group's mean and 1 / deviation."""
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    rows_T, inner_W = tl.program_id(0).to(tl.int64) * tile_T + tl.arange(0, tile_T), tl.arange(0, tile_W)
    columns_W, has_column = group * width + inner_W, inner_W < width
    has_row = rows_T < num_rows
    mask_TW = has_row[:, None] & has_column[None, :]
    a_TW = tl.load(a_ptr + rows_T[:, None] * num_values + columns_W[None, :], mask=mask_TW, other=0.0).to(tl.float32)
    u_TW = tl.load(u_ptr + rows_T[:, None] * u_stride + columns_W[None, :], mask=mask_TW, other=0.0).to(tl.float32)
    mean_T = tl.sum(a_TW, 1) / width
    centred_TW = tl.where(has_column[None, :], a_TW - mean_T[:, None], 0.0)
    rstd_T = 1.0 / tl.sqrt(tl.sum(centred_TW * centred_TW, 1) / width + eps)
    normed_TW = centred_TW * rstd_T[:, None]
    if weight_ptr is not None:
        normed_TW *= tl.load(weight_ptr + columns_W, mask=has_column, other=0.0)[None, :]
        normed_TW += tl.load(bias_ptr + columns_W, mask=has_column, other=0.0)[None, :]
    tl.store(mean_ptr + rows_T * num_groups + group, mean_T, mask=has_row)
    tl.store(rstd_ptr + rows_T * num_groups + group, rstd_T, mask=has_row)
    _store_projected(
        u_TW, a_TW, u_TW * normed_TW, seed_ptr, y_ptr, rows_T, columns_W, mask_TW, num_values, dropped_below, concat
    )


@triton.jit
def gate_backward_kernel(
    dy_ptr: tl.tensor,
    u_ptr: tl.tensor,
    a_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    du_ptr: tl.tensor,
    da_ptr: tl.tensor,
    y_ptr: tl.tensor,
    dweight_ptr: tl.tensor,
    dbias_ptr: tl.tensor,
    num_rows: tl.tensor,
    u_stride: tl.tensor,
    num_values: tl.tensor,
    width: tl.tensor,
    dropped_below: tl.tensor,
    scale: tl.tensor,
    concat: tl.constexpr,
    tile_T: tl.constexpr,
    tile_W: tl.constexpr,
) -> None:
    """Gradients of u and a in one group of columns, what is projected again, and a part of those of scale and shift."""
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    inner_W = tl.arange(0, tile_W)
    columns_W, has_column = group * width + inner_W, inner_W < width
    weight_W, bias_W = tl.full((tile_W,), 1.0, tl.float32), tl.zeros((tile_W,), tl.float32)
    dweight_W, dbias_W = tl.zeros((tile_W,), tl.float32), tl.zeros((tile_W,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, tile_T), tl.num_programs(0)):
        rows_T = tl.cast(tile, tl.int64) * tile_T + tl.arange(0, tile_T)
        has_row = rows_T < num_rows
        mask_TW = has_row[:, None] & has_column[None, :]
        place_TW = rows_T[:, None] * num_values + columns_W[None, :]
        a_TW = tl.load(a_ptr + place_TW, mask=mask_TW, other=0.0).to(tl.float32)
        u_TW = tl.load(u_ptr + rows_T[:, None] * u_stride + columns_W[None, :], mask=mask_TW, other=0.0).to(tl.float32)
        mean_T = tl.load(mean_ptr + rows_T * num_groups + group, mask=has_row, other=0.0)
        rstd_T = tl.load(rstd_ptr + rows_T * num_groups + group, mask=has_row, other=0.0)
        normed_TW = tl.where(mask_TW, (a_TW - mean_T[:, None]) * rstd_T[:, None], 0.0)
        if weight_ptr is not None:
            # Again for each tile: kept from one to the next they took registers, and sm_100 spilled 16 bytes.
            weight_W = tl.load(weight_ptr + columns_W, mask=has_column, other=0.0)
            bias_W = tl.load(bias_ptr + columns_W, mask=has_column, other=0.0)
        affine_TW = normed_TW * weight_W[None, :] + bias_W[None, :]
        _store_projected(
            u_TW, a_TW, u_TW * affine_TW, seed_ptr, y_ptr, rows_T, columns_W, mask_TW, num_values, dropped_below, concat
        )
        part: tl.constexpr = 2 if concat else 0
        dgated_TW = _projected_gradient(
            dy_ptr, seed_ptr, rows_T, columns_W, mask_TW, num_values, dropped_below, scale, part, concat
        )
        du_TW = dgated_TW * affine_TW
        if concat:
            du_TW += _projected_gradient(
                dy_ptr, seed_ptr, rows_T, columns_W, mask_TW, num_values, dropped_below, scale, 0, concat
            )
        tl.store(du_ptr + place_TW, du_TW.to(du_ptr.dtype.element_ty), mask=mask_TW)
        dnormed_TW = dgated_TW * u_TW
        dweight_W += tl.sum(dnormed_TW * normed_TW, 0)
        dbias_W += tl.sum(dnormed_TW, 0)
        dnormed_TW *= weight_W[None, :]
        along_T = tl.sum(dnormed_TW * normed_TW, 1) / width
        da_TW = (dnormed_TW - tl.sum(dnormed_TW, 1)[:, None] / width - normed_TW * along_T[:, None]) * rstd_T[:, None]
        if concat:
            da_TW += _projected_gradient(
                dy_ptr, seed_ptr, rows_T, columns_W, mask_TW, num_values, dropped_below, scale, 1, concat
            )
        tl.store(da_ptr + place_TW, da_TW.to(da_ptr.dtype.element_ty), mask=mask_TW)
    if weight_ptr is not None:
        place_W = tl.program_id(0) * num_values + columns_W
        tl.store(dweight_ptr + place_W, dweight_W, mask=has_column)
        tl.store(dbias_ptr + place_W, dbias_W, mask=has_column)


@triton.jit
def _store_projected(
    u_TW: tl.tensor,
    a_TW: tl.tensor,
    gated_TW: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows_T: tl.tensor,
    columns_W: tl.tensor,
    mask_TW: tl.tensor,
    num_values: tl.tensor,
    dropped_below: tl.tensor,
    concat: tl.constexpr,
) -> None:
    if concat:
        _store_part(u_TW, seed_ptr, y_ptr, rows_T, columns_W, mask_TW, 3 * num_values, dropped_below)
        _store_part(a_TW, seed_ptr, y_ptr, rows_T, num_values + columns_W, mask_TW, 3 * num_values, dropped_below)
        _store_part(
            gated_TW, seed_ptr, y_ptr, rows_T, 2 * num_values + columns_W, mask_TW, 3 * num_values, dropped_below
        )
    else:
        _store_part(gated_TW, seed_ptr, y_ptr, rows_T, columns_W, mask_TW, num_values, dropped_below)


@triton.jit
def _store_part(
    x_TW: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows_T: tl.tensor,
    columns_W: tl.tensor,
    mask_TW: tl.tensor,
    y_width: tl.tensor,
    dropped_below: tl.tensor,
) -> None:
    if seed_ptr is not None:
        x_TW = tl.where(is_kept(seed_ptr, rows_T, columns_W, dropped_below), x_TW, 0.0)
    tl.store(y_ptr + rows_T[:, None] * y_width + columns_W[None, :], x_TW.to(y_ptr.dtype.element_ty), mask=mask_TW)


@triton.jit
def _projected_gradient(
    dy_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    rows_T: tl.tensor,
    columns_W: tl.tensor,
    mask_TW: tl.tensor,
    num_values: tl.tensor,
    dropped_below: tl.tensor,
    scale: tl.tensor,
    part: tl.constexpr,
    concat: tl.constexpr,
) -> tl.tensor:
    """The gradient of the part-th V columns of what is projected, before dropout."""
    columns_W = part * num_values + columns_W
    y_width = 3 * num_values if concat else num_values
    dy_TW = tl.load(dy_ptr + rows_T[:, None] * y_width + columns_W[None, :], mask=mask_TW, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        dy_TW = tl.where(is_kept(seed_ptr, rows_T, columns_W, dropped_below), dy_TW * scale, 0.0)
    return dy_TW


def forward(
    u_TV: Tensor,
    a_THD: Tensor,
    x_TE: Tensor,
    weight_EY: Tensor,
    bias_E: Tensor | None,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Tensor | None,
    per_head: bool,
    concat: bool,
    dropout: float,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens `[T, E]`; for the backward mean and 1 / deviation of each group of a, `[T, G, 1]`."""
    num_rows, num_groups = len(u_TV), a_THD.shape[1] if per_head else 1
    y_TY = weight_EY.new_empty(num_rows, weight_EY.shape[1])
    mean, rstd = (a_THD.new_empty((num_rows, num_groups, 1), dtype=torch.float32) for _ in range(2))
    arguments = _arguments(u_TV, a_THD, norm_weight_V, norm_bias_V, seed, mean, rstd, y_TY, dropout)
    gate_launch(arguments, eps=eps).start()
    out_TE, scale = x_TE.new_empty(x_TE.shape), scale_of_kept(seed, dropout)
    linear(y_TY, weight_EY, bias_E, out_TE, residual_TN=x_TE.contiguous(), scale=scale, fp8=fp8)
    return out_TE, mean, rstd


def backward(
    dout_TE: Tensor,
    u_TV: Tensor,
    a_THD: Tensor,
    weight_EY: Tensor,
    bias_E: Tensor | None,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, a, weight, bias and the norm's weight and bias; empty where there is none."""
    dproduct_TE = dout_TE.to(weight_EY.dtype)
    dy_TY = dproduct_TE @ weight_EY
    y_TY, du_TV, da_THD = torch.empty_like(dy_TY), u_TV.new_empty(u_TV.shape), a_THD.new_empty(a_THD.shape)
    arguments = _arguments(u_TV, a_THD, norm_weight_V, norm_bias_V, seed, mean, rstd, y_TY, dropout)
    launch = gate_backward_launch(arguments, dy_TY, du_TV, da_THD, scale=scale_of_kept(seed, dropout))
    launch.start()
    dweight_EY = (dproduct_TE.t() @ y_TY).mul_(scale_of_kept(seed, dropout))
    dbias_E = dout_TE.new_empty(0) if bias_E is None else dout_TE.sum(0)
    if norm_weight_V is None:
        return du_TV, da_THD, dweight_EY, dbias_E, mean.new_empty(0), mean.new_empty(0)
    dnorm_weight_V, dnorm_bias_V = (launch.arguments[name].sum(0) for name in ("dweight_ptr", "dbias_ptr"))
    return du_TV, da_THD, dweight_EY, dbias_E, dnorm_weight_V, dnorm_bias_V


def gate_launch(arguments: dict[str, Any], *, eps: float) -> Launch:
    """Write what is projected, and the statistics."""
    grid = (triton.cdiv(arguments["num_rows"], arguments["tile_T"]), arguments["mean_ptr"].shape[1])
    return Launch(gate_kernel, grid, arguments | {"eps": eps}, _options(arguments))


def gate_backward_launch(
    arguments: dict[str, Any], dy_TY: Tensor, du_TV: Tensor, da_THD: Tensor, *, scale: float
) -> Launch:
    """Write the gradients of u and a, what is projected, and the parts `[P, V]` of those of scale and shift."""
    num_programs = min(MAX_PROGRAMS, triton.cdiv(arguments["num_rows"], arguments["tile_T"]))
    mean = arguments["mean_ptr"]
    parts = [None, None]
    if arguments["weight_ptr"] is not None:
        parts = [mean.new_empty(num_programs, arguments["num_values"]) for _ in range(2)]
    arguments = {"dy_ptr": dy_TY, "du_ptr": du_TV, "da_ptr": da_THD, "scale": scale} | arguments
    arguments |= {"dweight_ptr": parts[0], "dbias_ptr": parts[1]}
    return Launch(gate_backward_kernel, (num_programs, mean.shape[1]), arguments, _options(arguments))


def _arguments(
    u_TV: Tensor,
    a_THD: Tensor,
    norm_weight_V: Tensor | None,
    norm_bias_V: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y_TY: Tensor,
    dropout: float,
) -> dict[str, Any]:
    """What both kernels are called with."""
    if u_TV.stride(1) != 1:
        u_TV = u_TV.contiguous()
    width = u_TV.shape[1] // mean.shape[1]
    tile_W = triton.next_power_of_2(width)
    return {
        "u_ptr": u_TV,
        "a_ptr": a_THD.contiguous(),
        "weight_ptr": contiguous(norm_weight_V),
        "bias_ptr": contiguous(norm_bias_V),
        "seed_ptr": seed,
        "y_ptr": y_TY,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "num_rows": len(u_TV),
        "u_stride": u_TV.stride(0),
        "num_values": u_TV.shape[1],
        "width": width,
        "dropped_below": threshold(dropout),
        "concat": y_TY.shape[1] != u_TV.shape[1],
        "tile_T": max(1, min(64, TILE // tile_W)),
        "tile_W": tile_W,
    }


def _options(arguments: dict[str, Any]) -> dict[str, int]:
    return {"num_warps": min(MAX_WARPS, max(4, arguments["tile_W"] // WARP_ELEMENTS))}
