"""How features are normalised before they are compared: five formulas, and what they promise.

LPIPS divides the channel vector of every position by its Euclidean norm (``l2``; Zhang et al.,
CVPR 2018, section 3). The others answer what that choice is worth. All work on one position's
vector ``a`` of C channels, and all but ``none`` take it to a size of its own:

==========  ==========================================  ======================================
``l2``      ``a / (sqrt(sum_c a_c²) + eps)``            norm 1: directions are compared
``l1``      ``a / (sum_c |a_c| + eps)``                 sum of sizes 1: shares are compared
``max``     ``a / (max_c |a_c| + eps)``                 largest size 1
``std``     ``(a - mean_c a_c) / (deviation + eps)``    mean 0 and deviation 1 over channels;
                                                        the deviation divides by C
``none``    ``a``                                       as it is: what is brighter counts more
==========  ==========================================  ======================================

The published linear weights were learned with ``l2``. With another normalisation they are applied
to numbers of another size: distances of two normalisations share no unit, and only their order,
over the same pairs, can be compared.

What all five promise:

- A vector of zeros stays zero, and so does a vector of equal numbers under ``std``, which has no
  deviation. The derivative there is the true one, ``1 / eps`` times the numerator's: large, and
  finite. The derivative of ``|a_c|`` at 0 is taken to be 0, that of the maximum is shared equally
  by the channels that reach it, and that of a norm at a zero vector is 0.
- Sums are float32 for half precision, float64 for float64, and so is the result, so that ``eps``
  does not vanish and squares do not overflow. Gradients of float16 features are clamped to
  float16's range at vectors of equal numbers, zeros among them; elsewhere an overflow stays
  visible, which is what ``torch.amp.GradScaler`` looks for.
- Identical features become identical bits, whose distance is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "NORMALIZATIONS",
    "Normalization",
    "NormalizationKind",
    "accumulator_dtype",
    "channel_norms",
    "check_normalization",
    "cosine_distance_map",
    "normalize_features",
    "normalize_tensor",
    "scale_sensitivity",
]

Normalization = Literal["l2", "l1", "max", "none", "std"]

#: Added to every divisor, as in the original.
EPS = 1e-10

# A deviation below so many roundings of the largest channel is what the mean's own rounding leaves
# of equal numbers.
_ROUNDINGS = 16


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, weights and distances for features of ``dtype``.

    ``eps`` would vanish and squares would overflow in half precision, so that everything but the
    features themselves is float32 (float64 for float64).
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------- the formulas


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
    return in_feat / (_root(squared, squared == 0) + eps)


def _root(squared: Tensor, is_zero: Tensor) -> Tensor:
    """The square root, 0 with derivative 0 where ``is_zero``."""
    # Two wheres: the inner keeps sqrt away from 0, where its derivative is infinite and would
    # turn into NaN when the outer multiplies it by 0.
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).sqrt())


def _l1(features: Tensor, eps: float) -> Tensor:
    return features / (features.abs().sum(dim=1, keepdim=True) + eps)


def _max(features: Tensor, eps: float) -> Tensor:
    return features / (features.abs().amax(dim=1, keepdim=True) + eps)


def _std(features: Tensor, eps: float) -> Tensor:
    centred = features - features.mean(dim=1, keepdim=True)
    variance = torch.mean(centred**2, dim=1, keepdim=True)
    rounding = _ROUNDINGS * torch.finfo(features.dtype).eps
    largest = features.detach().abs().amax(dim=1, keepdim=True)
    is_flat = variance <= (rounding * largest) ** 2
    # Of equal numbers the mean's rounding would be left over and divided by eps. Its value goes,
    # its derivative stays.
    centred = torch.where(is_flat, centred - centred.detach(), centred)
    return centred / (_root(variance, is_flat) + eps)


def _none(features: Tensor, eps: float) -> Tensor:
    return features


@dataclass(frozen=True)
class NormalizationKind:
    """One way to normalise features.

    Attributes:
        name: as ``LPIPS(normalization=…)`` takes it.
        formula: for one position's channel vector ``a``; all sums are over channels.
        is_scale_invariant: whether a positive factor on an image's features leaves its distances
            as they are (but for ``eps``).
        apply: the formula, of (N, C, H, W) in the accumulator's dtype and ``eps``.
    """

    name: Normalization
    formula: str
    is_scale_invariant: bool
    apply: Callable[[Tensor, float], Tensor]


#: Every normalisation by name, the default first.
NORMALIZATIONS: Mapping[str, NormalizationKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            NormalizationKind("l2", "a / (sqrt(sum a²) + eps)", True, normalize_tensor),
            NormalizationKind("l1", "a / (sum |a| + eps)", True, _l1),
            NormalizationKind("max", "a / (max |a| + eps)", True, _max),
            NormalizationKind("std", "(a - mean a) / (std a + eps)", True, _std),
            NormalizationKind("none", "a", False, _none),
        )
    }
)


def check_normalization(name: Any) -> Normalization:
    """The name, or an error that lists the known ones.

    >>> check_normalization("l1")
    'l1'
    """
    if not isinstance(name, str) or name not in NORMALIZATIONS:
        raise ValueError(
            f"unknown normalization {name!r}; expected one of {', '.join(NORMALIZATIONS)}"
        )
    return name  # type: ignore[return-value]


def normalize_features(
    features: Tensor, normalization: Normalization = "l2", eps: float = EPS
) -> Tensor:
    """Features as they are compared: every position's channel vector normalised.

    Args:
        features: (N, C, H, W), any floating dtype.
        normalization: see the table at the top of this module.
        eps: added to the divisor.

    Returns:
        (N, C, H, W) in the accumulator's dtype: float32, or float64 for float64.

    Raises:
        ValueError: an unknown normalisation.

    >>> vector = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    >>> normalize_features(vector, "l1").flatten(), normalize_features(vector, "std").flatten()
    (tensor([ 0.2500, -0.7500]), tensor([ 1., -1.]))
    """
    kind = NORMALIZATIONS[check_normalization(normalization)]
    if features.dtype == torch.float16 and features.requires_grad:
        widened: Tensor = _WidenedHalf.apply(features)
    else:
        widened = features.to(accumulator_dtype(features.dtype))
    return kind.apply(widened, eps)


class _WidenedHalf(torch.autograd.Function):
    """float16 to float32; the gradient at vectors of equal numbers stays in float16's range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor) -> Tensor:  # type: ignore[override]
        return features.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (features,) = ctx.saved_tensors
        is_flat = (features == features[:, :1]).all(dim=1, keepdim=True)
        limit = torch.finfo(torch.float16).max
        return torch.where(is_flat, grad.clamp(-limit, limit), grad).to(torch.float16)


# --------------------------------------------------------------------------------- the properties


def channel_norms(features: Tensor, order: float = 2) -> Tensor:
    """The norm of every position's channel vector: 1 after the normalisation of that order.

    Args:
        features: (N, C, H, W), any floating dtype.
        order: of the norm: 2, 1 or ``math.inf``, which go with ``l2``, ``l1`` and ``max``.

    Returns:
        (N, 1, H, W) in the accumulator's dtype.

    >>> features = torch.rand(2, 8, 4, 4) + 0.1
    >>> norms = channel_norms(normalize_features(features, "l2"))
    >>> torch.allclose(norms, torch.ones(2, 1, 4, 4))
    True
    """
    dtype = accumulator_dtype(features.dtype)
    return torch.linalg.vector_norm(features, order, dim=1, keepdim=True, dtype=dtype)


def cosine_distance_map(feat0: Tensor, feat1: Tensor) -> Tensor:
    """``2 (1 - cosine)`` of the two channel vectors at every position.

    It is what the distance with ``l2`` and weights of 1 comes to, by another road: a check, not a
    measurement, for it cancels where the vectors are near each other. A zero vector has no angle;
    there the value is that of the distance, 1 beside another vector and 0 beside a zero.

    Args:
        feat0, feat1: (N, C, H, W), any floating dtype.

    Returns:
        (N, 1, H, W) in the accumulator's dtype, in [0, 4].

    >>> from lpips_fast.functional import distance_map
    >>> a, b = torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4)
    >>> torch.allclose(cosine_distance_map(a, b), distance_map([a], [b])[0], atol=1e-6)
    True
    """
    dtype = accumulator_dtype(feat0.dtype)
    norm0, norm1 = channel_norms(feat0), channel_norms(feat1)
    product = torch.sum(feat0.to(dtype) * feat1.to(dtype), dim=1, keepdim=True)
    cosine = product / torch.where(norm0 * norm1 > 0, norm0 * norm1, 1.0)
    return (norm0 > 0).to(dtype) + (norm1 > 0).to(dtype) - 2 * cosine


def scale_sensitivity(
    feat0: Tensor, feat1: Tensor, factor: float, normalization: Normalization = "l2"
) -> Tensor:
    """How much an image's distance moves when all of its features are ``factor`` times as large.

    About 0 for the normalisations that are scale invariant, which all but ``none`` are.

    Args:
        feat0, feat1: (N, C, H, W) of the two images; the first is scaled.
        factor: above 0.
        normalization: which one.

    Returns:
        (N,): ``|d(factor · feat0, feat1) / d(feat0, feat1) - 1|`` with weights of 1.

    Raises:
        ValueError: a factor that is not above 0, or an unknown normalisation.

    >>> a, b = torch.rand(1, 8, 4, 4), torch.rand(1, 8, 4, 4)
    >>> [bool(scale_sensitivity(a, b, 3.0, kind) > 1e-3) for kind in ("l2", "none")]
    [False, True]
    """
    if not factor > 0:
        raise ValueError(f"factor is {factor}, expected a number above 0")

    def distance(first: Tensor) -> Tensor:
        difference = normalize_features(first, normalization) - normalize_features(
            feat1, normalization
        )
        return torch.mean(torch.sum(difference**2, dim=1), dim=(1, 2))

    widened = feat0.to(accumulator_dtype(feat0.dtype))  # a factor would overflow half precision
    return (distance(widened * factor) / distance(widened) - 1).abs()
