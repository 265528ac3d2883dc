"""Results as Markdown, in plain words: a pure function of what :mod:`run` gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from goals import GOALS, Goal, Results, image_size

MIB = 2**20
TRUNKS = {"alex": "AlexNet", "squeeze": "SqueezeNet", "vgg": "VGG16"}
OTHERS = {
    "lpips": "lpips",
    "lpips, bfloat16 autocast": "lpips under autocast",
    "torchmetrics": "torchmetrics",
    "piq": "piq",
}
MODES = {"forward": "Forward", "step": "Training step"}
VARIANTS = {
    "encoded": "step, target encoded before",
    "spatial": "distance maps",
    "compiled": "torch.compile",
    "graphed": "CUDA graph",
}


def markdown(results: Results, plots: dict[str, str] | None = None) -> str:
    """The whole page.

    Args:
        results: ``machine``, ``cases``, ``memory``, ``time_by_part``, ``precision``, as
            ``run.py`` writes them to its JSON file.
        plots: file name, beside the page, by caption.
    """
    machine = results["machine"]
    sections = [
        f"# LPIPS on {machine['facts']['Device']}",
        preamble(machine),
        _section("The goals", goals(results)),
        *(_picture(caption, file) for caption, file in (plots or {}).items()),
        *(_section(MODES[mode], timings(results, mode)) for mode in MODES),
        _section("Other ways of calling", variants(results)),
        _section("Peak memory", memory(results["memory"])),
        _section("Where the time goes", time_by_part(results["time_by_part"])),
        _section("Precision", precision(results["precision"])),
        _section("Not measured here", _absent(results)),
        _section("How it was measured", method(results)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def head(
    title: str, results: Mapping[str, Any], packages: Sequence[str], also: str = ""
) -> list[str]:
    """The first lines of a page of one subject, before what it says itself.

    Args:
        results: with what ``machine.this_run()`` gathers; versions of further packages by name, if
            there are any, under ``packages``.
        packages: whose versions matter.
        also: a sentence on what was measured.
    """
    versions = {**results["machine"], **results.get("packages", {})}
    beside = ", ".join(f"{package} {versions.get(package, 'absent')}" for package in packages)
    load = "unknown" if results["load"] is None else f"{results['load']:.1f}"
    where = f"{versions['CPU']}; {beside}; load in the minute before {load}. {also}"
    return [f"# {title}", "", f"`{results['command']}`", "", where.strip(), ""]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, all others to the right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Three digits that count: ``0.0123`` s is ``12.3``.

    >>> [milliseconds(s) for s in (0.000412, 0.0123, 1.234)]
    ['0.412', '12.3', '1234']
    """
    value = seconds * 1e3
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _picture(caption: str, file: str) -> str:
    return f"![{caption}]({file})"


def preamble(machine: dict[str, Any]) -> str:
    rows = [*machine["facts"].items(), ("Date", machine["date"])]
    rows.append(("Command", f"`{machine['command']}`"))
    if machine.get("load") is not None:
        rows.append(("Load before the run (0 is a quiet machine)", f"{machine['load']:.1f}"))
    for again in machine.get("again", []):
        told = f"`{again['command']}`"
        rows.append(("Disturbed cases measured again", f"{told}, load before {again['load']:.1f}"))
    for dtype, flops in machine["peak_flops"].items():
        giga = f"{flops / 1e9:,.0f}" if flops >= 1e9 else f"{flops / 1e9:.1g}"
        rows.append((f"Large matrix product, {dtype}", f"{giga} GFLOP/s"))
    return "\n".join(f"- {key}: {value}" for key, value in rows)


# ------------------------------------------------------------------------------------ the goals


def goals(results: Results) -> str:
    device_type = results["machine"]["device_type"]
    rows = [_goal_row(goal, results) for goal in GOALS if goal.device_type == device_type]
    return table(["", "wanted", "reached", "measured"], rows)


def _goal_row(goal: Goal, results: Results) -> list[str]:
    values = list(goal.values(results))
    if not values:
        return [goal.text, goal.wanted, "not measured", ""]
    hits = sum(goal.reached(value) for _, value in values)
    verdict = "yes" if hits == len(values) else "no" if hits == 0 else f"{hits} of {len(values)}"
    if len(values) <= 4:
        measured = "; ".join(f"{goal.form.format(v)} ({setting})" for setting, v in values)
    else:
        best, *_, worst = sorted(values, key=lambda x: -x[1] if goal.at_least else x[1])
        measured = " to ".join(f"{goal.form.format(v)} ({setting})" for setting, v in (best, worst))
    return [goal.text, goal.wanted, verdict, measured]


# ------------------------------------------------------------------------------------- timings


def _percent_of_peak(case: dict[str, Any], results: Results) -> str:
    floor, peak = case.get("floor"), results["machine"]["peak_flops"].get(case["dtype"])
    return f"{floor['flops_per_second'] / peak:.0%}" if floor and peak else ""


def timings(results: Results, mode: str) -> str:
    cases = [c for c in results["cases"] if c["mode"] == mode and c["variant"] == "plain"]
    if not cases:
        return ""
    present = [p for p in OTHERS if any(p in c["seconds"] for c in cases)]
    header = ["net, images, dtype", "lpips_fast, ms", *(f"{OTHERS[p]}, ms" for p in present)]
    header += ["times as fast as lpips", "images a second", "convolutions alone, ms"]
    header += ["overhead", "their GFLOP/s", "of peak"]
    rows = []
    for case in cases:
        seconds, floor = case["seconds"], case.get("floor")
        ratio = case["times_as_fast_as"].get("lpips")
        rows.append(
            [
                f"{case['net']} {image_size(case)}, {case['dtype']}",
                milliseconds(seconds["lpips_fast"]),
                *(milliseconds(seconds[p]) if p in seconds else "" for p in present),
                f"{ratio:.2f}×" if ratio is not None else "",
                f"{case['images_per_second']['lpips_fast']:.4g}",
                milliseconds(seconds["convolutions"]) if floor else "",
                f"{case['overhead']:.2f}" if floor else "",
                f"{floor['flops_per_second'] / 1e9:,.0f}" if floor else "",
                _percent_of_peak(case, results),
            ]
        )
    below = (
        "\n\nOverhead: time over that of the convolutions alone, by the fastest way that the "
        "libraries have; below 1 our own (Winograd's algorithm) are faster than these."
    )
    if any(case["dtype"] != "float32" for case in cases):
        below += (
            " Lines in bfloat16 compare our trunk in bfloat16 with the others in float32, "
            "and with lpips under autocast."
        )
    return table(header, rows) + below


def variants(results: Results) -> str:
    cases = [c for c in results["cases"] if c["variant"] != "plain"]
    if not cases:
        return ""
    rows = []
    for case in cases:
        ratios = "; ".join(f"{v:.2f}× as fast as {k}" for k, v in case["times_as_fast_as"].items())
        rows.append(
            [
                f"{VARIANTS[case['variant']]}: {case['net']} {image_size(case)}, "
                f"{MODES[case['mode']].lower()}, {case['dtype']}",
                milliseconds(case["seconds"]["lpips_fast"]),
                ratios,
                f"{case['overhead']:.2f}" if "overhead" in case else "",
            ]
        )
    return table(["", "lpips_fast, ms", "compared", "overhead"], rows)


# --------------------------------------------------------------------------------- other parts


def memory(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    rows = []
    for entry in entries:
        label = f"{entry['net']} {image_size(entry)}, {MODES[entry['mode']].lower()}"
        figures = entry.get("bytes")
        if figures is None:
            rows.append([label, "", "", f"failed: {entry['error']}"])
            continue
        ours, theirs = figures["lpips_fast"], figures["lpips"]
        share = f"{ours / theirs:.0%}" if theirs > 0 else ""
        rows.append([label, f"{ours / MIB:,.0f}", f"{theirs / MIB:,.0f}", share])
    header = ["", "lpips_fast, MiB", "lpips, MiB", "ours of theirs"]
    return table(header, rows) + "\n\nWhat one float32 call adds at its peak to images and weights."


def time_by_part(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    parts = list(entries[0]["seconds"])
    rows = []
    for entry in entries:
        total = sum(entry["seconds"].values())
        shares = (f"{entry['seconds'][part] / total:.1%}" for part in parts)
        label = f"{entry['net']} {image_size(entry)}, {MODES[entry['mode']].lower()}"
        rows.append([label, milliseconds(total), *shares])
    note = "\n\nOperators' own time in float32 by torch's profiler, which slows small ones down."
    return table(["", "in all, ms", *parts], rows) + note


def precision(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    rows = [
        [
            f"{e['net']}, {e['way']}",
            f"{e['mean']:.1e}",
            f"{e['max']:.1e}",
            f"{e['gradient']:.1e}" if "gradient" in e else "",
            f"{e['weights']} weights, {e['pairs']} pairs",
        ]
        for e in entries
    ]
    header = ["", "distance: mean relative error", "largest", "gradient: mean relative error", "of"]
    note = (
        "\n\nErrors against float32 on the example images and distorted copies of them. Where two "
        "values tie but for rounding, max-pooling and ReLU send a gradient elsewhere: hence the "
        "larger errors of gradients, whose loss was scaled by 1024 as is usual in float16."
    )
    return table(header, rows) + note


def _absent(results: Results) -> str:
    lines = list(results.get("absent", []))
    reasons: dict[str, set[str]] = {}
    for case in results["cases"]:
        for package, reason in case["absent"].items():
            reasons.setdefault(f"{package}: {reason}", set()).add(case["net"])
    lines += [f"{reason} ({', '.join(sorted(nets))})" for reason, nets in reasons.items()]
    if results["machine"]["device_type"] == "cpu":
        lines.append("CUDA devices: the same command measures them where there is one")
    return "\n".join(f"- {line}" for line in lines)


def method(results: Results) -> str:
    ways: dict[str, int] = {}
    for case in results["cases"]:
        for way, count in case.get("floor", {}).get("ways", {}).items():
            ways[way] = ways.get(way, 0) + count
    listed = "; ".join(f"{way} ({n})" for way, n in sorted(ways.items(), key=lambda x: -x[1]))
    rounds = [case["rounds"] for case in results["cases"]]
    counted = f"{min(rounds)} to {max(rounds)} rounds a case" if rounds else "no round"
    return (
        "Every round calls everything once, in changing order, in one process; figures are "
        f"medians over {counted}. All packages have the same random weights, and before timing "
        "their results are compared. A forward call runs without a graph; a training step is "
        "forward and the gradient to one of the two images, all else frozen. Images a second "
        "counts pairs. The convolutions alone are those of the trunk with their biases, for both "
        "images, and for a step the input gradients of one, each convolution by the fastest way "
        f"found here: {listed or 'none'}."
    )
