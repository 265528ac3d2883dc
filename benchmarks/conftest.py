"""Options of the benchmarks. Run ``pytest benchmarks/bench_lpips.py --benchmark-only``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lpips_fast")
    group.addoption("--quick", action="store_true", help="only the cases that matter most")
    group.addoption(
        "--seconds-per-case",
        type=float,
        default=None,
        help="time to spend on the rounds of a case (3, or 2 with --quick); at least two are done",
    )
