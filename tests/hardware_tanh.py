"""By how much the hyperbolic tangent of NVIDIA's special function unit can move results of the attention.

`tanh.approx.f32` has a relative error of at most 2^-11 (PTX ISA), which plain torch does not make. With h = s / 2 and
t = tanh(h), silu(s) = h + h t moves by at most |h t| 2^-11, and its derivative (1 + t + silu (1 - t)) / 2 by
|t (1 - 2 h t)| / 2 times as much. Sums of both over all scores, as if every error had the worst sign, are the shares.
"""

# T = events of all sequences, H = heads, D = head width, n = events of one sequence (t queries, s keys)

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from ultrarec.kernels import RelativeBias
from ultrarec.kernels.hstu_attention import reference

if TYPE_CHECKING:
    from attention_cases import Case

RELATIVE_ERROR = 2.0**-11


def is_used(case: Case, backend: str) -> bool:
    """Whether a case runs kernels that ask the hardware for it."""
    return backend == "triton" and case.device == "cuda" and not torch.version.hip and case.dtype != torch.float32


def shares_of(
    case: Case,
    inputs: dict[str, torch.Tensor],
    dout: torch.Tensor,
    *,
    num_targets: torch.Tensor | None,
    bias: RelativeBias | None,
) -> dict[str, float]:
    """The largest possible error of the output and each gradient, in float64; inputs in float64, with gradients."""
    q, k, v = (inputs[name].detach() for name in "qkv")
    number = {"number": 0.01}.get(case.scale, 1 / case.max_seq_len)
    scale = (inputs["scale"] if "scale" in inputs else torch.full_like(q[:, 0, 0], number)).detach().abs()
    alpha = case.dqk**-0.5 if case.alpha is None else case.alpha
    errors = {"out": torch.zeros_like(v), "dscale": torch.zeros_like(scale)}
    errors |= {f"d{name}": torch.zeros_like(x) for name, x in inputs.items()}
    bounds = pairwise(accumulate(case.lengths, initial=0))
    for b, (start, end) in enumerate(bounds):
        at, position = slice(start, end), torch.arange(end - start, device=q.device)
        history_end = case.mask.history_end(end - start, 0 if num_targets is None else int(num_targets[b]))
        visible = case.mask.visible(
            position[:, None], position[None, :], torch.tensor(history_end, device=q.device)
        ).double()
        bias_ts = None if bias is None else reference._bias(bias, start, end, case.max_seq_len)
        scores = alpha * torch.einsum("thd,shd->hts", q[at], k[at]) + (0 if bias_ts is None else bias_ts.detach())
        h, t = scores / 2, torch.tanh(scores / 2)
        silu_error = (h * t).abs() * visible * RELATIVE_ERROR
        slope_error = (t * (1 - 2 * h * t)).abs() / 2 * visible * RELATIVE_ERROR
        products = torch.einsum("thd,shd->hts", dout[at], v[at]).abs()
        score_error = scale[at, None] * products * slope_error
        errors["out"][at] = torch.einsum("hts,shd->thd", scale[at, None] * silu_error, v[at].abs())
        errors["dv"][at] = torch.einsum("hts,thd->shd", scale[at, None] * silu_error, dout[at].abs())
        errors["dq"][at] = alpha * torch.einsum("hts,shd->thd", score_error, k[at].abs())
        errors["dk"][at] = alpha * torch.einsum("hts,thd->shd", score_error, q[at].abs())
        errors["dscale"][at] = (products * silu_error).sum((0, 2))
        names = [name for name in ("position_weight", "time_weight") if name in inputs]
        if bias_ts is not None and end > start:
            sums = torch.autograd.grad(bias_ts, [inputs[name] for name in names], score_error.sum(0))
            for name, sum_of_errors in zip(names, sums, strict=True):
                errors[f"d{name}"] += sum_of_errors
    return {name: error.max().item() for name, error in errors.items() if error.numel()}
