"""Stateless functions on features: the fused distance, averaged or as maps.

They take the features of any network, not only LPIPS's trunks: one tensor (N, C, H, W) a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import composed, kernels
from .inputs import warn_of_features
from .normalization import (
    EPS,
    Normalization,
    check_normalization,
    normalize_features,
    normalize_tensor,
)

__all__ = ["EPS", "distance", "distance_map", "normalize_features", "normalize_tensor"]

_FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(feats0: Sequence[Tensor], feats1: Sequence[Tensor]) -> None:
    if len(feats0) == 0:
        raise ValueError("expected the features of at least one layer, got none")
    if len(feats0) != len(feats1):
        raise ValueError(
            f"the two images have features of different numbers of layers, "
            f"{len(feats0)} and {len(feats1)}"
        )
    for layer, (a, b) in enumerate(zip(feats0, feats1)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            raise TypeError(
                f"layer {layer}: expected two torch.Tensor of shape (N, C, H, W), "
                f"got {type(a).__name__} and {type(b).__name__}"
            )
        if a.dim() != 4 or a.shape != b.shape:
            raise ValueError(
                f"layer {layer}: expected two features of one shape (N, C, H, W), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.dtype != b.dtype or a.dtype not in _FEATURE_DTYPES:
            raise TypeError(
                f"layer {layer}: expected two features of one dtype among float32, float64, "
                f"float16 and bfloat16, got {a.dtype} and {b.dtype}; convert one with .to()"
            )
        if a.device != b.device:
            raise ValueError(
                f"layer {layer}: the two features are on different devices, {a.device} and "
                f"{b.device}; move one with .to()"
            )


def _look(feats0: Sequence[Tensor], feats1: Sequence[Tensor]) -> None:
    for name, feats in (("feats0", feats0), ("feats1", feats1)):
        warn_of_features(name, feats)


def _layer_weights(
    feats: Sequence[Tensor], weights: Sequence[Tensor | None] | None
) -> list[Tensor]:
    if weights is None:
        weights = [None] * len(feats)
    if len(weights) != len(feats):
        raise ValueError(f"expected {len(feats)} weights, one per layer, got {len(weights)}")
    result = []
    for layer, (feat, weight) in enumerate(zip(feats, weights)):
        dtype = composed.accumulator_dtype(feat.dtype)
        if weight is None:
            weight = torch.ones(feat.shape[1], dtype=dtype, device=feat.device)
        elif weight.numel() != feat.shape[1]:
            raise ValueError(
                f"layer {layer}: expected {feat.shape[1]} weights, one per channel, "
                f"got shape {tuple(weight.shape)}"
            )
        if weight.dim() != 1 or weight.dtype != dtype or weight.device != feat.device:
            weight = weight.reshape(-1).to(device=feat.device, dtype=dtype)
        result.append(weight)
    return result


def _per_position(feats: Sequence[Tensor], position_weights: Sequence[Tensor]) -> list[Tensor]:
    if len(position_weights) != len(feats):
        raise ValueError(
            f"expected position weights for {len(feats)} layers, got {len(position_weights)}"
        )
    for layer, (feat, weight) in enumerate(zip(feats, position_weights)):
        expected = (1, *feat.shape[2:])
        if tuple(weight.shape[1:]) != expected or weight.shape[0] not in (1, feat.shape[0]):
            raise ValueError(
                f"layer {layer}: expected position weights ({feat.shape[0]} or 1, 1, "
                f"{feat.shape[2]}, {feat.shape[3]}), got {tuple(weight.shape)}"
            )
    return [
        weight.to(device=feat.device, dtype=composed.accumulator_dtype(feat.dtype))
        for feat, weight in zip(feats, position_weights)
    ]


def _is_fused(normalization: Normalization, feats: Sequence[Tensor]) -> bool:
    if check_normalization(normalization) != "l2" or kernels.has_tangents():
        return False
    return kernels.has_kernel(feats[0].device)


def distance(
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    eps: float = EPS,
    *,
    normalization: Normalization = "l2",
    check_inputs: bool = False,
    position_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Distance per image and layer, averaged over positions, in one pass over the features.

    Args:
        feats0, feats1: features per layer, each (N, C_l, H_l, W_l), float32, float64, float16 or
            bfloat16, in channels-last (fastest) or contiguous order; other strides are copied.
        weights: weight per channel and layer, C_l elements each; ``None`` stands for ones (the
            baseline of the paper). They are taken to the accumulator's dtype.
        eps: added to the norm, in the accumulator's dtype.
        normalization: of the features, see :mod:`lpips_fast.normalization`. The kernels know
            ``'l2'``; the others are composed of torch's operators, slower and with more memory.
        check_inputs: look at the values and warn of NaN and infinity, naming the first layer that
            holds some. It costs a synchronisation on GPUs; everything else is checked without one.
        position_weights: weight per position and layer, (N or 1, 1, H_l, W_l), by which the
            distance there is multiplied before the mean. With weights whose mean is 1 that is a
            weighted average; masks are made such by :class:`lpips_fast.comparison.masks.Mask`.
            They are taken to the accumulator's dtype.

    Returns:
        (N, L), float32 (float64 for float64 features): per layer
        ``mean_hw sum_c w_c (a_c - b_c)^2`` of the normalised features. LPIPS is its
        sum over layers. Deterministic, exactly 0 for identical features, symmetric to the bit.

    Raises:
        ValueError: layers, shapes or devices that do not match, or an unknown normalisation.
        TypeError: dtypes that differ or are not supported.

    >>> a, b = torch.rand(2, 64, 8, 8), torch.rand(2, 64, 8, 8)
    >>> distance([a], [b]).shape
    torch.Size([2, 1])
    """
    _check(feats0, feats1)
    if check_inputs:
        _look(feats0, feats1)
    per_layer = _layer_weights(feats0, weights)
    if position_weights is not None:
        position_weights = _per_position(feats0, position_weights)
    if not _is_fused(normalization, feats0):
        return composed.distance(feats0, feats1, per_layer, eps, normalization, position_weights)
    return kernels.fused_distance(list(feats0), list(feats1), per_layer, eps, position_weights)


def distance_map(
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    eps: float = EPS,
    *,
    normalization: Normalization = "l2",
    check_inputs: bool = False,
) -> list[Tensor]:
    """Distance per position: one map (N, 1, H_l, W_l) a layer, at the layer's resolution.

    Arguments and errors are those of :func:`distance`, whose result is the mean of these maps.

    >>> a, b = torch.rand(2, 64, 8, 8), torch.rand(2, 64, 8, 8)
    >>> [m.shape for m in distance_map([a], [b])]
    [torch.Size([2, 1, 8, 8])]
    """
    _check(feats0, feats1)
    if check_inputs:
        _look(feats0, feats1)
    per_layer = _layer_weights(feats0, weights)
    if not _is_fused(normalization, feats0):
        return [
            composed.distance_map(a, b, w, eps, normalization)
            for a, b, w in zip(feats0, feats1, per_layer)
        ]
    with kernels.below_autograd(*feats0, *feats1, *per_layer):
        return torch.ops.lpips_fast.distance_map(list(feats0), list(feats1), per_layer, eps)
