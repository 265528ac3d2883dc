"""What a column of a table says: mean, standard error, median, percentiles; and paired differences.

All of it is of the numbers as they are written in the file, so that a reader gets the same.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["DIGITS", "Statistics", "number_text"]

#: Decimals of a number in the file. One step is about the rounding of a float32 near 0.1.
DIGITS = 8


def number_text(value: float) -> str:
    """A number as the file has it; an infinite PSNR, of identical images, is ``inf``.

    >>> number_text(0.1), number_text(float("inf"))
    ('0.10000000', 'inf')
    """
    return f"{value:.{DIGITS}f}"


@dataclass
class Statistics:
    """Of the numbers of one column, as written; 8 bytes each are kept.

    >>> statistics = Statistics.of([0.1, 0.2, 0.6])
    >>> statistics.count, statistics.mean, statistics.median
    (3, 0.3, 0.2)
    """

    values: array[float] = field(default_factory=lambda: array("d"))

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistics:
        statistics = cls()
        for value in values:
            statistics.add(value)
        return statistics

    def add(self, value: float) -> None:
        self.values.append(float(number_text(value)))

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def infinite(self) -> int:
        """How many are infinite: PSNRs of identical images."""
        return sum(map(math.isinf, self.values))

    @property
    def mean(self) -> float | None:
        """``None`` of nothing; infinite if one value is."""
        if not self.values:
            return None
        return math.inf if self.infinite else math.fsum(self.values) / self.count

    @property
    def standard_error(self) -> float | None:
        """Sample standard deviation over the square root of the count.

        ``None`` below two values, and where one is infinite.
        """
        if self.count < 2 or self.infinite:
            return None
        mean = math.fsum(self.values) / self.count
        squares = math.fsum((value - mean) ** 2 for value in self.values)
        return math.sqrt(squares / (self.count * (self.count - 1)))

    @property
    def median(self) -> float | None:
        """``None`` of nothing."""
        return self.percentile(50)

    def percentile(self, percent: float) -> float | None:
        """Between the two nearest values in proportion, as numpy does it; ``None`` of nothing."""
        return self.percentiles(percent)[0]

    def percentiles(self, *percents: float) -> list[float | None]:
        """Several at once, for which the values are sorted once."""
        if not self.values:
            return [None] * len(percents)
        ordered = sorted(self.values)
        found: list[float | None] = []
        for percent in percents:
            position = percent / 100 * (self.count - 1)
            low = math.floor(position)
            below, above = ordered[low], ordered[min(low + 1, self.count - 1)]
            part = position - low
            found.append(below if part == 0 or below == above else below + part * (above - below))
        return found

    def summary(self) -> dict[str, float | int | None]:
        """All of it, for JSON: an infinite number is ``None``, and ``infinite`` counts them."""
        low, quarter, median, three_quarters, high = self.percentiles(5, 25, 50, 75, 95)
        facts: dict[str, float | int | None] = {
            "count": self.count,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "median": median,
            "percentile_5": low,
            "percentile_25": quarter,
            "percentile_75": three_quarters,
            "percentile_95": high,
        }
        finite = {key: value if _is_finite(value) else None for key, value in facts.items()}
        return {**finite, "infinite": self.infinite} if self.infinite else finite


def _is_finite(value: float | int | None) -> bool:
    return value is not None and math.isfinite(value)
