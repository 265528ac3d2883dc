"""Results of the CUDA kernels as Markdown: a pure function of what bench_cuda_kernels gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from report import table

Results = dict[str, Any]
Case = dict[str, Any]

DIRECTIONS = {"forward": "Forward", "backward": "Backward, gradients of both features"}
# Stated for calls that move so many bytes: below, starting and ending a launch take their share.
GOAL_BYTES = 60_000_000
GOALS = {
    "forward": {"share_of_copy": 0.85, "times_eager": 8.0, "times_compiled": 2.0},
    "backward": {"share_of_copy": 0.85, "times_eager": 6.0},
}
GOAL_TEXT = {
    "share_of_copy": "of the measured copy bandwidth",
    "times_eager": "times as fast as the original's formula in eager torch",
    "times_compiled": "times as fast as the original's formula under torch.compile",
}
MOST_LAUNCHES, MOST_MICROSECONDS = 3, 15.0


def markdown(results: Results) -> str:
    """The whole page; what was not measured is left empty and named as such."""
    facts = [f"- {key}: {value}" for key, value in results["facts"].items()]
    facts.append(
        f"- Device copy, bytes read and written: {results['copy_bandwidth'] / 1e9:,.0f} GB/s"
    )
    facts.append(f"- Command: `{results['command']}`")
    sections = [
        f"# CUDA kernels on {results['facts']['Device']}",
        "\n".join(facts),
        "## The goals\n\n" + table(["", "wanted", "reached", "measured"], _goals(results)),
        "## Whole distance, AlexNet's layers at 64², batch 1\n\n" + _whole(results["whole"]),
    ]
    if results.get("trunk"):
        header = ["the trunk's kernels", "dtype", "µs", "of copy", "× torch's operators"]
        sections.append("## The trunk\n\n" + table(header, map(_trunk_row, results["trunk"])))
    for dtype in dict.fromkeys(case["dtype"] for case in results["cases"]):
        for direction, title in DIRECTIONS.items():
            rows = [
                _row(case)
                for case in results["cases"]
                if case["dtype"] == dtype and case["direction"] == direction
            ]
            if rows:
                header = ["net, images, layer", "features", "µs", "GB/s", "of copy"]
                header += ["× eager", "× compiled"]
                sections.append(f"## {title}, {dtype}\n\n" + table(header, rows))
    sections.append(
        "## How it was measured\n\n"
        "Each figure is the time of one call inside a CUDA graph that makes it on several sets of "
        "inputs, together larger than three times the L2 cache, so that features come from "
        "memory; the median of several replays by CUDA events. Bytes are those that must move: "
        "each feature read once, each gradient written once. Eager and compiled are the "
        "original's formula on the same channels-last features, in the same dtype, measured in "
        "the same way. An empty field was not measured."
    )
    return "\n\n".join(sections) + "\n"


def is_goal_case(case: Case) -> bool:
    return case["bytes"] >= GOAL_BYTES


def _goals(results: Results) -> Iterator[list[str]]:
    for direction, goals in GOALS.items():
        for key, bound in goals.items():
            cases = [
                case
                for case in results["cases"]
                if is_goal_case(case) and case["direction"] == direction and case.get(key)
            ]
            form = "{:.0%}" if key == "share_of_copy" else "{:.1f}×"
            size = f"from {GOAL_BYTES / 1e6:.0f} MB on"
            text = f"{DIRECTIONS[direction]}, {size}: {GOAL_TEXT[key]}"
            if not cases:
                yield [text, f"at least {form.format(bound)}", "not measured", ""]
                continue
            hits = sum(case[key] >= bound for case in cases)
            verdict = "yes" if hits == len(cases) else f"{hits} of {len(cases)}"
            values = sorted(case[key] for case in cases)
            span = f"{form.format(values[0])} to {form.format(values[-1])}"
            yield [text, f"at least {form.format(bound)}", verdict, span]
    whole = results["whole"]
    text = "Alex at 64², batch 1: the whole distance"
    launches = whole.get("launches")
    reached = "not measured" if launches is None else _yes(launches <= MOST_LAUNCHES)
    yield [f"{text}, launches", f"at most {MOST_LAUNCHES}", reached, str(launches or "")]
    time = whole["seconds"] * 1e6
    wanted = f"at most {MOST_MICROSECONDS:.0f} µs"
    yield [f"{text}, device time", wanted, _yes(time <= MOST_MICROSECONDS), f"{time:.1f} µs"]


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _whole(whole: dict[str, Any]) -> str:
    launches = whole.get("launches")
    counted = "not counted (the profiler saw no kernels)" if launches is None else str(launches)
    return (
        f"- Device time: {whole['seconds'] * 1e6:.1f} µs, inputs in the L2 cache\n"
        f"- Kernel launches: {counted}"
    )


def _trunk_row(line: dict[str, Any]) -> list[str]:
    return [
        line["name"],
        line["dtype"],
        f"{line['seconds'] * 1e6:.1f}",
        f"{line['share_of_copy']:.0%}" if line["share_of_copy"] else "",
        f"{line['times_torch']:.1f}",
    ]


def _row(case: Case) -> list[str]:
    channels, height, width = case["shape"][1:]
    return [
        f"{case['net']} {case['pixels']}², batch {case['batch']}, {case['layer']}",
        f"{channels} × {height} × {width}",
        f"{case['seconds'] * 1e6:.1f}",
        f"{case['bytes'] / case['seconds'] / 1e9:,.0f}",
        f"{case['share_of_copy']:.0%}",
        f"{case['times_eager']:.1f}" if case.get("times_eager") else "",
        f"{case['times_compiled']:.1f}" if case.get("times_compiled") else "",
    ]
