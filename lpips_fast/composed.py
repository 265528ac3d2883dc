"""The formulas in plain torch: the oracle of every kernel, and the path of devices without one.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
equation 1. Everything here is differentiable as often as wanted, and finite in its first
derivative on zero vectors, where the square root alone would give NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-10


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, weights and distances for features of ``dtype``.

    ``eps`` would vanish and squares would overflow in half precision, so that everything but the
    features themselves is float32 (float64 for float64).
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize_tensor(in_feat: Tensor, eps: float = EPS) -> Tensor:
    """Channel-L2 normalisation: every position's channel vector over (its norm + ``eps``).

    Args:
        in_feat: features of shape (N, C, H, W).
        eps: added to the norm, so that a zero vector stays zero.

    Returns:
        A tensor like ``in_feat``. Where the vector is zero the norm's derivative is taken to be 0
        (the original's is NaN).

    >>> normalize_tensor(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)).flatten()
    tensor([0.6000, 0.8000])
    """
    squared = torch.sum(in_feat**2, dim=1, keepdim=True)
    # Two wheres: the inner keeps sqrt away from 0, where its derivative is infinite and would
    # turn into NaN when the outer multiplies it by 0.
    is_zero = squared == 0
    norm = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).sqrt())
    return in_feat / (norm + eps)


def distance_map(feat0: Tensor, feat1: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """One layer's distance at every position.

    Args:
        feat0, feat1: features of shape (N, C, H, W), any floating dtype.
        weight: weight per channel, shape (C,).

    Returns:
        ``sum_c weight_c (a_c - b_c)^2`` of the normalised features, shape (N, 1, H, W), in the
        accumulator's dtype.
    """
    dtype = accumulator_dtype(feat0.dtype)
    difference = normalize_tensor(feat0.to(dtype), eps) - normalize_tensor(feat1.to(dtype), eps)
    return torch.sum(weight.view(1, -1, 1, 1) * difference**2, dim=1, keepdim=True)


def distance(
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float = EPS,
) -> Tensor:
    """Every layer's distance, averaged over positions: shape (N, L)."""
    maps = [distance_map(a, b, w, eps) for a, b, w in zip(feats0, feats1, weights, strict=True)]
    return torch.stack([m.mean(dim=(1, 2, 3)) for m in maps], dim=1)
