"""How often a number occurs, as rectangles in the coordinates of a drawing of fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["HEIGHT", "WIDTH", "Bar", "Histogram", "histograms"]

#: Of the drawing, in its own units; a page shows it at any size.
WIDTH, HEIGHT = 300, 64

_BINS = 30


@dataclass(frozen=True)
class Bar:
    """A rectangle, and how many numbers it stands for."""

    x: float
    y: float
    width: float
    height: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """Numbers between two ends.

    Attributes:
        bars: of the bins that hold something.
        low, high: the ends.
        mean: where the mean stands; ``None`` where there is none.
    """

    bars: tuple[Bar, ...]
    low: float
    high: float
    mean: float | None


def histograms(samples: Sequence[Sequence[float]]) -> list[Histogram | None]:
    """One of each sample, all with the same bins, so that they can be compared.

    Numbers that are not finite (the PSNR of identical images) are left out.

    Returns:
        ``None`` of a sample that has no finite number.

    >>> one, other = histograms([[0.0, 1.0, 1.0], []])
    >>> [bar.count for bar in one.bars], other
    ([1, 2], None)
    """
    finite = [np.array([x for x in sample if math.isfinite(x)]) for sample in samples]
    everything = np.concatenate(finite) if finite else np.empty(0)
    if not everything.size:
        return [None] * len(samples)
    low, high = float(everything.min()), float(everything.max())
    # All alike: one bin, with the number in its middle.
    edges = np.linspace(low, high, _BINS + 1) if low < high else np.array([low - 0.5, low + 0.5])
    counted = [np.histogram(sample, edges)[0] for sample in finite]
    tallest = max(int(counts.max()) for counts in counted)
    return [
        _histogram(counts, edges, sample, tallest, low, high) if sample.size else None
        for counts, sample in zip(counted, finite)
    ]


def _histogram(
    counts: np.ndarray, edges: np.ndarray, sample: np.ndarray, tallest: int, low: float, high: float
) -> Histogram:
    scale = WIDTH / (edges[-1] - edges[0])
    bars = []
    for count, left, right in zip(counts.tolist(), edges, edges[1:]):
        if count:
            height = max(1.0, HEIGHT * count / tallest)  # one of thousands can be seen too
            width = max(0.5, float((right - left) * scale) - 1)
            bars.append(
                Bar(
                    round(float((left - edges[0]) * scale), 2),
                    round(HEIGHT - height, 2),
                    round(width, 2),
                    round(height, 2),
                    count,
                )
            )
    mean = round(float((sample.mean() - edges[0]) * scale), 2)
    return Histogram(tuple(bars), low, high, mean)
