"""The fused operations of ultrarec: each has one definition in plain torch and one implementation per kind of device."""

from .hstu_attention import AttentionMask, RelativeBias, hstu_attention

__all__ = ["AttentionMask", "RelativeBias", "hstu_attention"]
