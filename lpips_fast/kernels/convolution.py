"""Convolutions with packed weights, and bias and ReLU behind one: fake kernels, FLOPs.

They have no derivative of their own: who calls them in a graph hands on the input gradient
(:mod:`lpips_fast.trunk.convolution`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import fake_kernel, flops, refuse_in_graph, without_derivative


def empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _results(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _convolved(x: Tensor, kernel: int, stride: int, padding: int) -> list[int]:
    torch._check(stride >= 1, lambda: f"stride must be at least 1, got {stride}")
    return [_results(size, kernel, stride, padding) for size in x.shape[2:]]


# Channels of the results that a pass of the kernels computes, from what packing makes of none.
_PANEL = torch.ops.lpips_fast.winograd_pack(torch.empty(0, 0, 3, 3, device="cpu")).shape[-1]


@fake_kernel("direct_pack")
def _(weight: Tensor) -> Tensor:
    out_channels, in_channels, kernel, _ = weight.shape
    vector = _PANEL // 2
    whole = -(-out_channels // vector) * vector
    return weight.new_empty((kernel, kernel, in_channels, whole))


@fake_kernel("winograd_pack")
def _(weight: Tensor) -> Tensor:
    out_channels, in_channels, kernel, _ = weight.shape
    # Those of a tile with 4 x 4 results, and behind them the plain weights.
    planes = (kernel + 3) ** 2 + kernel**2
    return weight.new_empty((planes, -(-out_channels // _PANEL), in_channels, _PANEL))


@fake_kernel("depth_to_space")
def _(blocks: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    torch._check(stride >= 1, lambda: f"stride must be at least 1, got {stride}")
    channels = blocks.shape[1] // stride**2
    return empty_channels_last(blocks, blocks.shape[0], channels, height, width)


@fake_kernel("direct_conv2d")
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


@fake_kernel("bias_relu_")
def _(y: Tensor, bias: Tensor) -> None:
    pass


@fake_kernel("winograd_conv2d")
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
    precise: bool = False,
) -> Tensor:
    return empty_channels_last(x, x.shape[0], out_channels, *_convolved(x, kernel, stride, padding))


without_derivative(
    "depth_to_space", "direct_conv2d", "direct_pack", "winograd_conv2d", "winograd_pack"
)
refuse_in_graph("bias_relu_")


def _convolution_flops(
    x: torch.Size, out_channels: int, kernel: int, stride: int, padding: int
) -> int:
    batch, in_channels, *size = x
    height, width = (_results(s, kernel, stride, padding) for s in size)
    return 2 * batch * height * width * out_channels * in_channels * kernel**2


@flops("direct_conv2d")
def _(
    x: torch.Size,
    packed: torch.Size,
    bias: torch.Size | None,
    relu: bool,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
) -> int:
    return _convolution_flops(x, out_channels, kernel, stride, padding)


@flops("winograd_conv2d")
def _(
    x: torch.Size,
    packed: torch.Size,
    bias: torch.Size | None,
    relu: bool,
    mask: torch.Size | None,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    add: torch.Size | None = None,
    precise: bool = False,
) -> int:
    return _convolution_flops(x, out_channels, kernel, stride, padding)
