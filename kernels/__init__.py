"""The fused operations of ultrarec: each has its definition, and an implementation per kind of device."""

from .hstu_attention import AttentionMask, RelativeBias, hstu_attention

__all__ = ["AttentionMask", "RelativeBias", "hstu_attention"]
