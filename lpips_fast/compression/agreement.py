"""What is left of a metric in a lighter one: agreement, size and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..analysis.parts import rank_correlation
from ..lpips import LPIPS
from .triplets import Triplets

__all__ = ["Agreement", "agreement", "size_in_bytes", "time_ratio"]


@dataclass(frozen=True)
class Agreement:
    """How far one metric agrees with another on triplets.

    Attributes:
        spearman: rank correlation of the distances of all pairs.
        same_nearer: how often both call the same of two distorted images the nearer, in [0, 1].
        error: mean difference of the distances over their mean.
        pairs: how many.
    """

    spearman: float
    same_nearer: float
    error: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.4f}, same nearer {self.same_nearer:.1%}, mean error "
            f"{self.error:.1%} of the mean distance, {self.pairs} pairs"
        )


def triplet_distances(model: LPIPS, triplets: Triplets, batch: int = 32) -> Tensor:
    """(2, N): from each reference to both of its copies, without a graph."""
    parts = []
    with torch.no_grad():
        for first in range(0, len(triplets), batch):
            part = triplets[first : first + batch]
            d0, d1 = (model(part.ref, copy).flatten() for copy in (part.p0, part.p1))
            parts.append(torch.stack((d0, d1)))
    return torch.cat(parts, dim=1)


def agreement(model: LPIPS, full: LPIPS, triplets: Triplets) -> Agreement:
    """How far a lighter model agrees with the full one on triplets that it was not fitted to."""
    return agreement_of(triplet_distances(model, triplets), triplet_distances(full, triplets))


def agreement_of(found: Tensor, expected: Tensor) -> Agreement:
    """The same, of distances that are known, (2, N) as :func:`triplet_distances` gives them."""
    found, expected = found.double(), expected.double()
    return Agreement(
        spearman=rank_correlation(found.flatten().tolist(), expected.flatten().tolist()),
        same_nearer=((found[0] < found[1]) == (expected[0] < expected[1])).double().mean().item(),
        error=((found - expected).abs().mean() / expected.mean()).item(),
        pairs=found.numel(),
    )


def size_in_bytes(model: LPIPS) -> int:
    """Of the trunk's weights and the linear ones."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def time_ratio(model: LPIPS, full: LPIPS, size: int, *, calls: int = 15) -> float:
    """Time of one pair of square images over the full model's, the median of calls in turn."""
    shift = full.scaling_layer.shift
    in0, in1 = (torch.rand(2, 1, 3, size, size, device=shift.device) * 2 - 1).to(shift.dtype)
    ratios = []
    with torch.no_grad():
        for turn in range(calls + 2):
            seconds = []
            for one in (model, full):
                start = time.perf_counter()
                one(in0, in1).item()  # waits for a GPU
                seconds.append(time.perf_counter() - start)
            if turn > 1:  # the first pack weights
                ratios.append(seconds[0] / seconds[1])
    return median(ratios)
