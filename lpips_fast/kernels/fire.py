"""SqueezeNet's fire module in one call, forward and backward: fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .convolution import empty_channels_last


@torch.library.register_fake("lpips_fast::fire")
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


@torch.library.register_fake("lpips_fast::fire_backward")
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
