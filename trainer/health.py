"""Stops a run before numbers that went wrong reach weights that no later step could mend."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """A loss or a gradient became infinite or NaN."""


def require_finite(value: Tensor, name: str) -> None:
    """Stop before the update if a scalar is not finite.

    Raises:
        NotFiniteError: on the CPU. On CUDA the device stops instead, since asking it would stop the host in every step.
    """
    message = (
        f"{name} is not finite; stopped before the update. Lower optimizer.lr or embeddings.optimizer.lr, "
        "set optimizer.clip_norm, or look for broken values in the data"
    )
    if value.device.type == "cuda":
        torch._assert_async(torch.isfinite(value), message)
    elif not torch.isfinite(value):
        raise NotFiniteError(message)
