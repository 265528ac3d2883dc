"""How much memory a call adds at its peak.

A CUDA device's allocator tells it. On a CPU Linux does: it forgets the highest memory use of the
process so far, the call is made, and the new highest is read.

A figure of a CPU is worth most from a process of its own that runs with :data:`ENVIRONMENT` and has
made the call before, on small images, so that libraries and prepared weights are in place.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import torch

__all__ = ["ENVIRONMENT", "added_at_peak", "can_measure"]

#: Variables of a process that measures its memory. Without the threshold glibc keeps freed blocks
#: for itself, and their number would be measured.
ENVIRONMENT = MappingProxyType({"MALLOC_MMAP_THRESHOLD_": "65536"})

_PROCESS = Path("/proc/self")


def can_measure(device: torch.device) -> bool:
    """Whether anybody tells the memory of such a device."""
    return device.type == "cuda" or (device.type == "cpu" and (_PROCESS / "clear_refs").exists())


def added_at_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes above those in use at the start that a call takes at its peak.

    Args:
        call: what to measure. What it returns is dropped.
        device: whose memory; a CUDA device or the CPU.

    Raises:
        OSError: the system does not tell; see :func:`can_measure`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    (_PROCESS / "clear_refs").write_text("5")  # forgets the highest memory use so far
    before = _bytes("VmRSS")
    call()
    return _bytes("VmHWM") - before


def _bytes(name: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_PROCESS / 'status'} has no {name}")
