"""The machine that figures come from: what it is, and how fast it multiplies at best."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from timing import seconds_of

import lpips_fast

PACKAGES = ("lpips", "torchmetrics", "piq", "torchvision")


def name(device: torch.device) -> str:
    """The processor that does the work; a CPU's instruction set too, by which kernels differ."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {_threads()}"


def slug(device: torch.device) -> str:
    """:func:`name` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}"


def facts(device: torch.device) -> dict[str, str]:
    """What a reader needs to know to compare figures, by name."""
    result = {
        "Device": name(device),
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores, {_threads()} used",
        "CPU instruction set": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 arithmetic on the CPU": "yes" if _cpu_has_bfloat16() else "no, emulated",
        "System": platform.platform(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lpips_fast": lpips_fast.__version__,
    }
    if device.type == "cuda":
        result["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        result["TF32 in convolutions"] = "yes" if torch.backends.cudnn.allow_tf32 else "no"
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            result[package] = importlib.metadata.version(package)
    return result


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load() -> float | None:
    """Processes that wanted a core in the last minute; about 0 on a quiet machine."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def this_run() -> dict[str, Any]:
    """What every file of results begins with: the command, the machine, and its load before."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "load": load(),
        "machine": facts(torch.device("cpu")),
    }


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating point operations a second of a large matrix product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    # What convolutions may do, the product may do.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = min(seconds_of(lambda: a @ b, device) for _ in range(repeats))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * size**3 / seconds
