"""Measures LPIPS on this machine, and writes a page, its figures and its plots.

``python benchmarks/run.py`` takes about twelve minutes on two cores, ``--quick`` about two. Run it
on a quiet machine. It needs the packages of ``tests/reference-requirements.txt``, and piq, each
installed with ``--no-deps``; one that is missing is left out, and named in the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import peak_memory
import plots
import precision
import report
import time_by_part
import torch
from cases import all_cases

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the cases that matter most")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of results")
    parser.add_argument(
        "-k",
        dest="only",
        metavar="EXPRESSION",
        help="cases, as pytest selects; they replace those of an earlier run",
    )
    parser.add_argument("--seconds-per-case", type=float, help="time to spend on a case")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    results: dict[str, Any] = {
        "machine": {
            "device_type": device.type,
            "facts": machine.facts(device),
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
            "load": machine.load(),
            "peak_flops": {
                name: machine.peak_flops(device, getattr(torch, name))
                for name in ("float32", "bfloat16")
            },
        }
    }
    _say("Timings")
    cases, exit_code = _run_pytest(options)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / (machine.slug(device) + ("-quick" if options.quick else ""))
    file = stem.with_suffix(".json")
    if options.only and file.exists():
        # A disturbed case is measured again; the rest of the page stays.
        command, load = results["machine"]["command"], results["machine"]["load"]
        results = json.loads(file.read_text())
        again = {case["case"]: case for case in cases}
        results["cases"] = [again.pop(c["case"], c) for c in results["cases"]] + [*again.values()]
        results["machine"].setdefault("again", []).append({"command": command, "load": load})
    else:
        results["cases"] = cases
        measured = {case["case"] for case in cases}
        results["absent"] = [
            f"{case.name}: skipped or failed, as the output of the run says"
            for case in all_cases(device.type, options.quick)
            if case.name not in measured and not options.only
        ]
        _say("Peak memory")
        results["memory"] = peak_memory.measure_all(device.type, options.quick)
        _say("Time by part")
        results["time_by_part"] = time_by_part.measure_all(device)
        _say("Precision")
        results["precision"] = precision.measure_all(device, options.quick)
    file.write_text(json.dumps(results, indent=1) + "\n")
    pictures = plots.draw(results, stem)
    page = stem.with_suffix(".md")
    page.write_text(report.markdown(results, pictures))
    _say(f"Written: {page}")
    sys.exit(exit_code)


def _run_pytest(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """The extra information of every case that ran, and pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", str(HERE / "bench_lpips.py"), "-v", "-rs"]
        command += ["--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
        command += ["--benchmark-json", str(file)]
        if options.quick:
            command.append("--quick")
        if options.only:
            command += ["-k", options.only]
        if options.seconds_per_case is not None:
            command += ["--seconds-per-case", str(options.seconds_per_case)]
        exit_code = subprocess.run(command, cwd=HERE.parent).returncode
        if not file.exists() or not file.read_text().strip():
            return [], exit_code or 1
        benchmarks = json.loads(file.read_text())["benchmarks"]
    cases = [benchmark["extra_info"] for benchmark in benchmarks]
    return [case for case in cases if "seconds" in case], exit_code


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    main()
