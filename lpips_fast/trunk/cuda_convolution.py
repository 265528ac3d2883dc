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
from torch import Tensor

from .convolution import Convolution

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDNN_ELEMENTS = 2**31  # beyond, whether cuDNN can count so far is torch's to judge

# Layers for which this cuDNN has no fused engine, as _configuration describes them.
WITHOUT_ENGINE: set[tuple[Any, ...]] = set()


def convolve(conv: Convolution, x: Tensor, keep_nan: bool = False) -> Tensor:
    """``relu(conv(x))`` without a graph; images, weight and bias in one dtype of :data:`DTYPES`.

    Args:
        keep_nan: let NaN through, as torch's ReLU does.
    """
    if keep_nan or not _cudnn_may_fuse(conv, x):
        return _in_two_passes(conv, x)
    configuration = _configuration(conv, x)
    if configuration in WITHOUT_ENGINE:
        return _in_two_passes(conv, x)
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    try:
        return torch.ops.aten.cudnn_convolution_relu(
            x, conv.weight, conv.bias, stride, padding, [1, 1], 1
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        y = _in_two_passes(conv, x)
    # Only now: where memory was short, or the arguments wrong, that has raised too.
    WITHOUT_ENGINE.add(configuration)
    return y


def input_gradient(
    conv: Convolution,
    grad: Tensor,
    x: Tensor,
    through_relu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """As :func:`lpips_fast.trunk.convolution.input_gradient`, by torch's own operators."""
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    result, _, _ = torch.ops.aten.convolution_backward(
        grad, x, conv.weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
    )
    if add is not None:
        result = result.add_(add)
    return torch.ops.aten.threshold_backward(result, x, 0) if through_relu else result


def _cudnn_may_fuse(conv: Convolution, x: Tensor) -> bool:
    cudnn = torch.backends.cudnn
    if not cudnn.is_available() or not cudnn.enabled:
        return False
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    # A result has no more positions than the image; padding adds a few.
    batch, channels, height, width = x.shape
    positions = batch * (height + 2 * conv.padding) * (width + 2 * conv.padding)
    return positions * max(channels, conv.out_channels) < _CUDNN_ELEMENTS


def _configuration(conv: Convolution, x: Tensor) -> tuple[Any, ...]:
    """What decides whether cuDNN has an engine. Sizes of images hardly do."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (x.device, x.dtype, conv.weight.shape, conv.stride, conv.padding, precision)


def _in_two_passes(conv: Convolution, x: Tensor) -> Tensor:
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    if y.is_contiguous(memory_format=torch.channels_last):
        torch.ops.lpips_fast.bias_relu_(y, conv.bias)
        return y
    return y.add_(conv.bias.view(1, -1, 1, 1)).relu_()  # torch's own convolution, without cuDNN
