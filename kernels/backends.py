"""Which implementation of an operation runs, and in which dtype its products are computed."""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "cpu", "triton", "reference")


def backend_for(x: Tensor, backend: str) -> str:
    """The implementation that a user's choice means for a tensor; ValueError unless it is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; choose one of {sorted(BACKENDS)}")
    if backend == "auto":
        return "triton" if x.is_cuda and x.dtype != torch.float64 else "cpu"
    if backend == "triton":
        _check_triton(x)
    return backend


def _check_triton(x: Tensor) -> None:
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
