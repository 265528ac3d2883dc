"""Writes the tables and plots of README and docs from the results that lie here.

    python benchmarks/tables.py            # a few seconds; nothing is measured
    python benchmarks/tables.py --check    # writes nothing, fails where a table is not the results'

``results/*.json`` are what ``run.py`` and the ``bench_*.py`` measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench_compile
import bench_compression
import bench_export
import bench_host_cost
import bench_layers
import bench_normalizations
import bench_pairwise
import bench_resolutions
import bench_training
import plots
import report
from goals import Results

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from generated_text import read_part, write_part  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
#: The machine whose results README and docs show, and one with wider vectors.
MACHINE, MACHINE_WITH_AVX512 = "amd-epyc-avx2-2-threads", "amd-epyc-avx512-2-threads"


class Part(NamedTuple):
    """A generated part of a page: ``text`` of the file of results ``source``."""

    page: Path
    name: str
    source: str
    text: Callable[[Results], str]


def readme(results: Results) -> str:
    """Three lines: one trunk each, float32, 256², its largest batch."""
    rows, compiled = [], load("compile")
    for net, words in report.TRUNKS.items():
        cells = []
        for mode in ("forward", "step"):
            case = max(
                (
                    case
                    for case in results["cases"]
                    if (case["net"], case["mode"], case["variant"]) == (net, mode, "plain")
                    and (case["dtype"], case["height"]) == ("float32", 256)
                ),
                key=lambda case: case["batch"],
            )
            ours, theirs = (
                report.milliseconds(case["seconds"][package]) for package in ("lpips_fast", "lpips")
            )
            cells.append(f"{ours} ms, {case['times_as_fast_as']['lpips']:.1f}× ({theirs} ms)")
            cells.append(f"{bench_compile.compiled_ratio(compiled, net, 256, mode):.1f}×")
        memory = next(
            entry["bytes"]
            for entry in results["memory"]
            if (entry["net"], entry["height"], entry["mode"]) == (net, 256, "step")
        )
        cells.append(f"{memory['lpips_fast'] / memory['lpips']:.0%}")
        pairs = f"{case['batch']} pairs" if case["batch"] > 1 else "1 pair"
        rows.append([f"{words}, {pairs} of 256²", *cells])
    device = results["machine"]["facts"]["Device"]
    head = [device, "forward", "compiled", "training step", "compiled", "peak memory of a step"]
    return (
        f"{report.table(head, rows)}\n\nTimes as fast as the unmodified `lpips`, whose time is in "
        "brackets; and both under `torch.compile`, `lpips` in the faster of two memory orders. "
        "Float32, medians: [docs/performance.md](docs/performance.md)."
    )


def without_title(text: str) -> str:
    """A page of results as a part of another: no title, no pictures, headings one level down."""
    lines = text.strip().splitlines()[1:]
    kept = [line for line in lines if not line.startswith("![")]
    return "\n".join(f"#{line}" if line.startswith("## ") else line for line in kept).strip()


def of_subject(table: Callable[[dict[str, Any]], str]) -> Callable[[Results], str]:
    return lambda results: without_title(table(results))


PERFORMANCE: dict[str, Callable[[Results], str]] = {
    "machine": lambda results: report.preamble(results["machine"]),
    "goals": report.goals,
    "forward": lambda results: report.timings(results, "forward"),
    "step": lambda results: report.timings(results, "step"),
    "variants": report.variants,
    "memory": lambda results: report.memory(results["memory"]),
    "time by part": lambda results: report.time_by_part(results["time_by_part"]),
    "precision": lambda results: report.precision(results["precision"]),
    "method": report.method,
}

PARTS = (
    Part(REPOSITORY / "README.md", "readme", MACHINE, readme),
    *(Part(DOCS / "performance.md", name, MACHINE, text) for name, text in PERFORMANCE.items()),
    *(
        Part(DOCS / "performance.md", f"{name}, AVX512", MACHINE_WITH_AVX512, PERFORMANCE[name])
        for name in ("machine", "forward", "step")
    ),
    *(
        Part(DOCS / page, name, name, of_subject(table))
        for page, name, table in (
            ("performance.md", "compile", bench_compile.table),
            ("performance.md", "host_cost", bench_host_cost.table),
            ("performance.md", "resolutions", bench_resolutions.table),
            ("pairs.md", "pairwise", bench_pairwise.table),
            ("judgements.md", "training", bench_training.table),
            ("analysis.md", "normalizations", bench_normalizations.markdown),
            ("choice.md", "layers", bench_layers.table),
            ("compression.md", "compression", bench_compression.markdown),
            ("export.md", "export", bench_export.table),
        )
    ),
)


def load(source: str) -> Results:
    return json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    options = parser.parse_args()

    stale = []
    for part in PARTS:
        text = part.text(load(part.source))
        if read_part(part.page, part.name) != text:
            stale.append(f"{part.page.relative_to(REPOSITORY)}: {part.name}")
            if not options.check:
                write_part(part.page, part.name, text)
    if options.check:
        if stale:
            sys.exit("not the results' any more: " + "; ".join(stale))
        return
    for line in stale:
        print(f"written: {line}")
    for file in plots.draw(load(MACHINE), DOCS / "images" / "cpu").values():
        print(f"written: docs/images/{file}")
    bench_compression.draw(load("compression"), DOCS / "images" / "compression.png")
    print("written: docs/images/compression.png")


if __name__ == "__main__":
    main()
