"""Everything that needs a GPU, in slices: build, tests, compute-sanitizer, benchmarks.

    python scripts/gpu_check.py            # a slice of at most eight minutes; run it again to go on
    python scripts/gpu_check.py --whole    # to the end at once
    python scripts/gpu_check.py --list     # the steps, and what is known of them

Needs a torch with CUDA, setuptools of any age and a CUDA toolkit; pytest and compute-sanitizer
where their steps are to run. Nothing is downloaded. Every step has a time limit of its own and
leaves its result in <output>/gpu-check-<gpu>.json and .md before the next one starts. A step that
fails does not stop the others; what passed is not run again until sources, torch or GPU change.

Exit code: 0 all passed, 1 something failed, 75 more to do, 77 no CUDA device: nothing was checked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD_FILES = ("setup.py", "ninja_build.py", "cuda_toolkit.py")
SLICE = 460  # seconds; a machine that ends a command after ten minutes is left some of them
MORE_TO_DO, NO_DEVICE = 75, 77
PYTHON = sys.executable
DTYPES = ("float32", "float16", "bfloat16", "float64")
TAIL = 4000  # characters of a step's output that are kept

# tests/kernels/test_cuda.py, in parts that take minutes each.
CUDA_TESTS = {
    "widths": "test_every_width",
    "convolutions": "TestConvolution",
    "whole trunks": "TestWholeTrunk",
    "trunk operators": "TestTrunkOperators",
}


@dataclass
class Step:
    """One step: a command with a time limit, or why it cannot run here."""

    name: str
    command: Sequence[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass
class Result:
    """passed, failed, timed out, skipped, or unfinished: a step that goes on when run again."""

    status: str
    seconds: float
    output: str

    @property
    def is_done(self) -> bool:
        return self.status in ("passed", "skipped")


# ----------------------------------------------------------------------------------- the steps


def steps(capabilities: str, output: Path, quick: bool) -> list[Step]:
    """All steps, in order: what others stand on comes first."""
    every_kernel = [PYTHON, "scripts/gpu_every_kernel.py"]
    found = [
        Step(
            f"build for {capabilities}",
            [PYTHON, __file__, "--build-here"],
            440,
            {"LPIPS_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capabilities},
        ),
        Step("every kernel once", every_kernel, 120),
    ]
    found += test_steps()
    found += sanitizer_steps(every_kernel)
    bench = [PYTHON, "benchmarks/bench_cuda_kernels.py", "--output", str(output), "--budget", "400"]
    found.append(Step("kernel benchmarks", bench + ["--quick"] * quick, 450))
    return found


def test_steps() -> list[Step]:
    missing = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    cuda = "tests/kernels/test_cuda.py"
    parts = [(f"CUDA tests: {name}", [cuda, "-k", part]) for name, part in CUDA_TESTS.items()]
    others = " and ".join(f"not {part}" for part in CUDA_TESTS.values())
    parts.append(("CUDA tests: the rest", [cuda, "-k", others]))
    tests = REPOSITORY / "tests"
    folders = sorted(p.name for p in tests.iterdir() if any(p.glob("test_*.py")))
    for name in folders:
        parts.append((f"tests of {name}", [f"tests/{name}", "--ignore", cuda]))
    alone = sorted(f"tests/{p.name}" for p in tests.glob("test_*.py"))
    parts.append(("tests of the package", alone))
    return [Step(name, [*pytest, *arguments], 440, missing=missing) for name, arguments in parts]


def sanitizer_steps(every_kernel: Sequence[str]) -> list[Step]:
    """memcheck, racecheck, synccheck and initcheck, a dtype at a time."""
    sanitizer = find_sanitizer()
    missing = None if sanitizer else "compute-sanitizer is not installed"
    found = []
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        options = [*sanitizer_options(sanitizer), "--tool", tool, "--error-exitcode", "1"]
        if tool == "memcheck":
            options += ["--report-api-errors", "no"]  # torch asks what fails, and handles it
        for dtype in DTYPES:
            command = [sanitizer or "compute-sanitizer", *options, *every_kernel, "--dtype", dtype]
            # Without torch's caching allocator a step outside a tensor is outside an allocation.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Step(f"{tool}, {dtype}", command, 400, environment, missing))
    return found


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in homes if home]
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    return shutil.which("compute-sanitizer", path=path)


def sanitizer_options(sanitizer: str | None) -> list[str]:
    """To look at our kernels alone, where this version can choose: torch's are torch's to judge."""
    if sanitizer is None:
        return []
    words = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-name", "--kernel-regex"):
        if option in words:
            return [option, "kns=lpips_fast"]
    return []


def build() -> None:
    """The libraries beside the package, for this machine's GPUs alone.

    In a folder without pyproject.toml: its licence field is an error to setuptools before 77, and
    what it asks for is not needed here.
    """
    stage = REPOSITORY / "build" / "gpu-check"
    stage.mkdir(parents=True, exist_ok=True)
    for name in ("csrc", "lpips_fast"):
        link = stage / name
        if not link.is_symlink():
            link.symlink_to(REPOSITORY / name, target_is_directory=True)
    for name in BUILD_FILES:
        shutil.copy(REPOSITORY / name, stage / name)
    os.chdir(stage)
    os.execv(PYTHON, [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"])


# --------------------------------------------------------------------------------- running them


def run(step: Step) -> Result:
    """Runs a step to its end or its limit, and prints what it prints."""
    if step.missing is not None:
        return Result("skipped", 0, step.missing)
    environment = {**os.environ, **step.environment, "LPIPS_FAST_REQUIRE_CUDA": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment["PIP_NO_INDEX"] = "1"
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=step.limit)
        codes = {0: "passed", MORE_TO_DO: "unfinished"}
        status = codes.get(process.returncode, "failed")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        output, _ = process.communicate()
        status = "timed out"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    print(output, end="" if output.endswith("\n") else "\n", flush=True)
    return Result(status, time.monotonic() - start, output[-TAIL:])


class Record:
    """What is known of the steps, in a file: for one state of sources, torch and GPU."""

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        self.path, self.facts = path, facts
        self.results: dict[str, Result] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["facts"] == facts:
                self.results = {name: Result(**kept) for name, kept in kept["results"].items()}

    def add(self, name: str, result: Result) -> None:
        self.results[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        results = {name: asdict(result) for name, result in self.results.items()}
        text = json.dumps({"facts": self.facts, "results": results}, indent=1) + "\n"
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(self.path)  # whole or not at all, where the machine stops
        self.path.with_suffix(".md").write_text(self.page())

    def page(self) -> str:
        lines = [f"# GPU check on {self.facts['device']}", ""]
        lines += [f"- {key}: {value}" for key, value in self.facts.items()]
        lines += ["", "| step | result | seconds |", "|------|--------|--------:|"]
        for name, result in self.results.items():
            note = f" ({result.output})" if result.status == "skipped" else ""
            lines.append(f"| {name} | {result.status}{note} | {result.seconds:.0f} |")
        for name, result in self.results.items():
            if result.status in ("failed", "timed out"):
                lines += ["", f"## {name}", "", "```", result.output.rstrip(), "```"]
        return "\n".join(lines) + "\n"


def go_on(
    todo: Sequence[Step],
    record: Record,
    seconds: float | None,
    runner: Callable[[Step], Result] = run,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs what has not passed, as far as the time goes; returns the exit code.

    Args:
        seconds: of a slice; a step starts only where its limit still fits. ``None``: no end.
    """
    start = clock()
    ran: set[str] = set()
    while True:
        left = [s for s in todo if s.name not in ran and not _is_done(record, s)]
        if not left:
            break
        step = left[0]
        if ran and seconds is not None and clock() - start + step.limit > seconds:
            print(f"\n{len(left)} steps are left; run it again to go on")
            return MORE_TO_DO
        print(f"\n=== {step.name} ===", flush=True)
        result = runner(step)
        record.add(step.name, result)
        print(f"=== {step.name}: {result.status}, {result.seconds:.0f} s ===", flush=True)
        if result.status != "unfinished":
            ran.add(step.name)
        elif seconds is not None:
            return MORE_TO_DO
    for step in todo:
        known = record.results[step.name]
        if known.status != "passed":
            print(f"{known.status}: {step.name}")
    return 0 if all(record.results[step.name].is_done for step in todo) else 1


def _is_done(record: Record, step: Step) -> bool:
    known = record.results.get(step.name)
    # What was skipped may have come since.
    return known is not None and known.status == "passed"


# -------------------------------------------------------------------------------- this machine


def device_facts() -> dict[str, str] | None:
    """The GPU, and what a result depends on; None where there is no GPU."""
    code = """
import json, torch
if torch.cuda.is_available():
    count = range(torch.cuda.device_count())
    found = sorted({torch.cuda.get_device_capability(i) for i in count})
    print(json.dumps({
        "device": torch.cuda.get_device_name(0), "devices": str(len(count)),
        "capabilities": ";".join(f"{a}.{b}" for a, b in found),
        "torch": torch.__version__, "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }))
"""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return None
    return {**json.loads(lines[-1]), "Python": sys.version.split()[0], "sources": sources_digest()}


def sources_digest() -> str:
    """Changes with whatever a result may depend on."""
    digest = hashlib.sha256()
    for folder, pattern in (
        *(("csrc", "**/*"), ("lpips_fast", "**/*.py"), ("tests", "**/*.py")),
        *(("scripts", "*.py"), ("benchmarks", "*.py")),
        *((".", name) for name in BUILD_FILES),
    ):
        for path in sorted((REPOSITORY / folder).glob(pattern)):
            if path.is_file():
                digest.update(str(path.relative_to(REPOSITORY)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="to the end, however long it takes")
    parser.add_argument("--slice", type=float, default=SLICE, help=f"seconds (default {SLICE})")
    parser.add_argument("--only", metavar="WORDS", help="steps whose name contains these")
    parser.add_argument("--quick", action="store_true", help="benchmarks of one size alone")
    parser.add_argument("--list", action="store_true", help="name the steps, and run none")
    parser.add_argument("--restart", action="store_true", help="forget what has passed")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--build-here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    if options.build_here:
        build()
    facts = device_facts()
    if facts is None:
        print(
            f"gpu_check.py: {PYTHON} finds no torch with a CUDA device; nothing was checked",
            file=sys.stderr,
        )
        sys.exit(NO_DEVICE)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = options.output.resolve() / f"gpu-check-{slug}.json"
    if options.restart:
        path.unlink(missing_ok=True)
    record = Record(path, facts)
    todo = steps(facts["capabilities"], options.output.resolve(), options.quick)
    if options.only:
        todo = [step for step in todo if options.only in step.name]
        if not todo:
            sys.exit(f"gpu_check.py: no step's name contains {options.only!r}; see --list")
    if options.list:
        for step in todo:
            known = record.results.get(step.name)
            print(f"{known.status if known else 'to do':12} {step.name}")
        return
    sys.exit(go_on(todo, record, None if options.whole else options.slice))


if __name__ == "__main__":
    main()
