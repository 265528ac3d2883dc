"""How features are normalised before they are compared: the formulas, and what they promise.

LPIPS divides the channel vector of every position by its Euclidean norm (``l2``; Zhang et al.,
CVPR 2018, section 3). The others answer what that choice is worth. The first five work on one
position's vector ``a`` of C channels, and all but ``none`` take it to a size of its own:

============  ==========================================  ====================================
``l2``        ``a / (sqrt(sum_c a_c²) + eps)``            norm 1: directions are compared
``l1``        ``a / (sum_c |a_c| + eps)``                 sum of sizes 1: shares are compared
``max``       ``a / (max_c |a_c| + eps)``                 largest size 1
``std``       ``(a - mean_c a_c) / (deviation + eps)``    mean 0 and deviation 1 over channels;
                                                          the deviation divides by C
``none``      ``a``                                       as it is: what is brighter counts more
============  ==========================================  ====================================

Three standardise as ``std`` does, over what the layers of that name in networks standardise over,
here and now, without running averages and without learned factors. Each loses something that LPIPS
has:

============  ============================================  ==================================
``layer``     over channels and positions of an image       locality: what changes at one
(Ba 2016)                                                   position moves all others
``instance``  over the positions of an image, for every     locality; and a change of a
(Ulyanov      channel by itself                             channel's mean or contrast over the
2016)                                                       whole image, its style, is not seen
``batch``     over the positions of all images of a batch,  both, and the batch: the distance of
(Ioffe 2015)  for every channel by itself, each side of     a pair depends on the pairs beside
              a comparison by itself                        it, and images that are the same in
                                                            two batches that differ are not at 0
============  ============================================  ==================================

:class:`LearnedNorm`, which ``LPIPS(normalization="learned")`` has, is ``l2`` with a factor and a
shift on the norm that learn.

The published linear weights were learned with ``l2``. With another normalisation they are applied
to numbers of another size: distances of two normalisations share no unit, and only their order,
over the same pairs, can be compared.

What all promise:

- A vector of zeros stays zero, and so do equal numbers where the deviation over them divides. The
  derivative there is the true one, ``1 / eps`` times the numerator's: large, and finite. The
  derivative of ``|a_c|`` at 0 is taken to be 0, that of the maximum is shared equally by the
  channels that reach it, and that of a norm at a zero vector is 0.
- Sums are float32 for half precision, float64 for float64, and so is the result, so that ``eps``
  does not vanish and squares do not overflow. Gradients of float16 features are clamped to
  float16's range at equal numbers, zeros among them; elsewhere an overflow stays visible, which is
  what ``torch.amp.GradScaler`` looks for.
- Identical features become identical bits, whose distance is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "EPS",
    "LEARNED",
    "NORMALIZATIONS",
    "LearnedNorm",
    "ModelNormalization",
    "Normalization",
    "NormalizationKind",
    "accumulator_dtype",
    "channel_norms",
    "check_model_normalization",
    "check_normalization",
    "cosine_distance_map",
    "depends_on_batch",
    "normalize_features",
    "normalize_tensor",
    "scale_sensitivity",
]

Normalization = Literal["l2", "l1", "max", "none", "std", "layer", "instance", "batch"]
#: What a model may have: one of the formulas, or the one that learns.
ModelNormalization = Normalization | Literal["learned"]

#: The name of :class:`LearnedNorm` among a model's normalisations.
LEARNED: Literal["learned"] = "learned"

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


def _standardized(features: Tensor, eps: float, over: tuple[int, ...]) -> Tensor:
    """Mean 0 and deviation 1 over some dimensions; 0 where all numbers there are equal."""
    if features.numel() == 0:
        return features
    centred = features - features.mean(dim=over, keepdim=True)
    variance = torch.mean(centred**2, dim=over, keepdim=True)
    rounding = _ROUNDINGS * torch.finfo(features.dtype).eps
    largest = features.detach().abs().amax(dim=over, keepdim=True)
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
        formula: for one position's channel vector ``a``; sums are over channels, but where it says
            over what.
        is_scale_invariant: whether a positive factor on an image's features leaves its distances
            as they are (but for ``eps``); of ``batch``, a factor on all images of a side.
        apply: the formula, of (N, C, H, W) in the accumulator's dtype and ``eps``.
        over: the dimensions of (N, C, H, W) that its sums run over.
    """

    name: Normalization
    formula: str
    is_scale_invariant: bool
    apply: Callable[[Tensor, float], Tensor]
    over: tuple[int, ...] = (1,)

    @property
    def depends_on_batch(self) -> bool:
        """Whether the images beside it have a part in what becomes of an image."""
        return 0 in self.over


def _standardization(name: Normalization, formula: str, over: tuple[int, ...]) -> NormalizationKind:
    def apply(features: Tensor, eps: float) -> Tensor:
        return _standardized(features, eps, over)

    return NormalizationKind(name, formula, True, apply, over)


#: Every normalisation by name, the default first.
NORMALIZATIONS: Mapping[str, NormalizationKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            NormalizationKind("l2", "a / (sqrt(sum a²) + eps)", True, normalize_tensor),
            NormalizationKind("l1", "a / (sum |a| + eps)", True, _l1),
            NormalizationKind("max", "a / (max |a| + eps)", True, _max),
            _standardization("std", "(a - mean a) / (std a + eps)", (1,)),
            NormalizationKind("none", "a", False, _none),
            _standardization("layer", "as std, over C, H, W", (1, 2, 3)),
            _standardization("instance", "as std, over H, W", (2, 3)),
            _standardization("batch", "as std, over N, H, W", (0, 2, 3)),
        )
    }
)


def check_normalization(name: Any) -> Normalization:
    """The name, or an error that lists the known ones.

    >>> check_normalization("l1")
    'l1'
    """
    return _one_of(tuple(NORMALIZATIONS), name)


def check_model_normalization(name: Any) -> ModelNormalization:
    """The same, and ``"learned"`` too.

    >>> check_model_normalization("learned")
    'learned'
    """
    return _one_of((*NORMALIZATIONS, LEARNED), name)


def _one_of(known: tuple[str, ...], name: Any) -> Any:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown normalization {name!r}; expected one of {', '.join(known)}")
    return name


def depends_on_batch(normalization: ModelNormalization) -> bool:
    """Whether the distance of a pair depends on the pairs beside it.

    >>> depends_on_batch("batch"), depends_on_batch("instance")
    (True, False)
    """
    return normalization != LEARNED and NORMALIZATIONS[normalization].depends_on_batch


def normalize_features(
    features: Tensor, normalization: Normalization = "l2", eps: float = EPS
) -> Tensor:
    """Features as they are compared: normalised, for most at every position by itself.

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
    return kind.apply(_widened(features, kind.over), eps)


def _widened(features: Tensor, over: tuple[int, ...]) -> Tensor:
    if features.dtype == torch.float16 and features.requires_grad and features.numel() > 0:
        return _WidenedHalf.apply(features, over)
    return features.to(accumulator_dtype(features.dtype))


class _WidenedHalf(torch.autograd.Function):
    """float16 to float32; the gradient where all numbers are equal stays in float16's range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, over: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        return features.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        features, ctx.over = inputs
        ctx.save_for_backward(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (features,) = ctx.saved_tensors
        lowest, highest = (f(dim=ctx.over, keepdim=True) for f in (features.amin, features.amax))
        limit = torch.finfo(torch.float16).max
        clamped = torch.where(lowest == highest, grad.clamp(-limit, limit), grad)
        return clamped.to(torch.float16), None


# ------------------------------------------------------------------------------ the one that learns


class LearnedNorm(nn.Module):
    """``a / (scale · norm + shift + eps)``: ``l2`` with a factor and a shift, one each a layer.

    Args:
        channels: C of the layer.

    With a factor of 1 and a shift of 0, as it starts, it is ``l2``. The factor alone says nothing
    that linear weights could not say. A shift above 0 makes weak features, those of dark and flat
    areas, count less than strong ones of the same direction: what it loses is that a factor on an
    image's features leaves the distance as it is.

    Attributes:
        log_scale: (1,), the logarithm of the factor, which so stays positive.
        shift: (1,), in units of ``sqrt(C)``, of which norms are a small multiple; at least 0, to
            which :meth:`project` takes it back.

    >>> norm, features = LearnedNorm(8), torch.rand(2, 8, 4, 4)
    >>> torch.equal(norm(features), normalize_features(features, "l2"))
    True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Normalised features (N, C, H, W), in the accumulator's dtype."""
        features = _widened(features, (1,))
        squared = torch.sum(features**2, dim=1, keepdim=True)
        norm = _root(squared, squared == 0)
        scale, shift = (p.to(features.dtype) for p in (self.log_scale.exp(), self.shift))
        return features / (scale * norm + shift * self.channels**0.5 + EPS)

    @torch.no_grad()
    def project(self) -> None:
        """Takes the shift to the nearest that keeps the divisor positive."""
        self.shift.clamp_(min=0)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


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

    About 0 for the normalisations that are scale invariant, which all formulas but ``none`` are.

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
