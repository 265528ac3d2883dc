"""Maps over positions: their mean, and their way to the images' resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def spatial_average(in_tens: Tensor, keepdim: bool = True) -> Tensor:
    """Mean over positions: (N, C, H, W) to (N, C, 1, 1), or to (N, C) without ``keepdim``."""
    return in_tens.mean([2, 3], keepdim=keepdim)


def upsample(in_tens: Tensor, out_HW: tuple[int, int] = (64, 64)) -> Tensor:
    """Bilinear resize of (N, C, h, w) to (N, C, *out_HW), corners not aligned."""
    return F.interpolate(in_tens, size=tuple(out_HW), mode="bilinear", align_corners=False)
