"""SqueezeNet's fire module: a 1x1 convolution, then a 1x1 and a 3x3 side by side, each with a ReLU.

On the CPU, with frozen float32 weights, it is one call of our own kernels
(``csrc/cpu/fire_cpu.cpp``), in which both expansions write their channels of one result. Elsewhere
it is three convolutions and a concatenation.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from .convolution import Convolution, packed_kernel, uses_winograd


class FireModule(nn.Module):
    """Iandola et al. 2016, with the names of torchvision's layers.

    Args:
        in_channels: of the images.
        squeeze: channels of the first convolution.
        expand: channels of each of the two others; the result has twice as many.
    """

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        one = self.expand1x1_activation(self.expand1x1(x))
        three = self.expand3x3_activation(self.expand3x3(x))
        return torch.cat((one, three), dim=1)


class FireConvolutions(NamedTuple):
    """The three frozen convolutions of a fire module."""

    squeeze: Convolution
    expand1x1: Convolution
    expand3x3: Convolution


def has_border(x: Tensor) -> bool:
    """Whether :func:`record` is one call of our own, whose squeezed images have a border."""
    return x.device.type == "cpu" and kernels.has_wide_vectors() and x.dtype == torch.float32


def record(fire: FireConvolutions, x: Tensor, backend: ModuleType) -> tuple[Tensor, Tensor]:
    """Without a graph: the squeezed images, and the result.

    The squeezed images may have a border; they are for :func:`input_gradient` alone.

    Args:
        backend: the module whose ``convolve`` runs on the device of ``x``.
    """
    squeeze, expand1x1, expand3x3 = fire
    if not has_border(x):
        squeezed = backend.convolve(squeeze, x)
        expanded = (backend.convolve(conv, squeezed) for conv in (expand1x1, expand3x3))
        return squeezed, torch.cat(tuple(expanded), dim=1)
    winograd = uses_winograd(expand3x3, squeeze.out_channels, x.shape[2:], x.dtype)
    return torch.ops.lpips_fast.fire(
        x,
        packed_kernel(squeeze, False),
        squeeze.bias,
        packed_kernel(expand1x1, False),
        expand1x1.bias,
        packed_kernel(expand3x3, winograd),
        expand3x3.bias,
        winograd,
    )


def input_gradient(
    fire: FireConvolutions,
    grad: Tensor,
    x: Tensor,
    squeezed: Tensor,
    through_relu: bool,
    backend: ModuleType,
) -> Tensor:
    """As ``input_gradient`` of a convolution, from the gradient before both ReLUs."""
    squeeze, expand1x1, expand3x3 = fire
    if squeezed.shape[2:] == x.shape[2:]:
        gradient = backend.input_gradient
        grad1, grad3 = grad.split(expand1x1.out_channels, dim=1)
        narrow = gradient(expand1x1, grad1, squeezed)
        narrow = gradient(expand3x3, grad3, squeezed, through_relu=True, add=narrow)
        return gradient(squeeze, narrow, x, through_relu)
    winograd = uses_winograd(expand3x3, expand3x3.out_channels, x.shape[2:], x.dtype)
    return torch.ops.lpips_fast.fire_backward(
        grad,
        x,
        squeezed,
        packed_kernel(squeeze, False, gradient=True),
        packed_kernel(expand1x1, False, gradient=True),
        packed_kernel(expand3x3, winograd, gradient=True),
        through_relu,
        winograd,
    )
