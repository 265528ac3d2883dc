"""SqueezeNet's fire module: a 1x1 convolution, then a 1x1 and a 3x3 side by side, each with a ReLU.

On the CPU, with frozen float32 weights, it is one call of our own kernels
(``csrc/cpu/fire_cpu.cpp``), in which both expansions write their channels of one result. Elsewhere
it is three convolutions and a concatenation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from .convolution import (
    conv_relu,
    convolve,
    input_gradient,
    is_frozen,
    is_frozen_on_cpu,
    packed_kernel,
    uses_winograd,
)


class FireModule(nn.Module):
    """Iandola et al. 2016, with torchvision's parameter names.

    Args:
        in_channels: of the images.
        squeeze: channels of the first convolution.
        expand: channels of each of the two others; the result has twice as many.
    """

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_one_call(x):
            return self._in_steps(x)
        if not torch.is_grad_enabled():
            return self._fire(x)[1]
        if any(p.requires_grad for p in self.parameters()):  # a bias
            return self._in_steps(x)
        return _Fire.apply(x, self) if x.requires_grad else self._fire(x)[1]

    def _in_steps(self, x: Tensor) -> Tensor:
        x = conv_relu(self.squeeze, x)
        return torch.cat((conv_relu(self.expand1x1, x), conv_relu(self.expand3x3, x)), dim=1)

    def _is_one_call(self, x: Tensor) -> bool:
        return (
            kernels.has_wide_vectors()
            and x.dtype == torch.float32
            and is_frozen_on_cpu(self.squeeze, x)
            and is_frozen(self.expand1x1)
            and is_frozen(self.expand3x3)
        )

    def _fire(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The squeezed images with a border of zeros, and the result."""
        squeeze, expand1x1, expand3x3 = self.squeeze, self.expand1x1, self.expand3x3
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

    def record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Without a graph: the squeezed images, and the result.

        The squeezed images may have a border; they are for :meth:`input_gradient` alone.
        """
        if self._is_one_call(x):
            return self._fire(x)
        squeezed = convolve(self.squeeze, x)
        expanded = (convolve(conv, squeezed) for conv in (self.expand1x1, self.expand3x3))
        return squeezed, torch.cat(tuple(expanded), dim=1)

    def input_gradient(
        self, grad: Tensor, x: Tensor, squeezed: Tensor, through_relu: bool
    ) -> Tensor:
        """As :func:`lpips_fast.convolution.input_gradient`, from the gradient before both ReLUs."""
        if squeezed.shape[2:] != x.shape[2:]:
            return self._fire_backward(grad, x, squeezed, through_relu)
        grad1, grad3 = grad.split(self.expand1x1.out_channels, dim=1)
        narrow = input_gradient(self.expand1x1, grad1, squeezed)
        narrow = input_gradient(self.expand3x3, grad3, squeezed, through_relu=True, add=narrow)
        return input_gradient(self.squeeze, narrow, x, through_relu)

    def _fire_backward(
        self, grad: Tensor, x: Tensor, squeezed: Tensor, through_relu: bool
    ) -> Tensor:
        channels = self.expand3x3.out_channels
        winograd = uses_winograd(self.expand3x3, channels, x.shape[2:], x.dtype)
        return torch.ops.lpips_fast.fire_backward(
            grad,
            x,
            squeezed,
            packed_kernel(self.squeeze, False, gradient=True),
            packed_kernel(self.expand1x1, False, gradient=True),
            packed_kernel(self.expand3x3, winograd, gradient=True),
            through_relu,
            winograd,
        )


class _Fire(torch.autograd.Function):
    """The one call with its derivative, so that a graph does not change the result by a bit."""

    @staticmethod
    def forward(ctx, x: Tensor, fire: FireModule) -> Tensor:  # type: ignore[override]
        squeezed, y = fire._fire(x)
        ctx.fire = fire
        ctx.save_for_backward(x, squeezed, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, squeezed, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: through nodes that have one themselves
            return *torch.autograd.grad(ctx.fire._in_steps(x), x, grad, create_graph=True), None
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return ctx.fire._fire_backward(grad, x, squeezed, through_relu=False), None
