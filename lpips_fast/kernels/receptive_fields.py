"""Keys of the positions that see the same picture: the fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import fake_kernel

#: Kinds of layers, as the operator takes them (``csrc/cpu/receptive_fields_cpu.cpp``).
CONVOLUTION, POOLING, FIRE = 0, 1, 2


@fake_kernel("receptive_fields")
def _(x: Tensor, layers: list[int]) -> list[Tensor]:
    before_poolings, groups = [], 1
    sizes = list(x.shape[2:])
    for k in range(0, len(layers), 4):
        kind, kernel, stride, last = layers[k : k + 4]
        if kind == POOLING:
            before_poolings.append(x.new_empty((len(x), groups, *sizes), dtype=torch.int64))
            sizes = [_pooled(size, kernel, stride, bool(last)) for size in sizes]
        else:
            groups = 2 if kind == FIRE else 1
            sizes = [(size + 2 * last - kernel) // stride + 1 for size in sizes]
    return before_poolings


def _pooled(size: int, kernel: int, stride: int, ceil_mode: bool) -> int:
    """Windows along an axis, as torch counts them (``csrc/pool_shape.h``)."""
    out = (size - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    # A window may hang over the edge, but not start beyond it.
    return out - 1 if ceil_mode and (out - 1) * stride >= size else out
