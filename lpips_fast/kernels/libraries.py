"""Loads the compiled libraries that lie in this folder.

``_C`` registers the schemas (``csrc/ops.cpp``), ``_cpu_*`` the CPU kernels, built once for each
instruction set, and ``_cuda`` the CUDA kernels.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def _library(name: str) -> Path | None:
    candidates = (FOLDER / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _load() -> list[str]:
    """Loads the schemas, the CPU kernels torch itself would choose here, and the CUDA kernels."""
    if _library("_C") is None:
        raise ImportError(
            f"lpips_fast is not built: {FOLDER} holds no _C extension. "
            'Install it with "pip install --no-build-isolation ." from the source folder, and '
            "run Python from another folder than that."
        )
    from . import _C  # noqa: F401  (its import registers the schemas)

    capability = {"AVX512": "avx512", "AVX2": "avx2"}.get(
        torch.backends.cpu.get_cpu_capability(), "default"
    )
    # Torch may know an instruction set that the compiler of the extension did not.
    names = [f"_cpu_{capability}", "_cpu_default"]
    cpu = next(path for path in map(_library, names) if path is not None)
    loaded = [cpu]
    cuda = _library("_cuda")
    if cuda is not None and torch.version.cuda is not None:
        loaded.append(cuda)
    for library in loaded:
        torch.ops.load_library(str(library))
    return [library.name.split(".")[0] for library in loaded]


LOADED_LIBRARIES = _load()

from ._C import WeightWatch as WeightWatch  # noqa: E402  (only after what says that it is missing)
