"""Convolutions with packed weights, and bias and ReLU behind one: fake kernels.

They have no derivative of their own: who calls them in a graph hands on the input gradient
(:mod:`lpips_fast.trunk.convolution`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import libraries  # noqa: F401  (its import registers the schemas)


def empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _convolved(x: Tensor, kernel: int, stride: int, padding: int) -> list[int]:
    return [(size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]]


@torch.library.register_fake("lpips_fast::depth_to_space")
def _(blocks: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    channels = blocks.shape[1] // stride**2
    return empty_channels_last(blocks, blocks.shape[0], channels, height, width)


@torch.library.register_fake("lpips_fast::direct_conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    relu: bool,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
) -> Tensor:
    return empty_channels_last(x, x.shape[0], out_channels, *_convolved(x, kernel, stride, padding))


@torch.library.register_fake("lpips_fast::bias_relu_")
def _(y: Tensor, bias: Tensor) -> None:
    pass


@torch.library.register_fake("lpips_fast::winograd_conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    relu: bool,
    mask: Tensor | None,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    add: Tensor | None = None,
) -> Tensor:
    return empty_channels_last(x, x.shape[0], out_channels, *_convolved(x, kernel, stride, padding))
