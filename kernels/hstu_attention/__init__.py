"""HSTU attention over jagged sequences: the public function, which checks its inputs and chooses the implementation."""

# T = events of all sequences, B = sequences, H = heads, D = head width (Dqk of queries and keys, Dv of values)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .bias import RelativeBias
from .inputs import check_attention, check_bias, check_scale
from .mask import AttentionMask

__all__ = ["AttentionMask", "RelativeBias", "hstu_attention"]

CAUSAL = AttentionMask()


def _triton(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Imported when it is first asked for: Triton is for Linux only, and decides then whether to interpret kernels.
    from .triton import attention

    return attention(q, *args, **kwargs)


def _auto(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    fits_triton = q.dtype != torch.float64 and max(q.shape[2], v.shape[2]) <= 256
    return (_triton if q.is_cuda and fits_triton else cpu.attention)(q, k, v, *args, **kwargs)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "auto": _auto,
    "cpu": cpu.attention,
    "reference": reference.attention,
    "triton": _triton,
}


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seq_len: int,
    alpha: float | None = None,
    scale: float | Tensor | None = None,
    num_targets: Tensor | None = None,
    mask: AttentionMask = CAUSAL,
    bias: RelativeBias | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pointwise attention of HSTU (arXiv 2402.17152, section 3): SiLU in place of softmax, sequences jagged end to end.

    Within each sequence `out_i = sum over visible j of scale_i * silu(alpha * <q_i, k_j> + bias_ij) v_j`.

    Args:
        q: `[T, H, Dqk]`, float32, bfloat16 or float16 (float64 for checking gradients); strided views are fine.
        k: `[T, H, Dqk]`, same dtype.
        v: `[T, H, Dv]`, same dtype.
        offsets: `[B + 1]`, int32 or int64, from 0 to T: sequence b is the events `offsets[b]` up to `offsets[b + 1]`,
            of which there may be none.
        max_seq_len: N, no sequence is longer; nothing of that size is padded or allocated.
        alpha: factor of the scores; `1 / sqrt(Dqk)` unless given.
        scale: factor of the attention weights, a number or one per query event `[T]`; `1 / max_seq_len` unless given.
        num_targets: `[B]`, int32 or int64: how many events at the end of each sequence are candidates, which see the
            history and themselves but not each other; none unless given.
        mask: which keys a query sees; causal unless given.
        bias: position and time bias added to the scores.
        backend: "triton" is for GPUs (and for CPUs with TRITON_INTERPRET=1, to test it), "cpu" the blocked
            implementation in plain torch, "reference" the definition, "auto" the fastest for the device.

    Returns:
        `[T, H, Dv]` in the dtype of v; differentiable in q, k, v, the weights of the bias, and scale if it is a tensor.

    Raises:
        ValueError: a shape, dtype, device or value breaks the rules above, or the backend is unknown. "triton" does
            not wait for a GPU to read offsets and num_targets: wrong ones end in a device-side assertion there.
    """
    if backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend={backend!r}; choose one of {sorted(IMPLEMENTATIONS)}")
    check_attention(q, k, v, offsets, num_targets=num_targets, max_seq_len=max_seq_len)
    if bias is not None:
        check_bias(bias, q=q, max_seq_len=max_seq_len)
    if isinstance(scale, Tensor):
        check_scale(scale, q=q)
    else:
        value = 1.0 / max_seq_len if scale is None else scale
        dtype = torch.promote_types(q.dtype, torch.float32)
        # Expanded, so that implementations can tell by the stride that it is the same for all queries.
        scale = torch.full((1,), value, dtype=dtype, device=q.device).expand(q.shape[0])
    # An implementation computes in the dtype of q, k, v; autocast would cast some of its matrices and not others.
    with torch.autocast(q.device.type, enabled=False):
        return IMPLEMENTATIONS[backend](
            q,
            k,
            v,
            offsets,
            max_seq_len=max_seq_len,
            alpha=q.shape[2] ** -0.5 if alpha is None else alpha,
            scale=scale,
            num_targets=num_targets,
            mask=mask,
            bias=bias,
        )
