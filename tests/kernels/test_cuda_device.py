"""GPUs and drivers that the CUDA kernels were not built for: torch's own operators, one warning."""

from __future__ import annotations

import ctypes
import warnings

import pytest
import torch
from cuda_emulation import emulation_library

from lpips_fast import kernels
from lpips_fast.kernels import cuda_device, dispatch
from lpips_fast.kernels.cuda_device import CudaKernels, driver_fault

NO_KERNEL_IMAGE = 209
BUILT_FOR = "7.5;8.0;9.0+PTX"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """The library's own question to the CUDA runtime, which is played: device 1 has no image."""
    path = str(emulation_library("run_distance"))
    ctypes.CDLL(path).play(4, 0, NO_KERNEL_IMAGE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = CudaKernels(path, BUILT_FOR)
    monkeypatch.setattr(dispatch, "CUDA_KERNELS", found)
    return found


def test_where_the_kernels_run(played):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in ("cuda:0", "cuda"):
            assert kernels.has_kernel(torch.device(device))
            assert kernels.has_trunk_kernels(torch.device(device))


def test_without_a_kernel_image_it_warns_once_and_is_torchs(played):
    device = torch.device("cuda:1")
    ctypes.CDLL(str(emulation_library("run_distance"))).play(4, 0, NO_KERNEL_IMAGE)
    with pytest.warns(UserWarning) as caught:
        assert not kernels.has_kernel(device)
        assert not kernels.has_trunk_kernels(device)
    (warning,) = caught
    assert str(warning.message) == (
        "the CUDA kernels of lpips_fast do not run on GPU 1 (compute capability 6.1; a played "
        "error): they were built for 7.5;8.0;9.0+PTX, and there everything takes torch's own "
        'operators, with the same results; build with TORCH_CUDA_ARCH_LIST="6.1" for this GPU'
    )
    assert kernels.has_kernel(torch.device("cuda:0"))  # which is current again


def test_the_answer_is_compiled_in(played):
    """The question goes to a library, which a compiled graph cannot hold."""

    def served(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch.has_kernel(torch.device("cuda", 0)) else x - 1

    compiled = torch.compile(served, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]


def test_without_the_library_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_KERNELS", None)
    assert not kernels.has_kernel(torch.device("cuda:0"))
    assert not kernels.has_trunk_kernels(torch.device("cuda:0"))
    assert kernels.has_kernel(torch.device("cpu")) and not kernels.has_kernel(torch.device("meta"))


class TestDriver:
    @pytest.mark.parametrize(
        ("driver", "nvcc", "runs"),
        [
            ((13, 0), "13.0", True),
            ((13, 0), "13.2", True),  # of one major version, whichever is newer
            ((13, 1), "12.4", True),
            ((12, 4), "13.0", False),
            ((11, 8), "12.1", False),
            (None, "13.0", True),  # nothing to say of it
        ],
    )
    def test_fault(self, monkeypatch, driver, nvcc, runs):
        monkeypatch.setattr(cuda_device, "driver_version", lambda: driver)
        fault = driver_fault(nvcc)
        assert (fault is None) is runs
        if fault is not None:
            assert f"nvcc {nvcc}" in fault and f"CUDA {driver[0]}.{driver[1]}" in fault
            assert "torch's own operators" in fault

    def test_version_of_this_machine(self):
        version = cuda_device.driver_version()
        assert version is None or version[0] >= 9
