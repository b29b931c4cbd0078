"""Selective rematerialisation (ULTRA-HSTU, arXiv 2602.16986): forget what is cheap to compute again."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = ("ultrarec::hstu_attention", "ultrarec::gated_output")
"""Operators whose outputs outlive the forward pass, and which therefore run once: the attention, whatever implements
it, and the end of a layer, whose output is the next layer's input."""


def rematerialized(layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`layer(*inputs)`, which keeps its inputs and the outputs of KEPT only, and runs the rest again in the backward.

    The layer must draw no random numbers: it would not draw them again.
    """
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = operator.name().startswith(KEPT)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
