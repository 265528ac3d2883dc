"""Convolution, bias and ReLU as one call into the fastest library path there is.

On the CPU that is oneDNN, which adds the bias and applies the ReLU while a result is in registers,
and takes weights that were reordered into its own blocked layout once instead of at every call:
at small images the reordering costs more than the convolution. Elsewhere, and while torch.compile
traces (its own compiler fuses and packs), it is torch's convolution followed by an in-place ReLU.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


def conv_relu(conv: nn.Conv2d, x: Tensor, keep_nan: bool = False) -> Tensor:
    """``relu(conv(x))`` for a channels-last batch of images.

    Args:
        conv: a convolution with a bias.
        keep_nan: let NaN through, as torch's ReLU does; oneDNN's own turns NaN into 0.
    """
    dtype = _onednn_dtype(conv, x)
    if dtype is None:
        return conv(x).relu_()
    x = x.to(dtype)
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return _ConvReLU.apply(x, weight.to(dtype), bias.to(dtype), conv, keep_nan)
    return _onednn_conv_relu(conv, x, keep_nan)


def _onednn_dtype(conv: nn.Conv2d, x: Tensor) -> torch.dtype | None:
    """The dtype to call oneDNN in, or None where it is not the path to take."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return None
    if (
        not torch.backends.mkldnn.is_available()
        or torch._C._are_functorch_transforms_active()
        or type(x) is not Tensor
    ):
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif conv.weight.dtype == x.dtype:
        dtype = x.dtype
    else:
        return None  # torch's own error says it best
    if dtype == torch.bfloat16:
        return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    if dtype == torch.float16:
        return dtype if torch.ops.mkldnn._is_mkldnn_fp16_supported() else None
    return dtype if dtype == torch.float32 else None


# Packed weights by convolution, with what they were packed from: a weight that was since written
# to, moved or replaced is packed anew. Kept outside the modules, since packed tensors can neither
# be copied nor pickled.
_PACKED: weakref.WeakKeyDictionary[nn.Conv2d, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def _packed_weight(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight = conv.weight.detach()
    if conv.weight.requires_grad or conv.weight.is_inference():
        return weight.to(x.dtype)  # it changes all the time, or cannot tell when it does
    origin = (conv.weight._version, conv.weight.data_ptr(), x.dtype)
    found = _PACKED.get(conv)
    if found is not None and found[0] == origin:
        return found[1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight.to(x.dtype), conv.padding, conv.stride, conv.dilation, conv.groups, x.shape
    )
    _PACKED[conv] = (origin, packed)
    return packed


def _onednn_conv_relu(conv: nn.Conv2d, x: Tensor, keep_nan: bool) -> Tensor:
    with torch.no_grad():
        y = torch.ops.mkldnn._convolution_pointwise(
            x,
            _packed_weight(conv, x),
            conv.bias.detach().to(x.dtype),  # type: ignore[union-attr]
            conv.padding,
            conv.stride,
            conv.dilation,
            conv.groups,
            "none" if keep_nan else "relu",
            [],
            "",
        )
        return y.relu_() if keep_nan else y


class _ConvReLU(torch.autograd.Function):
    """The derivative of the fused call: the ReLU's mask is where the result is positive."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d, keep_nan: bool
    ) -> Tensor:
        y = _onednn_conv_relu(conv, x, keep_nan)
        ctx.conv = conv
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        conv = ctx.conv
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needs = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [conv.out_channels],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            needs,
        )
        return (*grads, None, None)
