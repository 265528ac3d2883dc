"""Under torch.compile: ours and the unmodified lpips, each as it is and compiled.

    python benchmarks/bench_compile.py

``lpips`` is compiled in three ways: plain, channels-last, and under bfloat16 autocast. All calls of
a row run in turn in one process; figures are medians. A quarter of an hour on two cores; where the
CPU has no bfloat16, VGG16's ``lpips`` alone takes longer (``--only-ours`` leaves it out).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import report
import torch
from contenders import build_other, build_ours, image_pair
from timing import seconds_of
from torch import nn

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"alex": ((16, 64), (4, 256)), "squeeze": ((16, 64), (4, 256)), "vgg": ((8, 64), (1, 256))}
#: A call of so many seconds is timed once: bfloat16 where the CPU has no instructions for it.
SLOW = 5.0
#: The columns, in order: ours and theirs, and how.
WAYS = ("ours", "ours, compiled", "lpips", "compiled", "channels-last", "bfloat16")


def _calls(
    net: str, batch: int, size: int, half: bool, only_ours: bool
) -> dict[tuple[str, str], Callable[[], Any]]:
    """By way and mode; compiled when first called."""
    image, target = image_pair(batch, size, size, CPU)
    leaf = image.clone().requires_grad_()

    def autocast(on: bool) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()

    def both(way: str, model: Callable[..., Any], in_half: bool = False) -> None:
        def forward() -> None:
            with torch.no_grad(), autocast(in_half):
                model(image, target)

        def step() -> None:
            with autocast(in_half):
                loss = model(leaf, target).sum()
            torch.autograd.grad(loss, leaf)

        calls[way, "forward"], calls[way, "step"] = forward, step

    def theirs() -> nn.Module:
        build_other.cache_clear()  # each way compiles a model of its own
        return build_other("lpips", net, CPU)

    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    both("ours", build_ours(net, CPU), half)
    both("ours, compiled", torch.compile(build_ours(net, CPU)), half)
    if only_ours:
        return calls
    if half:
        both("lpips", theirs(), True)
        both("bfloat16", torch.compile(theirs()), True)
    else:
        both("lpips", theirs())
        both("compiled", torch.compile(theirs()))
        both("channels-last", torch.compile(theirs().to(memory_format=torch.channels_last)))
    return calls


def measure(
    net: str, batch: int, size: int, half: bool, seconds: float, only_ours: bool
) -> list[dict[str, Any]]:
    """Two rows, forward and step."""
    torch.compiler.reset()
    calls = _calls(net, batch, size, half, only_ours)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for key in list(calls):
        calls[key]()  # compiles
        once = seconds_of(calls[key], CPU)
        if once > SLOW:
            found[key].append(once)
            del calls[key]
        else:
            calls[key]()
    spent = 0.0
    while spent < seconds or min(len(found[key]) for key in calls) < 5:
        for key, call in calls.items():
            found[key].append(seconds_of(call, CPU))
            spent += found[key][-1]
    return [
        {
            "net": net,
            "batch": batch,
            "size": size,
            "dtype": "bfloat16" if half else "float32",
            "mode": mode,
            "rounds": len(found["ours", mode]),
            "seconds": {way: median(found[way, mode]) for way in WAYS if (way, mode) in found},
        }
        for mode in ("forward", "step")
    ]


def compiled_ratio(results: dict[str, Any], net: str, size: int, mode: str) -> float:
    """In float32, both compiled: how many times as fast ours is as the fastest of theirs."""
    (seconds,) = (
        row["seconds"]
        for row in results["rows"]
        if (row["net"], row["size"], row["mode"], row["dtype"]) == (net, size, mode, "float32")
    )
    best = best_of_theirs(seconds)
    assert best is not None, "lpips was left out of this row"
    return best / seconds["ours, compiled"]


def best_of_theirs(seconds: dict[str, float]) -> float | None:
    """The fastest of theirs compiled; ``None`` where they were left out."""
    return min((seconds[way] for way in WAYS[3:] if way in seconds), default=None)


def table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        seconds = row["seconds"]
        best = best_of_theirs(seconds)
        rows.append(
            [
                f"{report.TRUNKS[row['net']]}, {row['batch']} of {row['size']}², {row['dtype']}, "
                f"{row['mode']}",
                *(report.milliseconds(seconds[w]) if w in seconds else "" for w in WAYS),
                f"{seconds['ours, compiled'] / seconds['ours']:.2f}",
                "" if best is None else f"{best / seconds['ours, compiled']:.2f}×",
            ]
        )
    heads = ["ours", "compiled", "`lpips`", "compiled", "and channels-last", "in bfloat16"]
    heads = ["", *heads, "ours: compiled over plain", "compiled, times as fast as their best"]
    lines = [
        *report.head("Under torch.compile", results, ["torch", "lpips"]),
        "Milliseconds, medians of calls in turn. *In bfloat16* is under autocast, of both.",
        "",
        report.table(heads, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["alex", "squeeze", "vgg"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=12, help="for the calls of two rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only-ours", action="store_true", help="where lpips takes minutes a call")
    options = parser.parse_args()

    results: dict[str, Any] = {**machine.this_run(), "rows": []}
    options.output.mkdir(parents=True, exist_ok=True)
    for net in options.nets:
        for batch, size in SHAPES[net]:
            for dtype in options.dtypes:
                rows = measure(
                    net, batch, size, dtype == "bfloat16", options.seconds, options.only_ours
                )
                results["rows"] += rows
                for row in rows:
                    print(row["net"], row["size"], row["dtype"], row["mode"], row["seconds"])
                (options.output / "compile.json").write_text(json.dumps(results, indent=2) + "\n")
                (options.output / "compile.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
