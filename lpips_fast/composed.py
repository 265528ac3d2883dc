"""The formulas in plain torch: the oracle of every kernel, and the path of devices without one.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
equation 1. Everything here is differentiable as often as wanted, and finite in its first
derivative on zero vectors, where the square root alone would give NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .normalization import (
    EPS,
    Normalization,
    accumulator_dtype,
    normalize_features,
    normalize_tensor,
)

__all__ = ["EPS", "accumulator_dtype", "distance", "distance_map", "normalize_tensor"]


def distance_map(
    feat0: Tensor,
    feat1: Tensor,
    weight: Tensor,
    eps: float = EPS,
    normalization: Normalization = "l2",
) -> Tensor:
    """One layer's distance at every position.

    Args:
        feat0, feat1: features of shape (N, C, H, W), any floating dtype.
        weight: weight per channel, shape (C,).
        eps: added to the divisor of the normalisation.
        normalization: see :mod:`lpips_fast.normalization`.

    Returns:
        ``sum_c weight_c (a_c - b_c)^2`` of the normalised features, shape (N, 1, H, W), in the
        accumulator's dtype.
    """
    normal0, normal1 = (normalize_features(f, normalization, eps) for f in (feat0, feat1))
    difference = normal0 - normal1
    return torch.sum(weight.view(1, -1, 1, 1) * difference**2, dim=1, keepdim=True)


def distance(
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float = EPS,
    normalization: Normalization = "l2",
    position_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Every layer's distance, averaged over positions: shape (N, L).

    Args:
        position_weights: of every layer, (N or 1, 1, H, W), by which its map is multiplied.
    """
    maps = [
        distance_map(a, b, w, eps, normalization)
        for a, b, w in zip(feats0, feats1, weights, strict=True)
    ]
    if position_weights is not None:
        maps = [m * p for m, p in zip(maps, position_weights, strict=True)]
    return torch.stack([m.mean(dim=(1, 2, 3)) for m in maps], dim=1)
