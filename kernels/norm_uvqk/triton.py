"""norm_uvqk on GPUs: a kernel for the norm, one for the product with its epilogue, one for the norm's backward.

The products of the backward are torch's: nothing follows them that could be fused.
"""

# T = tokens, E = model width, N = columns of u, v, q and k together, A = activated columns, P = programs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Launch, contiguous
from ..linear.triton import linear

TILE = 4096
"""Elements of a program's tile: 32 per thread of four warps, which stay in registers."""
MAX_PROGRAMS = 1024
"""Of the backward, each of which sums the gradients of scale and shift over many tokens; in a fixed order."""


@triton.jit
def norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    tile_T: tl.constexpr,
    tile_E: tl.constexpr,
) -> None:
    """Normalise some tokens, and keep their mean and 1 / deviation."""
    rows_T = tl.program_id(0).to(tl.int64) * tile_T + tl.arange(0, tile_T)
    columns_E = tl.arange(0, tile_E)
    has_row, has_column = rows_T < num_rows, columns_E < width
    place_TE, mask_TE = rows_T[:, None] * width + columns_E[None, :], has_row[:, None] & has_column[None, :]
    x_TE = tl.load(x_ptr + place_TE, mask=mask_TE, other=0.0).to(tl.float32)
    mean_T = tl.sum(x_TE, 1) / width
    centred_TE = tl.where(has_column[None, :], x_TE - mean_T[:, None], 0.0)
    rstd_T = 1.0 / tl.sqrt(tl.sum(centred_TE * centred_TE, 1) / width + eps)
    normed_TE = centred_TE * rstd_T[:, None]
    if weight_ptr is not None:
        normed_TE *= tl.load(weight_ptr + columns_E, mask=has_column, other=0.0)[None, :]
        normed_TE += tl.load(bias_ptr + columns_E, mask=has_column, other=0.0)[None, :]
    tl.store(normed_ptr + place_TE, normed_TE.to(normed_ptr.dtype.element_ty), mask=mask_TE)
    tl.store(mean_ptr + rows_T, mean_T, mask=has_row)
    tl.store(rstd_ptr + rows_T, rstd_T, mask=has_row)


@triton.jit
def norm_backward_kernel(
    dnormed_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    dweight_ptr: tl.tensor,
    dbias_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    tile_T: tl.constexpr,
    tile_E: tl.constexpr,
) -> None:
    """The gradient of x, the normalised tokens again, and this program's part of the gradients of scale and shift."""
    columns_E = tl.arange(0, tile_E)
    has_column = columns_E < width
    weight_E = tl.full((tile_E,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight_E = tl.load(weight_ptr + columns_E, mask=has_column, other=0.0)
    dweight_E, dbias_E = tl.zeros((tile_E,), tl.float32), tl.zeros((tile_E,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, tile_T), tl.num_programs(0)):
        rows_T = tl.cast(tile, tl.int64) * tile_T + tl.arange(0, tile_T)
        has_row = rows_T < num_rows
        place_TE, mask_TE = rows_T[:, None] * width + columns_E[None, :], has_row[:, None] & has_column[None, :]
        x_TE = tl.load(x_ptr + place_TE, mask=mask_TE, other=0.0).to(tl.float32)
        dnormed_TE = tl.load(dnormed_ptr + place_TE, mask=mask_TE, other=0.0).to(tl.float32)
        mean_T = tl.load(mean_ptr + rows_T, mask=has_row, other=0.0)
        rstd_T = tl.load(rstd_ptr + rows_T, mask=has_row, other=0.0)
        normed_TE = tl.where(mask_TE, (x_TE - mean_T[:, None]) * rstd_T[:, None], 0.0)
        dweight_E += tl.sum(dnormed_TE * normed_TE, 0)
        dbias_E += tl.sum(dnormed_TE, 0)
        dnormed_TE *= weight_E[None, :]
        along_T = tl.sum(dnormed_TE * normed_TE, 1) / width
        dx_TE = (dnormed_TE - tl.sum(dnormed_TE, 1)[:, None] / width - normed_TE * along_T[:, None]) * rstd_T[:, None]
        tl.store(dx_ptr + place_TE, dx_TE.to(dx_ptr.dtype.element_ty), mask=mask_TE)
        if weight_ptr is not None:
            normed_TE = normed_TE * weight_E[None, :]
            normed_TE += tl.load(bias_ptr + columns_E, mask=has_column, other=0.0)[None, :]
        tl.store(normed_ptr + place_TE, normed_TE.to(normed_ptr.dtype.element_ty), mask=mask_TE)
    if weight_ptr is not None:
        place_E = tl.program_id(0) * width + columns_E
        tl.store(dweight_ptr + place_E, dweight_E, mask=has_column)
        tl.store(dbias_ptr + place_E, dbias_E, mask=has_column)


def forward(
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    num_activated: int,
    eps: float,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uvqk `[T, N]`; for the backward its activated columns before SiLU `[T, A]`, mean and 1 / deviation of x."""
    x_TE, weight_NE = x_TE.contiguous(), weight_NE.contiguous()
    normed_TE = x_TE.new_empty(x_TE.shape, dtype=weight_NE.dtype)
    mean, rstd = (x_TE.new_empty((len(x_TE), 1), dtype=torch.float32) for _ in range(2))
    norm_launch(x_TE, norm_weight_E, norm_bias_E, normed_TE, mean, rstd, eps).start()
    uvqk_TN = weight_NE.new_empty(len(x_TE), len(weight_NE))
    before_TA = weight_NE.new_empty(len(x_TE), num_activated)
    linear(normed_TE, weight_NE, bias_N, uvqk_TN, before_TA=before_TA, fp8=fp8)
    return uvqk_TN, before_TA, mean, rstd


def backward(
    duvqk_TN: Tensor,
    x_TE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm_weight_E: Tensor | None,
    norm_bias_E: Tensor | None,
    before_TA: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the norm's weight and bias; empty where there is none."""
    x_TE, num_activated = x_TE.contiguous(), before_TA.shape[1]
    dlinear_TN = duvqk_TN.clone()
    dlinear_TN[:, :num_activated] = torch.ops.aten.silu_backward(duvqk_TN[:, :num_activated], before_TA)
    dnormed_TE = dlinear_TN @ weight_NE
    dx_TE, normed_TE = x_TE.new_empty(x_TE.shape), torch.empty_like(dnormed_TE)
    dnorm_PE = None
    if norm_weight_E is not None:
        dnorm_PE = mean.new_empty(2, num_programs(x_TE), x_TE.shape[1])
    tensors = (dnormed_TE, x_TE, norm_weight_E, norm_bias_E, mean, rstd)
    norm_backward_launch(*tensors, dx_TE, normed_TE, dnorm_PE).start()
    dweight_NE = dlinear_TN.t() @ normed_TE
    dbias_N = weight_NE.new_empty(0) if bias_N is None else dlinear_TN.sum(0)
    if dnorm_PE is None:
        return dx_TE, dweight_NE, dbias_N, mean.new_empty(0), mean.new_empty(0)
    dnorm_weight_E, dnorm_bias_E = dnorm_PE.sum(1).unbind()
    return dx_TE, dweight_NE, dbias_N, dnorm_weight_E.clone(), dnorm_bias_E.clone()


def norm_launch(
    x_TE: Tensor,
    weight_E: Tensor | None,
    bias_E: Tensor | None,
    normed_TE: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> Launch:
    """Write the normalised tokens and their statistics."""
    tiles = _tiles(x_TE)
    arguments = {
        "x_ptr": x_TE,
        "weight_ptr": contiguous(weight_E),
        "bias_ptr": contiguous(bias_E),
        "normed_ptr": normed_TE,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "num_rows": len(x_TE),
        "width": x_TE.shape[1],
        "eps": eps,
    }
    return Launch(norm_kernel, (triton.cdiv(len(x_TE), tiles["tile_T"]),), arguments | tiles)


def norm_backward_launch(
    dnormed_TE: Tensor,
    x_TE: Tensor,
    weight_E: Tensor | None,
    bias_E: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx_TE: Tensor,
    normed_TE: Tensor,
    dnorm_PE: Tensor | None,
) -> Launch:
    """Write the gradient of x, the normalised tokens, and each program's gradients of scale and shift `[2, P, E]`."""
    arguments = {
        "dnormed_ptr": dnormed_TE,
        "x_ptr": x_TE,
        "weight_ptr": contiguous(weight_E),
        "bias_ptr": contiguous(bias_E),
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "dx_ptr": dx_TE,
        "normed_ptr": normed_TE,
        "dweight_ptr": None if dnorm_PE is None else dnorm_PE[0],
        "dbias_ptr": None if dnorm_PE is None else dnorm_PE[1],
        "num_rows": len(x_TE),
        "width": x_TE.shape[1],
    }
    return Launch(norm_backward_kernel, (num_programs(x_TE),), arguments | _tiles(x_TE))


def num_programs(x_TE: Tensor) -> int:
    """Programs P of the backward."""
    return min(MAX_PROGRAMS, triton.cdiv(len(x_TE), _tiles(x_TE)["tile_T"]))


def _tiles(x_TE: Tensor) -> dict[str, int]:
    tile_E = triton.next_power_of_2(x_TE.shape[1])
    return {"tile_T": max(1, min(64, TILE // tile_E)), "tile_E": tile_E}
