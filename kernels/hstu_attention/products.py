"""Matrix products of tiles, by the fastest routine for each that plain torch offers."""

# M = matrices, R = rows, K = inner width, C = columns

import torch
from torch import Tensor

ONEDNN_FROM = 1 << 20
"""Multiplications from which one float32 product is left to oneDNN. torch.mm asks MKL, which has AVX-512 for Intel
alone: on an EPYC core 128 x 64 x 1024 took 170 us there and 88 in oneDNN, whose calls start 10 us later."""
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether bfloat16 is multiplied faster than float32 where x is; older processors emulate it."""
    has = torch.cpu.get_capabilities() if x.is_cpu else {"amx_bf16": True}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def product(a_MRK: Tensor, b_MKC: Tensor) -> Tensor:
    """`[M, R, C]` in the dtype of a."""
    return _onednn(a_MRK, b_MKC) if _worth_onednn(a_MRK, b_MKC) else torch.bmm(a_MRK, b_MKC)


def add_product_(sum_MRC: Tensor, a_MRK: Tensor, b_MKC: Tensor) -> None:
    """Add a @ b, in place, to a sum that may be of a wider dtype."""
    if sum_MRC.stride(2) != 1:
        sum_MRC, a_MRK, b_MKC = sum_MRC.mT, b_MKC.mT, a_MRK.mT
    if _worth_onednn(a_MRK, b_MKC):
        sum_MRC.add_(_onednn(a_MRK, b_MKC))
    elif sum_MRC.dtype is a_MRK.dtype and sum_MRC.is_contiguous():
        sum_MRC.baddbmm_(a_MRK, b_MKC)
    else:
        # baddbmm_ would go through the matrices of a part of a larger tensor one by one.
        sum_MRC.add_(torch.bmm(a_MRK, b_MKC))


def _onednn(a_MRK: Tensor, b_MKC: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MRK, b_MKC.mT[0], None, "none", [], "")


def _worth_onednn(a_MRK: Tensor, b_MKC: Tensor) -> bool:
    num_matrices, num_rows, width = a_MRK.shape
    return (
        num_matrices == 1
        and num_rows * width * b_MKC.shape[2] >= ONEDNN_FROM
        and a_MRK.dtype is torch.float32
        and a_MRK.is_cpu
        and _is_dense(a_MRK)
        and _is_dense(b_MKC)
        and HAS_ONEDNN
    )


def _is_dense(x: Tensor) -> bool:
    """Whether nothing lies between the rows, or columns: otherwise oneDNN falls back to code 500 times slower."""
    return x.is_contiguous() or x.mT.is_contiguous()
