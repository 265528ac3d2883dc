"""Loads the compiled libraries that lie in this folder.

``_C`` registers the schemas (``csrc/ops.cpp``), ``_cpu_*`` the CPU kernels, built once for each
instruction set, and ``_cuda`` the CUDA kernels.
"""

from __future__ import annotations

import json
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from .cuda_device import CudaKernels, driver_fault

FOLDER = Path(__file__).parent


def library_path(name: str) -> Path | None:
    """Of a library that was built, or None."""
    candidates = (FOLDER / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _load() -> tuple[list[str], CudaKernels | None]:
    """Loads the schemas, the CPU kernels torch itself would choose here, and the CUDA kernels."""
    if library_path("_C") is None:
        raise ImportError(
            f"lpips_fast is not built: {FOLDER} holds no _C extension. "
            'Install it with "pip install --no-build-isolation ." from the source folder, and '
            "run Python from another folder than that."
        )
    from . import _C  # its import registers the schemas

    capability = {"AVX512": "avx512", "AVX2": "avx2"}.get(
        torch.backends.cpu.get_cpu_capability(), "default"
    )
    # Torch may know an instruction set that the compiler of the extension did not.
    names = list(dict.fromkeys((f"_cpu_{capability}", "_cpu_default")))
    cpu = next((path for path in map(library_path, names) if path is not None), None)
    if cpu is None:
        raise ImportError(
            f"lpips_fast was built for other CPUs: {FOLDER} holds no {' and no '.join(names)}. "
            "Build it on this machine."
        )
    loaded = [cpu]
    cuda = library_path("_cuda")
    built = json.loads(_C.build_info())
    if cuda is not None and torch.version.cuda is not None:
        fault = driver_fault(built["nvcc"])
        if fault is None:
            loaded.append(cuda)
        else:
            warnings.warn(fault, stacklevel=2)
    for library in loaded:
        torch.ops.load_library(str(library))
    kernels = CudaKernels(str(cuda), built["cuda_arch_list"]) if cuda in loaded else None
    return [library.name.split(".")[0] for library in loaded], kernels


#: By name, and the CUDA kernels where they are among them.
LOADED_LIBRARIES, CUDA_KERNELS = _load()
