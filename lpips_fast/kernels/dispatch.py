"""Where there are kernels of ours, and when a call is one that they may serve."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .libraries import CUDA_KERNELS, LOADED_LIBRARIES


def has_kernel(device: torch.device) -> bool:
    """Whether features on ``device`` are served by a kernel, rather than by ``composed``."""
    if device.type != "cuda":
        return device.type == "cpu"
    return CUDA_KERNELS is not None and CUDA_KERNELS.run_on(device)


_CUDA_TRUNK = os.environ.get("LPIPS_FAST_CUDA_TRUNK", "1") != "0"


def has_trunk_kernels(device: torch.device) -> bool:
    """Whether images on ``device`` are scaled and pooled by kernels of ours.

    ``LPIPS_FAST_CUDA_TRUNK=0`` in the environment leaves the trunk on CUDA to torch's own
    operators, to compare with them; the distance keeps its kernels.
    """
    return has_kernel(device) and (device.type == "cpu" or _CUDA_TRUNK)


def has_wide_vectors() -> bool:
    """Whether the CPU kernels were compiled for AVX2 or AVX512, not for any CPU."""
    return LOADED_LIBRARIES[0] != "_cpu_default"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast convolves in on a device, or None where it is not active."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def below_autograd(*tensors: Tensor) -> AbstractContextManager[object]:
    """Where no graph is kept of ``tensors``: within, operators of ours skip autograd's wrapper.

    It is Python, and costs more than some kernels.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def is_eager() -> bool:
    """Whether a call is just run, not compiled, exported, traced or transformed.

    Those want torch's own operators around the distance: they fuse them, translate them, or know
    how to transform them.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or has_tangents()
    )


def has_tangents() -> bool:
    """Whether derivatives are carried forward: our operators know backward alone."""
    return torch.autograd.forward_ad._current_level >= 0


def is_compiling() -> bool:
    """Whether torch.compile records the call, for here: our operators stand in what it makes."""
    return torch.compiler.is_compiling() and has_operators()


def has_operators() -> bool:
    """Whether operators of ours may stand in what is run: eagerly, or compiled for here.

    Programs that are exported or traced go elsewhere, and function transforms need derivatives and
    batching of every operator: both get torch's own.
    """
    return not (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or has_tangents()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: ``torch.OutOfMemoryError``, or on the CPU what has no class there."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )
