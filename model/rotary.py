"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys turned by an angle that grows with position."""

# S = tokens of all sequences, H = heads, D = head width

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(x_SHD: Tensor, positions_S: Tensor) -> Tensor:
    """Turn the pairs of columns (d, d + D/2) by position * BASE^(-2 d / D), so that <q, k> knows distances only."""
    half = x_SHD.shape[2] // 2
    exponents = torch.arange(half, device=x_SHD.device, dtype=torch.float64) / half
    # Angles in float64: of a position in the thousands, float32 leaves the fast columns four digits.
    angles = positions_S.double()[:, None, None] * BASE**-exponents
    cos, sin = angles.cos().to(x_SHD.dtype), angles.sin().to(x_SHD.dtype)
    a, b = torch.split(x_SHD, half, dim=2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=2)
