"""LPIPS against the other packages, and against its own convolutions alone.

A round calls everything once, in an order that changes from round to round, so that whatever else
the machine does falls on all alike: the others in the set-up of pytest-benchmark, ours as what it
measures. ``extra_info`` holds the medians of all, and what follows from them.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case, all_cases
from contenders import (
    OTHERS,
    UnavailableError,
    build_other,
    build_ours,
    image_pair,
    trunk_weights,
)
from convolution_floor import ConvolutionFloor
from timing import seconds_of
from torch import Tensor

OURS, FLOOR = "lpips_fast", "convolutions"
PLAIN_STEP = "lpips_fast, plain step"
AUTOCAST = "lpips, bfloat16 autocast"

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEWEST_ROUNDS, MOST_ROUNDS = 5, 50

Model = Callable[[Tensor, Any], Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = all_cases(DEVICE.type, metafunc.config.getoption("--quick"))
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def seconds_per_case(request: pytest.FixtureRequest) -> float:
    chosen = request.config.getoption("--seconds-per-case")
    quick = request.config.getoption("--quick")
    return chosen if chosen is not None else 2.0 if quick else 3.0


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def test_lpips(benchmark: Any, case: Case, seconds_per_case: float) -> None:
    if case.dtype == "bfloat16" and not _has_bfloat16():
        pytest.skip("this CPU has no bfloat16 convolutions")
    contest = Contest(case)

    first = contest.round()
    further = round(min(max(seconds_per_case / first, FEWEST_ROUNDS), MOST_ROUNDS)) - 1
    if first > 2 * seconds_per_case:
        further = 1
    benchmark.pedantic(contest.ours, setup=contest.others, rounds=further, iterations=1)
    benchmark.extra_info.update(contest.summary())


class Contest:
    """Everything that a case calls, and how long each took."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.times: dict[str, list[float]] = {}
        self.absent: dict[str, str] = {}
        self.image, self.target = image_pair(case.batch, case.height, case.width, DEVICE)
        self.image.requires_grad_(case.mode == "step")
        self._calls = self._contenders()
        self._check_that_all_agree()
        self.floor = self._convolutions()
        if self.floor is not None:
            self._calls[FLOOR] = self.floor
        self._rounds = 0

    # ------------------------------------------------------------------------------ who takes part

    def _contenders(self) -> dict[str, Callable[[], Any]]:
        case, spatial = self.case, self.case.variant == "spatial"
        calls = {OURS: self._our_call()}
        for package in OTHERS:
            if package != "lpips" and not case.takes_all:
                continue
            try:
                model = build_other(package, case.net, DEVICE, spatial)
            except UnavailableError as error:
                self.absent[package] = str(error)
                continue
            calls[package] = self._call(model, self.target)
            if case.dtype == "bfloat16":
                calls[AUTOCAST] = self._call(_under_autocast(model), self.target)
        if case.variant == "encoded":
            calls[PLAIN_STEP] = self._call(build_ours(case.net, DEVICE), self.target)
        return calls

    def _our_call(self) -> Callable[[], Tensor]:
        case = self.case
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else None
        model = build_ours(case.net, DEVICE, case.variant == "spatial", dtype)
        if case.variant == "encoded":
            with torch.no_grad():
                return self._call(model, model.encode(self.target))
        if case.variant == "compiled":
            model.compile()
        elif case.variant == "graphed":
            # Captured with the images that it is timed on, so no copy into the graph is timed.
            # The module's own `forward` is the graph from here on.
            torch.cuda.make_graphed_callables(model, (self.image, self.target))
        return self._call(model, self.target)

    def _call(self, model: Model, target: Any) -> Callable[[], Tensor]:
        image = self.image
        if self.case.mode == "step":
            return lambda: torch.autograd.grad(model(image, target).mean(), image)[0]

        def forward() -> Tensor:
            with torch.no_grad():
                return model(image, target)

        return forward

    def _convolutions(self) -> ConvolutionFloor | None:
        case = self.case
        if case.variant == "graphed":
            return None  # the floor launches every convolution by itself, and would be the slower
        images = [self.image.detach()]
        if case.variant != "encoded":
            images.append(self.target)
        return ConvolutionFloor(
            case.net,
            trunk_weights(case.net),
            torch.cat(images),
            case.batch if case.mode == "step" else 0,
            getattr(torch, case.dtype),
        )

    def _check_that_all_agree(self) -> None:
        """Packages that computed different things could not be compared. It warms up all, too."""
        # Gradients are compared loosely: where two values tie but for rounding, max-pooling and
        # ReLU send them elsewhere, in every package by up to 0.005 against float64, and by up to
        # a third in bfloat16.
        forward = self.case.mode == "forward"
        if self.case.dtype == "float32" and DEVICE.type == "cpu":
            allowed = 1e-3 if forward else 0.02
        else:
            allowed = 0.1 if forward else 0.5
        results = {name: call().float() for name, call in self._calls.items()}
        ours = results[OURS]
        for name, result in results.items():
            error = (result.reshape(ours.shape) - ours).norm() / ours.norm()
            assert error < allowed, f"{name} differs from ours by {error:.1e}"

    # ------------------------------------------------------------------------------ rounds

    def ours(self) -> None:
        self._time(OURS)

    def others(self) -> None:
        names = [name for name in self._calls if name != OURS]
        first = self._rounds % max(len(names), 1)
        for name in names[first:] + names[:first]:
            self._time(name)
        self._rounds += 1

    def round(self) -> float:
        """Everything once; its seconds together."""
        self.others()
        self.ours()
        return sum(times[-1] for times in self.times.values())

    def _time(self, name: str) -> None:
        self.times.setdefault(name, []).append(seconds_of(self._calls[name], DEVICE))

    # ------------------------------------------------------------------------------ what came of it

    def summary(self) -> dict[str, Any]:
        case = self.case
        seconds = {name: statistics.median(times) for name, times in self.times.items()}
        ours = seconds[OURS]
        result: dict[str, Any] = {
            "case": case.name,
            "net": case.net,
            "height": case.height,
            "width": case.width,
            "batch": case.batch,
            "mode": case.mode,
            "dtype": case.dtype,
            "variant": case.variant,
            "device": DEVICE.type,
            "rounds": len(self.times[OURS]),
            "seconds": seconds,
            "spread": {name: _spread(times) for name, times in self.times.items()},
            "times_as_fast_as": {
                name: value / ours for name, value in seconds.items() if name not in (OURS, FLOOR)
            },
            "images_per_second": {
                name: case.batch / value for name, value in seconds.items() if name != FLOOR
            },
            "absent": self.absent,
        }
        if self.floor is not None:
            result["overhead"] = ours / seconds[FLOOR]
            result["floor"] = {
                "ways": dict(self.floor.ways),
                "flops": self.floor.flops,
                "flops_per_second": self.floor.flops / seconds[FLOOR],
            }
        return result


def _spread(times: list[float]) -> float:
    """The middle half of the times, as a fraction of their median."""
    if len(times) < 4:
        return (max(times) - min(times)) / statistics.median(times)
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / middle


def _under_autocast(model: Model) -> Model:
    def call(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return model(image, target)

    return call


def _has_bfloat16() -> bool:
    if DEVICE.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
