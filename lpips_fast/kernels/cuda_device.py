"""Whether the CUDA kernels run on a device, and one sentence where they do not.

They are built for some compute capabilities, by an nvcc whose major version the driver must know.
Elsewhere everything takes torch's own operators, with the same results, and one warning says why.
"""

from __future__ import annotations

import ctypes
import warnings

import torch


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver supports, or None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_fault(nvcc: str) -> str | None:
    """Why the driver runs nothing that this nvcc built, or None.

    A driver takes code of every CUDA of its own major version, and of earlier ones.
    """
    driver = driver_version()
    if driver is None or driver[0] >= int(nvcc.split(".")[0]):
        return None
    return (
        f"the CUDA kernels of lpips_fast were built by nvcc {nvcc} and this machine's driver "
        f"supports CUDA {driver[0]}.{driver[1]}, which does not run them (torch has CUDA "
        f"{torch.version.cuda}): distances on CUDA take torch's own operators, with the same "
        "results; update the driver, or build lpips_fast with torch's version of the toolkit"
    )


class CudaKernels:
    """The loaded library of CUDA kernels: on which devices it runs.

    Args:
        path: of the library.
        built_for: the compute capabilities, as ``TORCH_CUDA_ARCH_LIST`` names them.
    """

    def __init__(self, path: str, built_for: str) -> None:
        library = ctypes.CDLL(path)
        library.lpips_fast_kernel_fault.restype = ctypes.c_char_p
        self._fault_of = library.lpips_fast_kernel_fault
        self._built_for = built_for
        self._known: dict[int, bool] = {}

    def run_on(self, device: torch.device) -> bool:
        """Whether they do; where not, the first question about a device warns."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._known:
            fault = self._fault_of(index)
            self._known[index] = fault is None
            if fault is not None:
                warnings.warn(self._sentence(index, fault.decode()), stacklevel=2)
        return self._known[index]

    # Asked while a call is compiled, and its answer compiled in: torch.compiler's
    # assume_constant_result without the import of the compiler.
    run_on._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _sentence(self, index: int, fault: str) -> str:
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"the CUDA kernels of lpips_fast do not run on {torch.cuda.get_device_name(index)} "
            f"(compute capability {major}.{minor}; {fault}): they were built for "
            f"{self._built_for}, and there everything takes torch's own operators, with the same "
            f'results; build with TORCH_CUDA_ARCH_LIST="{major}.{minor}" for this GPU'
        )
