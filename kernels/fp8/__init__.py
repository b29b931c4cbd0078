"""Products of matrices in FP8 (e4m3), each row with a scale of its own; what the CPU and the definitions use.

The recipe of the released HSTU models, which ULTRA-HSTU (arXiv 2602.16986) trains the two projections of a layer with:
operands in FP8, sums in float32, and a backward that takes the operands as they were.
"""

# T = tokens, K = columns of a token, N = rows of a weight

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0
"""Of e4m3."""
SMALLEST_ROW = 1e-12
"""A row whose largest element is below this is scaled as if that were this: zeros stay zeros."""
NATIVE_SINCE = (8, 9)
"""NVIDIA's compute capability whose tensor cores read e4m3."""
NATIVE_AMD = ("gfx95", "gfx12")
"""Beginnings of AMD's architectures that do. gfx942 reads e4m3fnuz, another format under the same name."""


def quantize(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3, `[T, K]`, of which each row has been divided by its scale `[T, 1]`: its largest element over 448.

    An element errs by at most 2^-4 of itself, or of 2^-9 of the scale where that is more.
    """
    wide_TK = x_TK.to(torch.promote_types(x_TK.dtype, torch.float32))
    scale_T1 = wide_TK.abs().amax(1, keepdim=True).clamp(min=SMALLEST_ROW) / LARGEST
    return (wide_TK / scale_T1).to(torch.float8_e4m3fn), scale_T1


def multiply(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T of both in e4m3, `[T, N]` in float32 (float64 for float64)."""
    (x_TK, scale_T1), (weight_NK, scale_N1) = quantize(x_TK), quantize(weight_NK)
    return (x_TK.to(scale_T1.dtype) @ weight_NK.to(scale_N1.dtype).t()) * scale_T1 * scale_N1.t()


def linear_for_autograd(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b of x and W in e4m3, with the gradients of x W^T + b."""
    plain_TN = F.linear(x_TK, weight_NK, bias_N)
    with torch.no_grad():
        difference_TN = multiply(x_TK, weight_NK) - F.linear(x_TK, weight_NK)
    return plain_TN + difference_TN.to(plain_TN.dtype)


def check_native(device: torch.device) -> None:
    """Raise ValueError unless this GPU multiplies e4m3; CPUs emulate it."""
    if device.type == "cpu":
        return
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name, is_native = properties.gcnArchName, properties.gcnArchName.startswith(NATIVE_AMD)
    else:
        name = f"sm_{properties.major}{properties.minor}"
        is_native = (properties.major, properties.minor) >= NATIVE_SINCE
    if not is_native:
        raise ValueError(
            f"fp8=True on {properties.name} ({name}), which does not multiply e4m3; choose fp8=False "
            "(model.fp8_projections = false), or a GPU that does: sm_89 or later, gfx950, gfx12"
        )
