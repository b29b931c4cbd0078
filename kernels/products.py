"""Matrix products on the CPU, by the fastest routine for each that plain torch offers."""

# R = rows, K = inner width, C = columns; tensors of several matrices have one more dimension in front

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN_FROM = 1 << 20
"""Multiplications from which one product is left to oneDNN, as seen in float32. torch.mm asks MKL, which has AVX-512
for Intel alone: on an EPYC core 128 x 64 x 1024 took 170 us there and 88 in oneDNN, whose calls start 10 us later."""
PIECE = 1024
"""Rows of a product of tokens and a weight that are made at once, and used while they are in the cache: 16,484 tokens
by 256 x 1024 and SiLU took 84 ms on two cores of an EPYC at once, by MKL, and 33 in pieces, by oneDNN."""
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether bfloat16 is multiplied faster than float32 where x is; older processors emulate it."""
    has = torch.cpu.get_capabilities() if x.is_cpu else {"amx_bf16": True}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def product(a_RK: Tensor, b_KC: Tensor) -> Tensor:
    """`[R, C]` in the dtype of a."""
    if _worth_onednn(a_RK, b_KC):
        return torch.ops.mkldnn._linear_pointwise(a_RK, b_KC.mT, None, "none", [], "")
    return torch.mm(a_RK, b_KC) if a_RK.dim() == 2 else torch.bmm(a_RK, b_KC)


def linear_pieces(x_RK: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """`x W^T + b` in pieces: some rows, and their `[., C]`, which the caller may change."""
    step = PIECE if x_RK.is_cpu else max(len(x_RK), 1)
    for start in range(0, len(x_RK), step):
        rows = slice(start, min(start + step, len(x_RK)))
        piece_RK = x_RK[rows]
        if _worth_onednn(piece_RK, weight_CK.mT):
            yield rows, torch.ops.mkldnn._linear_pointwise(piece_RK, weight_CK, bias_C, "none", [], "")
        else:
            yield rows, F.linear(piece_RK, weight_CK, bias_C)


def weight_gradient(dy_RC: Tensor, x_RK: Tensor) -> Tensor:
    """`dy^T x`, `[C, K]`, of a product with a weight."""
    # oneDNN is faster with the narrower of the two on the left: 26 ms for 1024 x 16,484 x 256, else 72.
    if dy_RC.shape[1] <= x_RK.shape[1]:
        return product(dy_RC.mT, x_RK)
    return product(x_RK.mT, dy_RC).mT.contiguous()


def add_product(sum_RC: Tensor | None, a_RK: Tensor, b_KC: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum, of this dtype, with a @ b added to it; the product alone if there is none yet."""
    if sum_RC is None:
        return product(a_RK, b_KC).to(dtype)
    add_product_(sum_RC, a_RK, b_KC)
    return sum_RC


def add_product_(sum_RC: Tensor, a_RK: Tensor, b_KC: Tensor) -> None:
    """Add a @ b, in place, to a sum that may be of a wider dtype."""
    if sum_RC.stride(-1) != 1 and sum_RC.stride(-2) == 1:
        sum_RC, a_RK, b_KC = sum_RC.mT, b_KC.mT, a_RK.mT
    if sum_RC.dim() == 3 and sum_RC.dtype is a_RK.dtype and sum_RC.is_contiguous():
        # Of a part of a larger tensor baddbmm_ would go through the matrices one by one.
        sum_RC.baddbmm_(a_RK, b_KC)
    else:
        sum_RC.add_(product(a_RK, b_KC))


def transposed(x_RC: Tensor) -> Tensor:
    """`[C, R]` as the left operand of a product."""
    # oneDNN wants it dense: its own copy took twice as long as this one.
    return x_RC.mT.contiguous() if x_RC.dim() == 2 else x_RC.mT


def _worth_onednn(a_RK: Tensor, b_KC: Tensor) -> bool:
    return (
        a_RK.dtype is torch.float32
        and a_RK.dim() == 2
        and a_RK.numel() * b_KC.shape[1] >= ONEDNN_FROM
        and a_RK.is_cpu
        and _is_dense(a_RK)
        and _is_dense(b_KC)
        and HAS_ONEDNN
    )


def _is_dense(x: Tensor) -> bool:
    """Whether nothing lies between the rows, or columns: otherwise oneDNN falls back to code 500 times slower."""
    return x.is_contiguous() or x.stride() == (1, x.shape[0])
