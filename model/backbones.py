"""What can stand between input tokens and head: one interface, and the table of its implementations."""

from torch import nn

from .config import ModelConfig
from .fuxi import FuXiAlpha
from .hstu import HSTUStack
from .mixture import Mixture
from .sequences import Limits
from .target_attention import DIN, STCA
from .transformer import Llama, SASRec

BACKBONES: dict[str, type[nn.Module]] = {
    "din": DIN,
    "fuxi_alpha": FuXiAlpha,
    "hstu": HSTUStack,
    "llama": Llama,
    "sasrec": SASRec,
    "stca": STCA,
}
"""Each is built from its settings and `Limits`, is called with tokens `[S, E]` and their `Sequences`, and gives tokens
of that shape, or, where `Limits` says that the head reads no others, those of the targets `[M, E]`, in order. A token
sees earlier ones of its own sequence; targets see the history and not each other.
"""
TARGET_ONLY = ("din", "stca")
"""Backbones that encode targets alone: they give no other tokens, whatever `Limits` says."""


def build_backbone(config: ModelConfig, limits: Limits) -> nn.Module:
    """The backbone of a recipe for sequences within these limits.

    Raises ValueError where `model.channels` names an action that the dataset does not have.
    """
    if config.channels:
        return Mixture(config, limits)
    return BACKBONES[config.backbone](config, limits)
