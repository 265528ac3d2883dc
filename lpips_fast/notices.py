"""When a warning may be given, and whose line it names."""

from __future__ import annotations

import os
import sys

import torch

from . import kernels


def may_read_values() -> bool:
    """Whether Python may look at values: eagerly, and while no CUDA graph is captured."""
    return kernels.is_eager() and not (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def level_of_the_caller() -> int:
    """``stacklevel`` of a warning: that of the first frame outside this package and torch."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
