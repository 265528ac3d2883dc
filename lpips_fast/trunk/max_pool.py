"""Max-pooling whose size rounds up, in a form that programs of any image size can hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CeilMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` with ``ceil_mode``, without padding and dilation.

    ``ceil_mode`` makes torch.export branch on the size, and so gives up a dynamic height and width.
    A padding of stride - 1 below and beside has the same sizes: floor((n + s - 1 - k) / s) is
    ceil((n - k) / s). What is padded cannot win.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() or torch.jit.is_tracing():
            return super().forward(input)
        return padded_max_pool(input, int(self.kernel_size), int(self.stride))  # type: ignore[arg-type]


def padded_max_pool(x: Tensor, kernel: int, stride: int, value: float = float("-inf")) -> Tensor:
    """Max-pooling whose size rounds up, as one that rounds down.

    Args:
        value: of the padding: no larger than any in ``x``, so 0 behind a ReLU.
    """
    return F.max_pool2d(F.pad(x, (0, stride - 1, 0, stride - 1), value=value), kernel, stride)
