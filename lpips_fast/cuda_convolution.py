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

from . import ops

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDNN_ELEMENTS = 2**31  # beyond, whether cuDNN can count so far is torch's to judge

# Layers for which this cuDNN has no fused engine, as _configuration describes them.
WITHOUT_ENGINE: set[tuple[Any, ...]] = set()


def takes(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether :func:`conv_relu` convolves ``x``; else it is torch's, its error included."""
    if not ops.is_eager() or not _is_served(x) or type(x) is not Tensor or x.numel() == 0:
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in (conv.weight, conv.bias)):  # type: ignore[union-attr]
        return False
    return _dtype(conv, x) in _DTYPES


def _is_served(x: Tensor) -> bool:
    return x.device.type == "cuda" and ops.has_trunk_kernels(x.device)


def _dtype(conv: nn.Conv2d, x: Tensor) -> torch.dtype | None:
    """The dtype that torch would convolve in, or None if it would not."""
    device = x.device.type
    pair = (x.dtype, conv.weight.dtype)
    if torch.is_autocast_enabled(device) and torch.float64 not in pair:  # which it leaves alone
        return torch.get_autocast_dtype(device)
    return x.dtype if pair[0] == pair[1] else None


def conv_relu(conv: nn.Conv2d, x: Tensor, keep_nan: bool = False) -> Tensor:
    """``relu(conv(x))``, differentiable in ``x``.

    Args:
        keep_nan: let NaN through, as torch's ReLU does.
    """
    dtype = _dtype(conv, x)
    assert dtype is not None and conv.bias is not None
    # Frozen, or without a graph: cast as autocast would, outside of any.
    weight, bias = conv.weight.detach().to(dtype), conv.bias.detach().to(dtype)
    x = x.to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ConvReLU.apply(x, weight, bias, conv, keep_nan)
    return _convolve(x, weight, bias, conv, keep_nan)


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
    configuration = _configuration(conv, x)
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
    assert isinstance(conv.padding, tuple)
    positions = 1
    for size, kernel, stride, padding in zip(
        x.shape[2:], conv.kernel_size, conv.stride, conv.padding
    ):
        positions *= (size + 2 * padding - kernel) // stride + 1
    return max(x.numel(), len(x) * conv.out_channels * positions) < _CUDNN_ELEMENTS


def _configuration(conv: nn.Conv2d, x: Tensor) -> tuple[Any, ...]:
    """What decides whether cuDNN has an engine. Sizes of images hardly do."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (x.device, x.dtype, conv.weight.shape, conv.stride, conv.padding, precision)


def _in_two_passes(x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d) -> Tensor:
    y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    if y.is_contiguous(memory_format=torch.channels_last):
        torch.ops.lpips_fast.bias_relu_(y, bias)
        return y
    return y.add_(bias.view(1, -1, 1, 1)).relu_()  # torch's own convolution, without cuDNN
