"""Convolution, bias and ReLU on CUDA without extra passes over memory, for frozen weights.

torch's convolution adds the bias in a pass of its own, and the ReLU is one more. Here it is

- cuDNN's fused call, which adds the bias and clips while a result is in registers;
- where cuDNN has no engine for that (it says so when called, once for a layer), where only
  deterministic algorithms are wanted (the fused call has no such choice) and where NaN must come
  through (cuDNN's ReLU promises nothing of it): the convolution alone, then ``bias_relu_``, our own
  kernel, which reads and writes the result once.

TF32, benchmarking and autocast are as for torch's own convolution. ``LPIPS_FAST_CUDA_TRUNK=0`` in
the environment leaves all of it to torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDNN_ELEMENTS = 2**31  # beyond, whether cuDNN can count so far is torch's to judge

# Layers for which this cuDNN has no fused engine, as _configuration describes them.
WITHOUT_ENGINE: set[tuple[Any, ...]] = set()


def conv_relu(conv: nn.Conv2d, x: Tensor, keep_nan: bool = False) -> Tensor | None:
    """``relu(conv(x))``, differentiable in ``x``, or None where it is torch's to compute.

    Args:
        keep_nan: let NaN through, as torch's ReLU does.
    """
    if not _is_served(x):
        return None
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    graph = torch.is_grad_enabled()
    if graph and (weight.requires_grad or bias.requires_grad):
        return None
    dtype = _dtype(x, weight)
    if dtype not in _DTYPES:
        return None
    if weight.dtype != dtype:  # as autocast would
        weight, bias = weight.detach().to(dtype), bias.detach().to(dtype)
    x = x.to(dtype)
    if graph and x.requires_grad:
        return _ConvReLU.apply(x, weight, bias, conv, keep_nan)
    return _convolve(x, weight, bias, conv, keep_nan)


def _is_served(x: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and kernels.has_trunk_kernels(x.device)
        and kernels.is_eager()
        and type(x) is Tensor
        and x.numel() > 0
    )


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that torch would convolve in, or None if it would not."""
    device, pair = x.device.type, (x.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and torch.float64 not in pair:  # which it leaves alone
        return torch.get_autocast_dtype(device)
    return x.dtype if pair[0] == pair[1] else None


class _ConvReLU(torch.autograd.Function):
    """The derivative of the fused call: the ReLU's mask is where the result is positive."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d, keep_nan: bool
    ) -> Tensor:  # type: ignore[override]
        y = _convolve(x, weight, bias, conv, keep_nan)
        ctx.conv = conv
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        conv = ctx.conv
        # Operators of torch's, which have a derivative themselves.
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            torch.ops.aten.threshold_backward(grad, y, 0),
            x,
            weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [True, False, False],
        )
        return grad_x, None, None, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d, keep_nan: bool) -> Tensor:
    """Without a graph; all three in one dtype."""
    if keep_nan or not _cudnn_may_fuse(conv, x):
        return _in_two_passes(x, weight, bias, conv)
    configuration = _configuration(conv, x, weight)
    if configuration in WITHOUT_ENGINE:
        return _in_two_passes(x, weight, bias, conv)
    try:
        return torch.ops.aten.cudnn_convolution_relu(
            x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        y = _in_two_passes(x, weight, bias, conv)
    # Only now: where memory was short, or the arguments wrong, that has raised too.
    WITHOUT_ENGINE.add(configuration)
    return y


def _cudnn_may_fuse(conv: nn.Conv2d, x: Tensor) -> bool:
    cudnn = torch.backends.cudnn
    if not cudnn.is_available() or not cudnn.enabled:
        return False
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    # A result has no more positions than the image; padding adds a few.
    (batch, channels, height, width), padding = x.shape, conv.padding
    assert isinstance(padding, tuple)
    positions = batch * (height + 2 * padding[0]) * (width + 2 * padding[1])
    return positions * max(channels, conv.out_channels) < _CUDNN_ELEMENTS


def _configuration(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    """What decides whether cuDNN has an engine. Sizes of images hardly do."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (x.device, x.dtype, weight.shape, conv.stride, conv.padding, precision)


def _in_two_passes(x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d) -> Tensor:
    y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    if y.is_contiguous(memory_format=torch.channels_last):
        torch.ops.lpips_fast.bias_relu_(y, bias)
        return y
    return y.add_(bias.view(1, -1, 1, 1)).relu_()  # torch's own convolution, without cuDNN
