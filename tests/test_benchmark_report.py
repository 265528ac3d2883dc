"""The page of benchmark results: goals, tables and what is said where a figure is missing."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``benchmarks/report.py``, which is a script's and not installed."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report

    yield report
    for name in set(sys.modules) - before:
        del sys.modules[name]


def case(mode: str = "forward", variant: str = "plain", **changes: Any) -> dict[str, Any]:
    return {
        "case": f"alex-256x256-b4-{mode}-float32-{variant}",
        **{"net": "alex", "height": 256, "width": 256, "batch": 4, "mode": mode},
        **{"dtype": "float32", "variant": variant, "rounds": 9, "absent": {}},
        "seconds": {"lpips_fast": 0.03, "lpips": 0.12, "convolutions": 0.025},
        "times_as_fast_as": {"lpips": 4.0},
        "images_per_second": {"lpips_fast": 133.3, "lpips": 33.3},
        "overhead": 1.2,
        "floor": {"ways": {"torch, contiguous": 5}, "flops": 10**9, "flops_per_second": 4e10},
        **changes,
    }


def results(*cases: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {
            "device_type": "cpu",
            "facts": {"Device": "Some CPU, 2 threads", "torch": "2.13.0"},
            "date": "2026-01-31",
            "command": "python benchmarks/run.py",
            "load": 0.1,
            "peak_flops": {"float32": 1.6e11},
        },
        "cases": list(cases),
        "memory": [],
        "time_by_part": [],
        "precision": [],
    }


def row(page: str, start: str) -> list[str]:
    """The cells of the one table row whose first cell begins so."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, lines
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004123, "0.412"), (0.00123, "1.23"), (0.0123, "12.3"), (0.123, "123"), (12.3, "12300")],
)
def test_times_have_three_digits_that_count(report, seconds: float, text: str) -> None:
    assert report.milliseconds(seconds) == text


def test_a_timing_row_has_every_figure_under_its_heading(report) -> None:
    page = report.markdown(results(case()))
    figures = dict(zip(row(page, "net, images"), row(page, "alex 256², batch 4, float32")))
    assert figures["lpips_fast, ms"] == "30.0"
    assert figures["lpips, ms"] == "120"
    assert figures["times as fast as lpips"] == "4.00×"
    assert figures["images a second"] == "133.3"
    assert figures["convolutions alone, ms"] == "25.0"
    assert figures["overhead"] == "1.20"
    assert figures["their GFLOP/s"] == "40"
    assert figures["of peak"] == "25%"


def test_a_package_that_took_no_part_has_no_column_and_a_reason(report) -> None:
    page = report.markdown(results(case(absent={"piq": "piq is not installed"})))
    assert not any(cell.startswith("piq") for cell in row(page, "net, images"))
    assert "- piq: piq is not installed (alex)" in page


def test_goals_say_yes_no_how_many_or_not_measured(report) -> None:
    reached = case(times_as_fast_as={"lpips": 3.5})
    missed = case(times_as_fast_as={"lpips": 2.9}, batch=1)
    goal = "alex, forward in float32, 256²"
    for cases, verdict in (
        ([reached], "yes"),
        ([missed], "no"),
        ([reached, missed], "1 of 2"),
        ([], "not measured"),
    ):
        cells = row(report.markdown(results(*cases)), goal)
        assert cells[1:3] == ["at least 3.00×", verdict]
    cells = row(report.markdown(results(reached, missed)), goal)
    assert cells[3] == "3.50× (alex 256², batch 4); 2.90× (alex 256², batch 1)"


def test_a_goal_with_many_figures_shows_the_best_and_the_worst(report) -> None:
    cases = [case(batch=b, overhead=o) for b, o in enumerate((1.1, 1.4, 1.05, 1.2, 1.3), start=1)]
    cells = row(report.markdown(results(*cases)), "forward in float32: time over")
    assert cells[1:] == [
        "at most 1.15",
        "2 of 5",
        "1.05 (alex 256², batch 3) to 1.40 (alex 256², batch 2)",
    ]


def test_only_goals_of_the_measured_kind_of_device_are_listed(report) -> None:
    page = report.markdown(results(case()))
    assert "CUDA graph" not in page
    on_cuda = copy.deepcopy(results(case()))
    on_cuda["machine"]["device_type"] = "cuda"
    assert "under a CUDA graph" in report.markdown(on_cuda)


def test_memory_is_shown_in_mebibytes_and_a_failure_by_its_message(report) -> None:
    data = results()
    setting = {"net": "vgg", "height": 1080, "width": 1920, "batch": 1}
    data["memory"] = [
        {**setting, "mode": "step", "bytes": {"lpips_fast": 2**30, "lpips": 4 * 2**30}},
        {**setting, "mode": "forward", "error": "lpips is not installed"},
    ]
    page = report.markdown(data)
    assert row(page, "vgg 1080×1920, batch 1, training step")[1:] == ["1,024", "4,096", "25%"]
    assert row(page, "vgg 1080×1920, batch 1, forward")[3] == "failed: lpips is not installed"
    assert row(page, "training step: peak memory")[2] == "yes"
    assert row(page, "forward: peak memory")[2] == "not measured"


def test_an_encoded_target_is_compared_with_a_plain_step(report) -> None:
    seconds = {"lpips_fast": 0.03, "lpips_fast, plain step": 0.06, "convolutions": 0.02}
    data = results(case("step", "encoded", seconds=seconds))
    assert row(report.markdown(data), "step against a target")[1:3] == ["at most 0.55", "yes"]


def test_shares_of_time_add_up_to_the_whole(report) -> None:
    data = results()
    entry = {"net": "vgg", "height": 256, "width": 256, "batch": 1, "mode": "forward"}
    data["time_by_part"] = [{**entry, "seconds": {"convolution": 0.3, "distance": 0.1}}]
    assert row(report.markdown(data), "vgg 256²")[1:] == ["400", "75.0%", "25.0%"]


def test_precision_shows_a_gradient_only_where_it_was_measured(report) -> None:
    data = results()
    entry = {"net": "vgg", "weights": "random", "pairs": 8, "mean": 0.002, "max": 0.03}
    data["precision"] = [
        {**entry, "way": "dtype=torch.float16", "gradient": 0.1},
        {**entry, "way": "autocast, float16"},
    ]
    page = report.markdown(data)
    shared = ["random weights, 8 pairs"]
    assert row(page, "vgg, dtype")[1:] == ["2.0e-03", "3.0e-02", "1.0e-01", *shared]
    assert row(page, "vgg, autocast")[1:] == ["2.0e-03", "3.0e-02", "", *shared]


def test_a_bfloat16_line_shows_lpips_under_autocast_too(report) -> None:
    seconds = {"lpips_fast": 0.02, "lpips": 0.12, "lpips, bfloat16 autocast": 0.05}
    seconds["convolutions"] = 0.015
    page = report.markdown(results(case(), case(dtype="bfloat16", seconds=seconds)))
    header = row(page, "net, images")
    for dtype, text in (("bfloat16", "50.0"), ("float32", "")):
        figures = dict(zip(header, row(page, f"alex 256², batch 4, {dtype}")))
        assert figures["lpips under autocast, ms"] == text
    assert "Lines in bfloat16" in page
    assert "Lines in bfloat16" not in report.markdown(results(case()))


def test_plots_are_linked_by_their_captions(report) -> None:
    assert "![Speed](cpu-speed.png)" in report.markdown(results(case()), {"Speed": "cpu-speed.png"})


def test_the_head_of_a_page_says_what_ran_where_and_beside_what(report) -> None:
    data = {
        "command": "python benchmarks/bench_export.py",
        "load": 0.25,
        "machine": {"CPU": "Some CPU, 2 cores", "torch": "2.13.0"},
        "packages": {"onnx": "1.23"},
    }
    assert report.head("Files", data, ["torch", "lpips", "onnx"]) == [
        *("# Files", "", "`python benchmarks/bench_export.py`", ""),
        "Some CPU, 2 cores; torch 2.13.0, lpips absent, onnx 1.23; load in the minute before 0.2.",
        "",
    ]
    told = report.head("Files", {**data, "load": None}, ["torch"], "All of them.")[4]
    assert (
        told == "Some CPU, 2 cores; torch 2.13.0; load in the minute before unknown. All of them."
    )


def test_the_tables_of_readme_and_docs_are_those_of_the_results():
    command = [sys.executable, str(BENCHMARKS / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
