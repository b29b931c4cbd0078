"""Which implementation of an operation runs, and in which dtype its products are computed."""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "cpu", "triton", "reference")


WIDEST_NORM = 4096
"""Columns that Triton normalises together. Over 8192 the backward spilled 576 bytes on sm_90, and 2864 on sm_80."""


def backend_for(x: Tensor, backend: str, *, norm_width: int = 0) -> str:
    """The implementation that a user's choice means for a tensor, of which so many columns are normalised together.

    Raises:
        ValueError: it is not one of BACKENDS, or "triton" where that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; choose one of {sorted(BACKENDS)}")
    if backend == "auto":
        has_kernels = x.is_cuda and x.dtype != torch.float64 and norm_width <= WIDEST_NORM
        return "triton" if has_kernels else "cpu"
    if backend == "triton":
        _check_triton(x, norm_width)
    return backend


def _check_triton(x: Tensor, norm_width: int) -> None:
    if norm_width > WIDEST_NORM:
        raise ValueError(
            f"backend='triton' normalises at most {WIDEST_NORM} columns together, not {norm_width}; choose "
            "backend='cpu', plain torch for every device, as 'auto' does"
        )
    if x.dtype == torch.float64:
        raise ValueError("backend='triton' takes no float64; choose backend='cpu', which runs on every device")
    if x.device.type == "cpu" and not import_module("triton").knobs.runtime.interpret:
        raise ValueError(
            "backend='triton' got tensors on cpu; move them to a GPU, choose backend='cpu', or set TRITON_INTERPRET=1 "
            "before Python starts, which interprets the kernels, slowly"
        )


def implementation(package: str, backend: str) -> ModuleType:
    """The module `package.backend`; imported when first chosen."""
    return import_module(f"{package}.{backend}")


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with a weight: its own, or that of autocast where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def outside_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Where an implementation decides itself what is computed in which dtype."""
    device = x.device.type
    # Entering the context where it would change nothing took 25 us, a third of a small call.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
