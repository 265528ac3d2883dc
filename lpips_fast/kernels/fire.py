"""SqueezeNet's fire module in one call, forward and backward: fake kernels, FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from .convolution import empty_channels_last
from .registration import fake_kernel, flops, without_derivative


@fake_kernel("fire")
def _(
    x: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    expand1x1: Tensor,
    expand1x1_bias: Tensor,
    expand3x3: Tensor,
    expand3x3_bias: Tensor,
    winograd: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = x.shape
    squeezed = empty_channels_last(x, batch, len(squeeze_bias), height + 2, width + 2)
    return squeezed, empty_channels_last(x, batch, 2 * len(expand1x1_bias), height, width)


@fake_kernel("fire_backward")
def _(
    grad: Tensor,
    x: Tensor,
    squeezed: Tensor,
    squeeze: Tensor,
    expand1x1: Tensor,
    expand3x3: Tensor,
    through_relu: bool,
    winograd: bool,
) -> Tensor:
    return empty_channels_last(x, *x.shape)


without_derivative("fire", "fire_backward")


def _fire_flops(x: torch.Size, narrow: int, wide: int) -> int:
    batch, channels, height, width = x
    return 2 * batch * height * width * narrow * (channels + wide + 9 * wide)


@flops("fire")
def _(
    x: torch.Size,
    squeeze: torch.Size,
    squeeze_bias: torch.Size,
    expand1x1: torch.Size,
    expand1x1_bias: torch.Size,
    expand3x3: torch.Size,
    expand3x3_bias: torch.Size,
    winograd: bool,
) -> int:
    return _fire_flops(x, squeeze_bias[0], expand1x1_bias[0])


@flops("fire_backward")
def _(
    grad: torch.Size,
    x: torch.Size,
    squeezed: torch.Size,
    squeeze: torch.Size,
    expand1x1: torch.Size,
    expand3x3: torch.Size,
    through_relu: bool,
    winograd: bool,
) -> int:
    return _fire_flops(x, squeezed[1], grad[1] // 2)
