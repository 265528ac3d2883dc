"""Compiles the CUDA kernels for every supported GPU, without one, and reads the compiler's report.

    python scripts/check_cuda_compile.py [--arch 90 --arch 120] [--jobs 2]

Warnings are errors; so are register spills and local-memory stack in any kernel, and registers
that would cost the hot kernels a block on a multiprocessor. The torch side is compiled, linked
against the installed torch (its build without CUDA included) and loaded.
Exit code: 0 passed, 1 failed, 77 skipped because there is no CUDA toolkit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY))
from cuda_toolkit import cuda_home  # noqa: E402

ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
SKIPPED = 77
# The kernels of the trunks' own layers: registers a thread above which a block fewer fits.
REGISTER_LIMITS = {
    r"channels_last_distance<(float|__half|__nv_bfloat16), true>": 64,
    r"channels_last_distance<double, true>": 80,
    r"channels_last_backward<(float|__half|__nv_bfloat16), true, false, (true|false)>": 80,
    r"channels_first_distance<(float|__half|__nv_bfloat16), true>": 64,
    r"channels_first_backward<\w+, \w+, \w+>": 128,
}
OPERATORS = [
    *("distance", "distance_backward", "distance_map", "distance_map_backward", "tap_backward"),
    "masked_distance",
    *("bias_relu_", "scale_images", "scale_images_flagged", "max_pool2d", "max_pool2d_backward"),
]


# -------------------------------------------------------------------------- the compiler's report


@dataclass
class KernelReport:
    """What ptxas says of one kernel on one architecture."""

    architecture: str
    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_report(text: str) -> list[KernelReport]:
    """Reads the output of ``nvcc -Xptxas -v``."""
    found = list(_REPORT.finditer(text))
    names = "\n".join(dict.fromkeys(match["name"] for match in found))
    demangled = names
    if shutil.which("c++filt"):
        demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True).stdout
    readable = dict(zip(names.split("\n"), demangled.split("\n")))
    reports = []
    for match in found:
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        reports.append(
            KernelReport(
                architecture=match["arch"],
                kernel=short_name(readable[match["name"]]),
                registers=int(match["registers"]),
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=int(match["stack"]),
                spill_bytes=int(match["stores"]) + int(match["loads"]),
            )
        )
    return reports


def short_name(demangled: str) -> str:
    """``channels_last_backward<float, true, false>`` out of the full signature."""
    name = demangled.replace("lpips_fast::cuda::", "").removeprefix("void ")
    name = re.sub(r"\(\w+Tasks?\)$", "", name)
    return re.sub(r"\(bool\)([01])", lambda m: "true" if m[1] == "1" else "false", name)


def table(reports: list[KernelReport]) -> str:
    """Registers per kernel and architecture, as Markdown."""
    architectures = sorted({r.architecture for r in reports}, key=lambda a: int(a.rstrip("af")))
    rows: dict[str, dict[str, KernelReport]] = defaultdict(dict)
    for report in reports:
        rows[report.kernel][report.architecture] = report
    width = max(len(kernel) for kernel in rows)
    lines = [
        f"| {'registers':{width}} | shared | "
        + " | ".join(f"{'sm_' + a:>6}" for a in architectures)
        + " |",
        f"|{'-' * (width + 2)}|-------:|" + "|".join("-------:" for _ in architectures) + "|",
    ]
    for kernel in sorted(rows):
        shared = max(report.shared_bytes for report in rows[kernel].values())
        cells = []
        for architecture in architectures:
            found = rows[kernel].get(architecture)
            mark = "!" if found and found.stack_bytes + found.spill_bytes else ""
            cells.append(f"{mark + str(found.registers) if found else '':>6}")
        lines.append(f"| {kernel:{width}} | {shared:6} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spills(reports: list[KernelReport]) -> list[str]:
    return [
        f"{r.kernel} on sm_{r.architecture}: {r.stack_bytes} bytes of stack, "
        f"{r.spill_bytes} bytes of spills"
        for r in reports
        if r.stack_bytes or r.spill_bytes
    ]


def excess_registers(reports: list[KernelReport]) -> list[str]:
    return [
        f"{r.kernel} on sm_{r.architecture}: {r.registers} registers, more than {limit}"
        for r in reports
        for pattern, limit in REGISTER_LIMITS.items()
        if re.fullmatch(pattern, r.kernel) and r.registers > limit
    ]


# --------------------------------------------------------------------------- compile, link, load


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        print(output, file=sys.stderr)
        sys.exit(f"failed: {' '.join(command)}")
    return output


def sources() -> list[Path]:
    """The files that are compiled; what they include goes with them."""
    return sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))


def compile_kernels(
    home: Path, architectures: list[str], jobs: int, source: Path, target: Path
) -> str:
    from torch.utils.cpp_extension import include_paths

    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    gencode.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    return run(
        [
            str(home / "bin" / "nvcc"),
            *["-c", "-O3", "-std=c++20", "-DUSE_CUDA", "-Xptxas=-v", "-Werror=all-warnings"],
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
            f"--threads={jobs}",
            *gencode,
            *[f"-isystem={path}" for path in include_paths()],
            str(source),
            "-o",
            str(target),
        ]
    )


def link(home: Path, objects: list[Path], target: Path) -> None:
    from torch.utils.cpp_extension import library_paths

    # The CUDA runtime is static, so that the library also loads where there is none.
    run(
        [
            str(home / "bin" / "nvcc"),
            *["-shared", *map(str, objects), "-o", str(target), "-cudart=static"],
            *[f"-L{path}" for path in (home / "lib", *library_paths())],
            *["-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"],
        ]
    )


def build_schemas(target: Path) -> None:
    """The operators' schemas alone, to load the CUDA library beside without the package."""
    from torch.utils.cpp_extension import include_paths, library_paths

    run(
        [
            os.environ.get("CXX", "g++"),
            *["-shared", "-fPIC", "-O1", "-std=c++20"],
            *[f"-isystem{path}" for path in include_paths()],
            "csrc/ops.cpp",
            *["-o", str(target)],
            *[f"-L{path}" for path in library_paths()],
            *["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"],
        ]
    )


def load(schemas: Path, library: Path) -> None:
    """Loads both in a fresh process, as the package does; undefined symbols would show here."""
    code = f"""
import torch
torch.ops.load_library({str(schemas)!r})
torch.ops.load_library({str(library)!r})
for name in {OPERATORS!r}:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("lpips_fast::" + name, "CUDA"), name + " has no CUDA implementation"
"""
    run([sys.executable, "-c", code])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="only this one, for example 90; repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default 2)")
    options = parser.parse_args()

    home = cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        print("SKIPPED: no CUDA toolkit (set CUDA_HOME, or install the extra cuda-build)")
        sys.exit(SKIPPED)

    with tempfile.TemporaryDirectory() as folder:
        library, schemas = Path(folder, "_cuda.so"), Path(folder, "_schemas.so")
        start = time.monotonic()
        objects, reports = [], []
        for source in sources():
            objects.append(Path(folder, source.stem + ".o"))
            report = compile_kernels(
                home, options.arch or ARCHITECTURES, options.jobs, source, objects[-1]
            )
            reports += parse_report(report)
        print(table(reports))
        print(f"compiled in {time.monotonic() - start:.0f} s by {home}/bin/nvcc")
        if not reports:
            sys.exit("failed: the compiler's report names no kernel")
        failures = spills(reports) + excess_registers(reports)
        if failures:
            sys.exit("failed: the register budget\n" + "\n".join(failures))
        link(home, objects, library)
        build_schemas(schemas)
        load(schemas, library)
        print("linked and loaded: all operators have a CUDA implementation")
        whole = library.read_bytes()
        print(
            f"the library, of {len(options.arch or ARCHITECTURES)} architectures: "
            f"{len(whole) / 1e6:.1f} MB, {len(zlib.compress(whole)) / 1e6:.1f} MB in a wheel"
        )


if __name__ == "__main__":
    main()
