"""Queries that see themselves and so many keys before, in loops over blocks that never return to Python.

Strips of a window, or of a sequence of a thousand events, are small: two threads that call an operator on each from
Python were a tenth to a fifth slower, as each return waits for the interpreter that the other holds. TorchScript runs
the loop without it.
"""

# L = length of the sequence, D = head width, R = queries of a block, C = keys that some of them see

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import HAS_ONEDNN, ONEDNN_FROM, multiplies_bfloat16
from .mask import AttentionMask
from .operator import Problem

BLOCK = 128
"""R: of 128 queries by 384 keys, scores, weights and gradients fill half of an EPYC core's second cache."""
MOST_KEYS = 4096
"""That a block sees. Strips are large enough for more."""


@dataclass(frozen=True)
class Band:
    """The first queries of a sequence, each of which sees itself and the `window` keys before; without one, all."""

    num_queries: int
    """Whole blocks."""
    window: int


def band_of(mask: AttentionMask, history_end: int) -> Band | None:
    """The band of a sequence; None if there is none, or strips are large enough."""
    window = mask.window or history_end
    num_blocks = (history_end - (mask.full_tail if mask.window else 0)) // BLOCK
    if window > MOST_KEYS or num_blocks < 1 or mask.prefix or mask.num_contextual:
        return None
    return Band(num_blocks * BLOCK, window)


def multiplies_blocks(band: Band, problem: Problem) -> bool:
    """Whether oneDNN multiplies blocks of the problem, and scores are its products and nothing else."""
    dtype = problem.q.dtype
    is_fast = dtype is torch.float32 or (dtype is torch.bfloat16 and multiplies_bfloat16(problem.q))
    width = min(problem.q.shape[2], problem.v.shape[2])
    is_worth_it = BLOCK * (BLOCK + band.window) * width >= ONEDNN_FROM
    return HAS_ONEDNN and problem.q.is_cpu and is_fast and problem.bias is None and is_worth_it


def attend(band: Band, q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, scale_L1: Tensor, out_LD: Tensor) -> None:
    """Write the output of the band's queries; keys, times alpha, and values are dense."""
    with torch.no_grad():
        _attend(q_LD, k_LD, v_LD, scale_L1, out_LD, band.num_queries, band.window, BLOCK)


def differentiate(
    band: Band,
    *,
    q_LD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    dout_LD: Tensor,
    scale_L1: Tensor,
    dq_LD: Tensor,
    dk_DL: Tensor,
    dv_DL: Tensor,
) -> None:
    """Write the gradients of the band's queries, and add to those of keys, without alpha, and values what they
    contribute; keys, times alpha, and values are dense.
    """
    with torch.no_grad():
        _differentiate(q_LD, k_LD, v_LD, dout_LD, scale_L1, dq_LD, dk_DL, dv_DL, band.num_queries, band.window, BLOCK)


def _scripted(function: Any) -> Any:
    with warnings.catch_warnings():
        # torch would have it compiled instead, which takes a C++ compiler where the program runs.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def _product_loop(a_RK: Tensor, b_CK: Tensor) -> Tensor:
    """`[R, C]`, a times the transpose of b."""
    return torch.ops.mkldnn._linear_pointwise(a_RK, b_CK, None, "none", [], "")


_product = _scripted(_product_loop)


def _attend_loop(
    q_LD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    scale_L1: Tensor,
    out_LD: Tensor,
    num_queries: int,
    window: int,
    block: int,
) -> None:
    for start in range(0, num_queries, block):
        first, stop = max(start - window, 0) // 16 * 16, start + block
        scores_RC = _product(q_LD[start:stop].contiguous(), k_LD[first:stop])
        # These write zeros, whatever was there: a product with zero would let NaN through.
        weights_RC = F.silu(scores_RC, inplace=True).tril_(start - first).triu_(start - first - window)
        torch.mul(_product(weights_RC, v_LD[first:stop].t()), scale_L1[start:stop], out=out_LD[start:stop])


def _differentiate_loop(
    q_LD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    dout_LD: Tensor,
    scale_L1: Tensor,
    dq_LD: Tensor,
    dk_DL: Tensor,
    dv_DL: Tensor,
    num_queries: int,
    window: int,
    block: int,
) -> None:
    for start in range(0, num_queries, block):
        first, stop = max(start - window, 0) // 16 * 16, start + block
        q_RD, dout_RD = q_LD[start:stop].contiguous(), (dout_LD[start:stop] * scale_L1[start:stop]).to(q_LD.dtype)
        k_CD, v_CD = k_LD[first:stop], v_LD[first:stop]
        scores_RC = _product(q_RD, k_CD).tril_(start - first).triu_(start - first - window)
        dweights_RC = _product(dout_RD, v_CD).tril_(start - first).triu_(start - first - window)
        dv_DL[:, first:stop].add_(_product(dout_RD.t().contiguous(), F.silu(scores_RC).t()))
        dscores_RC = torch.ops.aten.silu_backward(dweights_RC, scores_RC)
        dk_DL[:, first:stop].add_(_product(q_RD.t().contiguous(), dscores_RC.t()))
        dq_LD[start:stop].copy_(_product(dscores_RC, k_CD.t()))


_attend, _differentiate = _scripted(_attend_loop), _scripted(_differentiate_loop)
