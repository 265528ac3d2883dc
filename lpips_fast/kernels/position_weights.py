"""Weights of a layer's positions from a mask over pixels: fake kernel, no derivative, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import fake_kernel, flops, without_derivative


@fake_kernel("position_weights")
def _(
    mask: Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    return [mask.new_empty((mask.shape[0], 1, h, w), dtype=dtype) for h, w in zip(heights, widths)]


without_derivative("position_weights")


@flops("position_weights")
def _(mask: torch.Size, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype) -> int:
    # Of a pixel: its share of the sum, and of one cell, or two, of every grid.
    return 2 * (1 + len(heights)) * mask.numel()
