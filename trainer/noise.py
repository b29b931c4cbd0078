"""Keeps messages of libraries that say nothing to a user out of a run's output."""

from __future__ import annotations

import logging
import warnings

# Deprecations between torch, torchrec and fbgemm of one tested set of versions; nothing a user could change.
_INTERNAL = (
    r".*`broadcast_buffers` is deprecated.*",
    r".*Please use DTensor instead.*",
    r".*torch\.distributed\.checkpoint.*",
    r".*`torch\.jit\..*` is deprecated.*",
)


def silence() -> None:
    """Call before the first import of torchrec."""
    for message in _INTERNAL:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
