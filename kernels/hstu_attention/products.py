"""Matrix products of tiles, by the fastest routine for each that plain torch offers."""

# M = matrices, R = rows, K = inner width, C = columns

import torch
from torch import Tensor

ONEDNN_FROM = 1 << 20
"""Multiplications from which one float32 product is left to oneDNN. torch.mm asks MKL, which has AVX-512 for Intel
alone: on an EPYC core 128 x 64 x 1024 took 170 us there and 88 in oneDNN, whose calls start 10 us later."""


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether bfloat16 is multiplied faster than float32 where x is; older processors emulate it."""
    has = torch.cpu.get_capabilities() if x.is_cpu else {"amx_bf16": True}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def product(a_MRK: Tensor, b_MKC: Tensor) -> Tensor:
    """`[M, R, C]` in the dtype of a."""
    if _worth_onednn(a_MRK, b_MKC):
        return torch.ops.mkldnn._linear_pointwise(a_MRK[0], b_MKC[0].mT, None, "none", [], "")[None]
    return torch.bmm(a_MRK, b_MKC)


def add_product_(sum_MRC: Tensor, a_MRK: Tensor, b_MKC: Tensor) -> None:
    """Add a @ b, in place, to a sum that may be of a wider dtype."""
    if sum_MRC.dtype is a_MRK.dtype and not _worth_onednn(a_MRK, b_MKC):
        sum_MRC.baddbmm_(a_MRK, b_MKC)
    else:
        sum_MRC.add_(product(a_MRK, b_MKC))


def _worth_onednn(a_MRK: Tensor, b_MKC: Tensor) -> bool:
    num_matrices, num_rows, width = a_MRK.shape
    return (
        num_matrices == 1
        and num_rows * width * b_MKC.shape[2] >= ONEDNN_FROM
        and a_MRK.dtype is torch.float32
        and a_MRK.is_cpu
        and _is_dense(a_MRK[0])
        and _is_dense(b_MKC[0])
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def _is_dense(x: Tensor) -> bool:
    """Whether nothing lies between the rows, or columns: otherwise oneDNN falls back to code 500 times slower."""
    return x.is_contiguous() or x.mT.is_contiguous()
