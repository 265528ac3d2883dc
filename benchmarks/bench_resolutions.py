"""One pair of images from the smallest size to 4K, at usual and odd shapes: time and peak memory.

    python benchmarks/bench_resolutions.py

Ours beside the unmodified ``lpips``, forward, without a graph. Times are medians of calls in turn.
Memory is what a call adds at its peak, each figure from a process of its own
(:mod:`peak_memory`). Sizes grow; what would take more memory or time than is allowed, by what the
size before took a pixel, is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from contenders import build_other, build_ours, image_pair
from peak_memory import PACKAGES, in_a_process
from report import head
from timing import seconds_of

from lpips_fast.trunk import minimum_size

CPU = torch.device("cpu")
GIB, MIB = 2**30, 2**20
RESULTS = Path(__file__).resolve().parent / "results"
OURS, THEIRS = PACKAGES

# Calls shorter than this many seconds are repeated as often as asked, longer ones twice.
_LONG = 4.0


def sizes(net: str) -> list[tuple[int, int]]:
    """Height and width, in the order of their pixels."""
    least = minimum_size(net)
    shapes = [
        *((least, least), (64, 64), (least, 1021), (256, 256), (37, 2039), (1021, 257)),
        *((1080, 1920), (2160, 3840)),
    ]
    return sorted(shapes, key=lambda size: size[0] * size[1])


def measure(net: str, rounds: int, most_memory: int, most_seconds: float) -> list[dict[str, Any]]:
    models: dict[str, Callable[..., Any]] = {
        OURS: build_ours(net, CPU),
        THEIRS: build_other("lpips", net, CPU),
    }
    rows: list[dict[str, Any]] = []
    before: dict[str, tuple[float, float]] = {}  # memory and seconds a pixel of the row before
    for height, width in sizes(net):
        row: dict[str, Any] = {"net": net, "height": height, "width": width, "packages": {}}
        pixels = height * width
        able = []
        for package in PACKAGES:
            memory, seconds = (pixels * each for each in before.get(package, (0.0, 0.0)))
            if memory > most_memory:
                row["packages"][package] = {"left_out": f"about {memory / GIB:.0f} GiB expected"}
            elif seconds > most_seconds:
                row["packages"][package] = {"left_out": f"about {seconds:.0f} s expected"}
            else:
                able.append(package)
        image, target = image_pair(1, height, width, CPU)
        taken: dict[str, list[float]] = {package: [] for package in able}
        with torch.no_grad():
            values = {}
            for package in able:  # chooses algorithms, and says how long it takes
                values[package] = models[package](image, target).item()
                call = functools.partial(models[package], image, target)
                taken[package].append(seconds_of(call, CPU))
            for turn in range(1, rounds):
                for package in able:
                    if turn < 2 or taken[package][0] < _LONG:
                        call = functools.partial(models[package], image, target)
                        taken[package].append(seconds_of(call, CPU))
        for package in able:
            memory = in_a_process(package, net, height, width, 1, "forward")
            seconds = median(taken[package])
            before[package] = (memory / pixels, seconds / pixels)
            row["packages"][package] = {
                "seconds": seconds,
                "calls": len(taken[package]),
                "bytes": memory,
            }
        if len(values) == 2:
            row["relative_difference"] = abs(values[OURS] / values[THEIRS] - 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    lines = [
        *head("From the smallest size to 4K", results, ["torch", "lpips"]),
        "One pair, forward, float32. Times: medians of calls in turn. Memory: what a call adds at "
        "its peak, without the images and the weights.",
        "",
        "| net | height x width | lpips, ms | ours, ms | faster | lpips, MiB | ours, MiB | part "
        "| largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours, theirs = (row["packages"][package] for package in PACKAGES)
        cells = [row["net"], f"{row['height']}x{row['width']}"]
        for key, factor in (("seconds", 1e3), ("bytes", 1 / MIB)):
            cells += [_cell(theirs, key, factor), _cell(ours, key, factor)]
            if key in ours and key in theirs:
                ratio = theirs[key] / ours[key] if key == "seconds" else ours[key] / theirs[key]
                cells.append(f"{ratio:.1f}x" if key == "seconds" else f"{ratio:.0%}")
            else:
                cells.append("-")
        difference = row.get("relative_difference")
        cells.append("-" if difference is None else f"{difference:.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(figures: dict[str, Any], key: str, factor: float) -> str:
    if key not in figures:
        return f"left out: {figures['left_out']}"
    value = figures[key] * factor
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["alex", "squeeze", "vgg"])
    parser.add_argument("--rounds", type=int, default=7, help="calls of each, if they are short")
    parser.add_argument("--most-memory", type=float, default=6.0, help="GiB; more is left out")
    parser.add_argument("--most-seconds", type=float, default=15.0, help="of one call")
    parser.add_argument("--threads", type=int, help="of all; default: torch's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    results: dict[str, Any] = {
        **machine.this_run(),
        "rows": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for net in options.nets:
        most_memory = int(options.most_memory * GIB)
        results["rows"] += measure(net, options.rounds, most_memory, options.most_seconds)
        (options.output / "resolutions.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.output / "resolutions.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
