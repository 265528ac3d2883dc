"""Runs the kernels and the operators under AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/sanitize.py              # drivers and a slice of the operators' fuzzer
    python scripts/sanitize.py tests        # all tests, or those named, under the sanitizers

The extension is built with the sanitizers, for this machine's instruction set, into build/sanitize.
Two C++ drivers (tests/sanitize) run the torch-free kernels of csrc/cpu on memory that is exactly as
large as they may touch, and the launch plans of csrc/cuda. Then the tests run that call every
operator with arguments as they should not be. The first finding ends the run: exit code 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = REPOSITORY / "build" / "sanitize"
DRIVERS = REPOSITORY / "tests" / "sanitize"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off"]
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FUZZED = ["tests/kernels/test_operator_arguments.py"]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if found is None:
        sys.exit("the sanitizers need g++, and there is none")
    return found


def run(
    command: list[str],
    environment: dict[str, str] | None = None,
    is_quiet: bool = False,
    folder: Path = REPOSITORY,
) -> None:
    """Runs a command to its end, or ends the run with it; a quiet one speaks when it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE if is_quiet else None,
        stderr=subprocess.STDOUT if is_quiet else None,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout or ''}\nexit code {done.returncode}: {' '.join(command)}")


def compile_all(
    compiler: str, flags: Sequence[str], sources: Sequence[Path], folder: Path, jobs: int
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        run([compiler, *flags, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compiled, sources))


def compile_kernel_driver(
    compiler: str,
    flags: Sequence[str],
    folder: Path,
    jobs: int,
    kernels: Sequence[Path] = (),
) -> Path:
    """The driver of the torch-free CPU kernels, for the instruction set of ``flags``.

    Args:
        kernels: their objects, where they are compiled already.
    """
    headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    sources = [] if kernels else sorted((REPOSITORY / "csrc" / "cpu").glob("*_kernels.cpp"))
    sources.append(DRIVERS / "cpu_kernels.cpp")
    objects = compile_all(compiler, [*flags, *headers], sources, folder, jobs)
    linked = folder / "cpu_kernels"
    run([compiler, *flags, *map(str, kernels), *objects, "-o", str(linked)])
    return linked


def compile_drivers(jobs: int) -> list[Path]:
    """The drivers' paths: of the kernels that the extension was built of, and of the plans."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITIES:
        capability = "DEFAULT"
    flags = [*SANITIZERS, *FLAGS]
    vectors = [
        *CAPABILITIES[capability],
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}=1",
    ]
    built = sorted((BUILD / "base" / "objects").glob(f"*/_cpu_{capability.lower()}"))
    kernels = sorted(max(built, key=lambda path: path.stat().st_mtime).glob("*_kernels.o"))

    def plans() -> Path:
        linked = BUILD / "launch_plans"
        objects = compile_all(compiler(), flags, [DRIVERS / "launch_plans.cpp"], BUILD, 1)
        run([compiler(), *SANITIZERS, *objects, "-o", str(linked)])
        return linked

    with ThreadPoolExecutor(jobs) as pool:
        of_plans = pool.submit(plans)
        return [
            compile_kernel_driver(compiler(), [*flags, *vectors], BUILD, 1, kernels),
            of_plans.result(),
        ]


def build_extension(jobs: int) -> Path:
    """The package with its extension under the sanitizers, beside the usual one."""
    package = BUILD / "package"
    command = [sys.executable, "setup.py", "--quiet", "build"]
    command += ["--build-base", str(BUILD / "base"), "--build-lib", str(package)]
    settings = {"LPIPS_FAST_SANITIZE": "1", "LPIPS_FAST_CUDA": "0", "MAX_JOBS": str(jobs)}
    run(command, settings, is_quiet=True)
    return package


def run_tests(package: Path, tests: list[str]) -> None:
    """pytest on the package under the sanitizers, whose runtime Python itself does not have."""
    # And the C++ library, before which the runtime cannot catch exceptions.
    finds = [[compiler(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    runtime = " ".join(
        subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
        for find in finds
    )
    options = {
        "detect_leaks": "0",  # Python's and torch's own, of the whole process
        "allocator_may_return_null": "1",  # an absurd size is refused, as without the sanitizer
        "max_allocation_size_mb": "3072",
        "abort_on_error": "0",
    }
    environment = {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": ":".join(f"{key}={value}" for key, value in options.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package),
    }
    # From another folder than the repository's, whose package would be found first.
    is_ours = f"import lpips_fast, pathlib; assert pathlib.Path({str(package)!r}) in "
    is_ours += "pathlib.Path(lpips_fast.__file__).parents, lpips_fast.__file__"
    run([sys.executable, "-c", is_ours], environment, folder=BUILD)
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    pytest += ["--capture=sys"]  # what a sanitizer finds is written to the process's own output
    pytest += ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY)]
    pytest += [str(REPOSITORY / test) for test in tests]
    run(pytest, environment, folder=BUILD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tests", nargs="*", help="tests to run in place of the fuzzer's slice")
    parser.add_argument("--rounds", type=int, default=200, help="of the kernels' driver")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    options = parser.parse_args()

    began = time.perf_counter()

    def report(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    package = build_extension(options.jobs)
    report("extension built")
    if not options.tests:
        kernels, plans = compile_drivers(options.jobs)
        report("drivers compiled")
        run([str(kernels), str(options.rounds)])
        run([str(plans), str(100 * options.rounds)])
        report("drivers ran")
    run_tests(package, options.tests or FUZZED)
    report("tests ran: the sanitizers found nothing")


if __name__ == "__main__":
    main()
