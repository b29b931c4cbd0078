"""The fused operations of ultrarec: each has its definition, and an implementation per kind of device."""

from .dropout import new_seed
from .gated_output import gated_output
from .hstu_attention import AttentionMask, RelativeBias, hstu_attention
from .jagged import jagged_concat, jagged_split
from .norm_uvqk import norm_uvqk
from .position_time_encoding import elapsed_buckets, elapsed_thresholds, position_time_encoding

__all__ = [
    "AttentionMask",
    "RelativeBias",
    "elapsed_buckets",
    "elapsed_thresholds",
    "gated_output",
    "hstu_attention",
    "jagged_concat",
    "jagged_split",
    "new_seed",
    "norm_uvqk",
    "position_time_encoding",
]
