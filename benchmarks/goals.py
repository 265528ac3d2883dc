"""The figures that the project sets out to reach, and what a run says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
Case = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        text: what is wanted, in words.
        device_type: ``cpu`` or ``cuda``, where it is to be reached.
        bound: the figure.
        at_least: whether more is better.
        values: finds the figures in results, as pairs of a setting and a number.
        form: how a number is written.
    """

    text: str
    device_type: str
    bound: float
    at_least: bool
    values: Callable[[Results], Iterator[tuple[str, float]]]
    form: str = "{:.2f}"

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.form.format(self.bound)}"

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def image_size(case: Case) -> str:
    """The images of a case in short: ``256², batch 4`` or ``1080×1920, batch 1``."""
    height, width = case["height"], case["width"]
    size = f"{height}²" if height == width else f"{height}×{width}"
    return f"{size}, batch {case['batch']}"


def _cases(results: Results, **wanted: Any) -> Iterator[Case]:
    for case in results["cases"]:
        if all(case[key] == value for key, value in wanted.items()):
            yield case


def _times_as_fast(variant: str = "plain", least_batch: int = 1, **wanted: Any) -> Any:
    def values(results: Results) -> Iterator[tuple[str, float]]:
        for case in _cases(results, variant=variant, **wanted):
            ratio = case["times_as_fast_as"].get("lpips")
            if ratio is not None and case["batch"] >= least_batch:
                yield f"{case['net']} {image_size(case)}", ratio

    return values


def _overhead(**wanted: Any) -> Any:
    def values(results: Results) -> Iterator[tuple[str, float]]:
        for case in _cases(results, variant="plain", **wanted):
            if "overhead" in case:
                yield f"{case['net']} {image_size(case)}", case["overhead"]

    return values


def _memory(mode: str) -> Any:
    def values(results: Results) -> Iterator[tuple[str, float]]:
        for entry in results["memory"]:
            figures = entry.get("bytes")
            if entry["mode"] == mode and figures and figures["lpips"] > 0:
                setting = f"{entry['net']} {image_size(entry)}"
                yield setting, figures["lpips_fast"] / figures["lpips"]

    return values


def _encoded(results: Results) -> Iterator[tuple[str, float]]:
    for case in _cases(results, variant="encoded"):
        seconds = case["seconds"]
        setting = f"{case['net']} {image_size(case)}"
        yield setting, seconds["lpips_fast"] / seconds["lpips_fast, plain step"]


_WORDS = {"forward": "forward", "step": "training step"}


def _speed_goals() -> Iterator[Goal]:
    figures = {
        ("forward", "float32"): {"alex": 3, "vgg": 1.5, "squeeze": 2.5},
        ("step", "float32"): {"alex": 1.8, "vgg": 1.3, "squeeze": 1.8},
        ("forward", "bfloat16"): {"alex": 5, "vgg": 2.8},
    }
    for (mode, dtype), bounds in figures.items():
        for net, bound in bounds.items():
            text = f"{net}, {_WORDS[mode]} in {dtype}, 256²: times as fast as lpips"
            values = _times_as_fast(net=net, mode=mode, dtype=dtype, height=256)
            yield Goal(text, "cpu", bound, True, values, "{:.2f}×")
    on_cuda = {("forward", "float32"): 2.5, ("forward", "bfloat16"): 5}
    on_cuda |= {("step", "float32"): 2, ("step", "bfloat16"): 4}
    for (mode, dtype), bound in on_cuda.items():
        text = f"{_WORDS[mode]} in {dtype}, 256², batch 8 and up: times as fast as lpips"
        values = _times_as_fast(least_batch=8, mode=mode, dtype=dtype, height=256)
        yield Goal(text, "cuda", bound, True, values, "{:.2f}×")
    values = _times_as_fast("graphed", net="alex", mode="forward", height=64)
    text = "alex, forward under a CUDA graph, 64², batch 1: times as fast as lpips"
    yield Goal(text, "cuda", 5, True, values, "{:.2f}×")


def _overhead_goals() -> Iterator[Goal]:
    for device_type, bound in (("cpu", 1.15), ("cuda", 1.25)):
        for mode in ("forward", "step"):
            text = f"{_WORDS[mode]} in float32: time over that of the convolutions alone"
            values = _overhead(mode=mode, dtype="float32")
            yield Goal(text, device_type, bound, False, values)


def _further_goals() -> Iterator[Goal]:
    for device_type in ("cpu", "cuda"):
        for mode, bound in (("step", 0.5), ("forward", 0.4)):
            text = f"{_WORDS[mode]}: peak memory, as a part of that of lpips"
            yield Goal(text, device_type, bound, False, _memory(mode), "{:.0%}")
        text = "step against a target encoded before: time, as a part of a plain step"
        yield Goal(text, device_type, 0.55, False, _encoded)


GOALS = (*_speed_goals(), *_overhead_goals(), *_further_goals())
OVERHEAD_BOUND = {"cpu": 1.15, "cuda": 1.25}
