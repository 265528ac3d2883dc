"""CUDA kernels on the CPU: what the tests of csrc/cuda through tests/emulation share."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

REPOSITORY = Path(__file__).resolve().parents[1]
CHANNELS_LAST, CHANNELS_FIRST = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
THREAD_ORDERS = [0, 1, 2]  # ascending, descending, shuffled

# Fresh inputs every run; a failing test prints the seed that it drew.
SEEDS = random.Random()


def fresh_seed() -> int:
    seed = SEEDS.randrange(2**31)
    print(f"seed {seed}")
    return seed


def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h, in a toolkit or in NVIDIA's Python packages."""
    path = REPOSITORY / "cuda_toolkit.py"
    spec = importlib.util.spec_from_file_location("cuda_toolkit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    home = module.cuda_home()
    return home / "include" if home is not None else None


FLAGS = [
    *("-O2", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # Fibers switch by longjmp, which may not be fortified. No fused multiply-add: unit_vectors.cuh.
    *("-Wno-clobbered", "-U_FORTIFY_SOURCE", "-ffp-contract=off"),
    "-Wno-attributes",  # torch's stable ABI is hidden, and what holds a tensor of it is not
    "-fno-gnu-unique",  # shared memory is a library's own, also where another has the same kernel
]
# The compiler reports every load and store; race_detector.cpp listens, not the sanitizer's library.
INSTRUMENTED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
# Kernels, torch's side of their operators, and the kernels with planted faults; the largest first.
LIBRARIES = ["run_distance", "run_trunk", "run_planted_faults"]
RUNTIME = ["fibers", "race_detector"]


@functools.cache
def emulation_library(name: str) -> Path:
    """One of LIBRARIES, out of tests/emulation; skips where there is no compiler or toolkit."""
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulation needs g++, and there is none")
    headers = cuda_headers()
    if headers is None or not (headers / "cuda_fp16.h").exists():
        pytest.skip("the CUDA emulation needs the toolkit's cuda_fp16.h, and no toolkit is here")
    folder, objects = _start_compiling(headers)
    library = folder / f"{name}.so"
    torchs = [f"-L{path}" for path in cpp_extension.library_paths()]
    torchs += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    # -Bsymbolic: what the library defines is what its own calls reach.
    link = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
    _run(["g++", *link, *[objects[o].result() for o in (name, *RUNTIME)], *torchs, "-o", library])
    return library


@functools.cache
def _start_compiling(headers: Path) -> tuple[Path, dict[str, Future[Path]]]:
    """Compiles everything in tests/emulation, two at a time, while tests go on."""
    folder = Path(tempfile.mkdtemp(prefix="lpips-fast-emulation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    includes = [str(headers), *cpp_extension.include_paths()]
    flags = [*FLAGS, "-DUSE_CUDA", *(f"-isystem{path}" for path in includes)]

    def compile_object(name: str) -> Path:
        source, target = REPOSITORY / "tests/emulation" / f"{name}.cpp", folder / f"{name}.o"
        instrumented = [] if name in RUNTIME else INSTRUMENTED
        cache = ["ccache"] if shutil.which("ccache") else []
        _run([*cache, "g++", *flags, *instrumented, "-c", source, "-o", target])
        return target

    pool = ThreadPoolExecutor(2)
    return folder, {name: pool.submit(compile_object, name) for name in (*LIBRARIES, *RUNTIME)}


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kernel_names(library: Path) -> dict[int, str]:
    """Every instantiation of a kernel in a library, by its place in it: ``bias_relu<float, 4>``."""
    listing = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True)
    names = {}
    for line in listing.stdout.splitlines():
        address, _, symbol = line.partition(" ")
        # Functions of internal linkage whose only parameter is a task: so are kernels declared.
        found = re.fullmatch(r"t void (?:\w+::)*(\w+(?:<.*>)?)\(\w[\w:]*Tasks?\)", symbol)
        if found:
            names[int(address, 16)] = re.sub(r"\(bool\)([01])", r"\1", found[1])
    return names


class EmulatedLibrary:
    """A compiled file of tests/emulation, and memory whose neighbours may not be touched."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.last_error.restype = ctypes.c_char_p
        self.library.race_report.restype = ctypes.c_char_p
        self.library.race_report_kernel.restype = ctypes.c_int64
        self.library.guarded_allocate.restype = ctypes.c_void_p
        self.library.guarded_allocate.argtypes = [ctypes.c_int64, ctypes.c_int]
        self.library.guarded_free.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.kernels = kernel_names(library)
        self.thread_order = 0
        self.guarded: list[tuple[int, int, int]] = []

    def races(self) -> list[str]:
        """What the race detector has seen since it was asked last."""
        reports = [
            f"{self.kernels[self.library.race_report_kernel(i)]}: "
            + self.library.race_report(i).decode()
            for i in range(self.library.race_reports())
        ]
        self.library.forget_race_reports()
        return reports

    def launched(self) -> set[str]:
        """The kernels that have run since it was asked last."""
        offsets = (ctypes.c_int64 * 1024)()
        count = self.library.launched_kernels(offsets, len(offsets))
        assert count <= len(offsets)
        return {self.kernels[offset] for offset in offsets[:count]}

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, order=CHANNELS_FIRST, in_front=False
    ) -> Tensor:
        """A tensor full of NaN whose neighbouring memory may not be touched."""
        model = torch.empty(shape, dtype=dtype, device="meta", memory_format=order)
        size = model.numel() * model.element_size()
        if size == 0:
            return torch.empty(shape, dtype=dtype, memory_format=order)
        address = self.library.guarded_allocate(size, in_front)
        self.guarded.append((address, size, in_front))
        memory = (ctypes.c_char * size).from_address(address)
        flat = torch.frombuffer(memory, dtype=dtype)
        return flat.as_strided(model.shape, model.stride())

    def copy(self, tensor: Tensor, order=CHANNELS_FIRST, in_front=False) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype, order, in_front).copy_(tensor)

    def release(self) -> None:
        for block in self.guarded:
            self.library.guarded_free(*block)
        self.guarded.clear()


def strided(emulator: EmulatedLibrary, feat: Tensor, order, kind: str) -> Tensor:
    """A tensor equal to ``feat`` that lies among other memory (NaN) in the given way."""
    n, c, h, w = feat.shape
    if kind == "crop":
        whole = emulator.empty((n, c, h + 3, w + 5), feat.dtype, order)
        part = whole[:, :, 1 : h + 1, 3 : w + 3]
    elif kind == "aligned crop":  # rows do not adjoin, and yet every load may be a vector
        whole = emulator.empty((n, c, h + 8, w + 8), feat.dtype, order)
        part = whole[:, :, 8:, 8:]
    elif kind == "channels":  # a part of the channels
        whole = emulator.empty((n, c + 9, h, w), feat.dtype, order)
        part = whole[:, 5 : c + 5]
    elif kind == "batch":  # every second image
        part = emulator.empty((2 * n, c, h, w), feat.dtype, order)[1::2]
    elif kind == "rows":  # every second row and column
        whole = emulator.empty((n, c, 2 * h, 2 * w), feat.dtype, order)
        part = whole[:, :, ::2, :: 2 if order == CHANNELS_LAST else 1][:, :, :, :w]
    else:  # one element behind an aligned address
        size = feat.element_size()
        flat = emulator.empty((feat.numel() + 16 // size,), feat.dtype)
        skew = 1 - flat.data_ptr() // size % (16 // size)
        model = torch.empty(feat.shape, device="meta", memory_format=order)
        part = flat.as_strided(feat.shape, model.stride(), skew % (16 // size))
    return part.copy_(feat)


STRIDED = ["crop", "aligned crop", "channels", "batch", "rows", "misaligned"]
