"""Mean, standard error, median and percentiles, against numpy and the standard library."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from lpips_fast.folders.summary import DIGITS, Statistics, number_text


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_statistics_are_those_of_the_numbers_as_written(
    count: int, generator: torch.Generator
) -> None:
    values = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    written = [round(value, DIGITS) for value in values]
    result = Statistics.of(values)
    assert result.count == count
    assert result.mean == pytest.approx(statistics.mean(written), rel=1e-14)
    expected = statistics.stdev(written) / math.sqrt(count)
    assert result.standard_error == pytest.approx(expected, rel=1e-12)
    percents = [0, 5, 25, 50, 75, 95, 100]
    assert result.percentiles(*percents) == pytest.approx(
        np.percentile(written, percents).tolist(), rel=1e-14
    )
    assert result.median == result.percentile(50)


def test_of_too_little() -> None:
    result = Statistics()
    assert (result.mean, result.standard_error, result.median) == (None, None, None)
    assert result.summary()["count"] == 0
    result.add(0.25)
    assert (result.mean, result.standard_error, result.median) == (0.25, None, 0.25)
    result.add(0.25)
    assert (result.mean, result.standard_error) == (0.25, 0.0)


def test_an_infinite_psnr() -> None:
    result = Statistics.of([20.0, math.inf, 30.0])
    assert result.mean == math.inf and result.standard_error is None and result.median == 30.0
    summary = result.summary()
    assert summary["mean"] is None and summary["infinite"] == 1 and summary["count"] == 3
    assert Statistics.of([math.inf, math.inf]).median == math.inf
    assert number_text(math.inf) == "inf" and float("inf") == math.inf
