"""The fused operations of ultrarec: each has its definition, and an implementation per kind of device."""

from .dropout import new_seed
from .gated_output import gated_output
from .hstu_attention import AttentionMask, RelativeBias, hstu_attention
from .jagged import jagged_concat, jagged_split
from .norm_uvqk import norm_uvqk

__all__ = [
    "AttentionMask",
    "RelativeBias",
    "gated_output",
    "hstu_attention",
    "jagged_concat",
    "jagged_split",
    "new_seed",
    "norm_uvqk",
]
