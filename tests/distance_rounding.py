"""By how much distances and their gradients may miss float64, for every run of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lpips_fast import composed


def maps(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    return [composed.distance_map(a, b, w) for a, b, w in zip(feats0, feats1, weights)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of the reference; NaN if anything is."""
    error, norm = (actual.double() - expected).norm(), expected.norm()
    return float(error / norm) if norm > 0 else float(error)


def distance_bound(magnitude: Tensor, error: float) -> Tensor:
    """What rounding of sums and of unit vectors may add to a distance with weights |w|.

    Args:
        error: of a sum, relative.
    """
    return error * magnitude + 4 * error * magnitude.sqrt() + error**2


def assert_within_rounding(
    result: Tensor,
    formula: Callable[..., Tensor],
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor],
    error: float,
) -> None:
    """Against float64, by the size of what was added: weights of both signs cancel."""
    exact = [[t.detach().double() for t in group] for group in (feats0, feats1, weights)]
    expected, magnitude = formula(*exact), formula(*exact[:2], [w.abs() for w in exact[2]])
    assert torch.equal(result.isnan(), expected.isnan())
    excess = (result - expected).abs() - distance_bound(magnitude, error)
    assert bool((excess.nan_to_num(nan=0) <= 0).all())


def gradient_scale(grad: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """|t| / |a|: the gradient before the part along the vector is taken off, which may be all."""
    unit_difference = composed.normalize_tensor(a) - composed.normalize_tensor(b)
    t = 2 * grad * w.view(1, -1, 1, 1) * unit_difference
    return t / (a.norm(dim=1, keepdim=True) + composed.EPS)
