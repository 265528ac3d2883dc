"""Convolution, bias and ReLU as one call, the fastest way there is.

On the CPU, for weights that are frozen:

- Winograd's algorithm (``csrc/cpu/winograd_kernels.h``) for 3x3 and 5x5 convolutions, and for
  AlexNet's first, which is a 3x3 one over blocks of 4x4 positions: it multiplies a quarter to a
  sixth as often as the direct sum. Its rounding error is 1e-6 to 3e-6 of the result's norm, that
  of the direct sum 3e-7 to 5e-7, and packed weights take up to four times the memory. Images of
  half precision are only read and written as such. ``LPIPS_FAST_WINOGRAD=0`` in the environment
  turns it off.
- Our own direct sum (``csrc/cpu/direct_kernels.h``) for 3x3 convolutions of the images themselves.
- oneDNN for the rest: it adds the bias and applies the ReLU while a result is in registers, and
  takes weights that were reordered into its own blocked layout once instead of at every call: at
  small images the reordering costs more than the convolution. Weights that learn go there too.

On CUDA it is cuDNN's fused call (:mod:`lpips_fast.cuda_convolution`). Elsewhere, and while
torch.compile traces (its own compiler fuses and packs), it is torch's convolution followed by an
in-place ReLU.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..trunk import cuda_convolution


def _half_dtypes_without_amx() -> set[torch.dtype]:
    """Where a CPU multiplies matrices of half precision in a unit of its own, oneDNN is faster."""
    has_unit = {
        torch.bfloat16: getattr(torch.cpu, "_is_amx_tile_supported", lambda: False),
        torch.float16: getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False),
    }
    return {dtype for dtype, is_there in has_unit.items() if not is_there()}


# Compared with oneDNN on the trunks' layers: below, transforming costs more than it saves.
_WINOGRAD_CHANNELS = 32
_WINOGRAD_POSITIONS = 7 * 7
_WINOGRAD_DTYPES = {torch.float32} | _half_dtypes_without_amx()
_WINOGRAD = kernels.has_wide_vectors() and os.environ.get("LPIPS_FAST_WINOGRAD", "1") != "0"


def conv_relu(conv: nn.Conv2d, x: Tensor, keep_nan: bool = False) -> Tensor:
    """``relu(conv(x))`` for a channels-last batch of images.

    Args:
        conv: a convolution with a bias.
        keep_nan: let NaN through, as torch's ReLU does; oneDNN's own turns NaN into 0.
    """
    dtype = _cpu_dtype(conv, x)
    if dtype is None:
        y = cuda_convolution.conv_relu(conv, x, keep_nan)
        return conv(x).relu_() if y is None else y
    x = x.to(dtype)
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return _ConvReLU.apply(x, weight.to(dtype), bias.to(dtype), conv, keep_nan)
    return convolve(conv, x, keep_nan)


def is_frozen_on_cpu(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether :func:`convolve` and :func:`input_gradient` take the images ``x``."""
    # In this order: a compiler that traces does not get to see the weights.
    return _cpu_dtype(conv, x) == x.dtype and is_frozen(conv)


def _cpu_dtype(conv: nn.Conv2d, x: Tensor) -> torch.dtype | None:
    """The dtype to convolve in on the CPU, or None where torch's own convolution does it."""
    if not kernels.is_eager() or x.device.type != "cpu" or x.numel() == 0:
        return None
    if not torch.backends.mkldnn.is_available() or type(x) is not Tensor:
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


# Packed weights by convolution, purpose and dtype, with what they were packed from: a weight that
# was since written to, moved or replaced is packed anew. The weight of then is kept, lest its
# memory, and so its address, become another's. What is written through ``weight.data`` nobody sees.
# Kept outside the modules, since packed tensors can neither be copied nor pickled.
_PACKED: weakref.WeakKeyDictionary[
    nn.Conv2d, dict[tuple[str, torch.dtype], tuple[int, Tensor, Tensor]]
] = weakref.WeakKeyDictionary()


def is_frozen(conv: nn.Conv2d) -> bool:
    """Whether packing pays: not for a weight that changes all the time or cannot tell when."""
    return not conv.weight.requires_grad and not conv.weight.is_inference()


def packed_weight(
    conv: nn.Conv2d, purpose: str, dtype: torch.dtype, pack: Callable[[], Tensor]
) -> Tensor:
    """What ``pack`` makes of the convolution's weight, made once for a purpose and a dtype."""
    weight = conv.weight
    packed_for = _PACKED.setdefault(conv, {})
    found = packed_for.get((purpose, dtype))
    if found is not None:
        version, origin, packed = found
        if version == weight._version and origin.data_ptr() == weight.data_ptr():
            return packed
    packed = pack()
    packed_for[purpose, dtype] = (weight._version, weight.detach(), packed)
    return packed


def _pack(weight: Tensor, padding: Any, stride: Any, images: torch.Size) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, [1, 1], 1, list(images)
    )


def _geometry(conv: nn.Conv2d) -> tuple[int, int, int]:
    """Kernel, stride and padding: all squares."""
    return int(conv.kernel_size[0]), int(conv.stride[0]), int(conv.padding[0])


def uses_winograd(conv: nn.Conv2d, channels: int, grid: torch.Size, dtype: torch.dtype) -> bool:
    """Whether Winograd's algorithm convolves, forward or for the gradient.

    It does not depend on the batch, so that an image has the same bits in any.

    Args:
        channels: summed over at every position.
        grid: height and width of the convolution's results.
    """
    kernel, stride, _ = _geometry(conv)
    if dtype != torch.float32:  # oneDNN multiplies twice as fast, so that more must be saved
        channels = min(conv.in_channels * stride**2, conv.out_channels) // 2
    return (
        _WINOGRAD
        and dtype in _WINOGRAD_DTYPES
        and -(-kernel // stride) in (3, 5)
        and channels >= _WINOGRAD_CHANNELS
        and grid[0] * grid[1] >= _WINOGRAD_POSITIONS
        and is_frozen(conv)
    )


def _is_direct(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Whether our own direct sum convolves: the images themselves, 3x3."""
    return (
        kernels.has_wide_vectors()
        and dtype == torch.float32
        and conv.in_channels <= 4
        and conv.kernel_size == (3, 3)
        and is_frozen(conv)
    )


def convolve(conv: nn.Conv2d, x: Tensor, keep_nan: bool = False) -> Tensor:
    """:func:`conv_relu` on the CPU, without a graph."""
    with torch.no_grad():
        weight, bias = conv.weight, conv.bias
        assert bias is not None
        kernel, stride, padding = _geometry(conv)
        grid = torch.Size((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
        if uses_winograd(conv, conv.in_channels * stride**2, grid, x.dtype):
            packed = packed_kernel(conv, winograd=True)
            return torch.ops.lpips_fast.winograd_conv2d(
                x, packed, bias.float(), True, None, conv.out_channels, kernel, stride, padding
            )
        if _is_direct(conv, x.dtype):
            packed = packed_kernel(conv, winograd=False)
            return torch.ops.lpips_fast.direct_conv2d(
                x, packed, bias.to(x.dtype), True, conv.out_channels, kernel, stride, padding
            )
        if is_frozen(conv):
            weight = packed_weight(
                conv,
                "forward",
                x.dtype,
                lambda: _pack(weight.to(x.dtype), conv.padding, conv.stride, x.shape),
            )
        else:
            weight = weight.to(x.dtype)
        bias = bias.to(x.dtype)
        y = torch.ops.mkldnn._convolution_pointwise(
            x,
            weight,
            bias,
            conv.padding,
            conv.stride,
            conv.dilation,
            conv.groups,
            "none" if keep_nan else "relu",
            [],
            "",
        )
        return y.relu_() if keep_nan else y


def _in_blocks(weight: Tensor, stride: int) -> Tensor:
    """(O, I, k, k) to (O, I, t, s, t, s), t = ceil(k / s): zeros behind the last row and column."""
    kernel = weight.shape[-1]
    blocks = -(-kernel // stride)
    missing = blocks * stride - kernel
    weight = F.pad(weight.detach(), (0, missing, 0, missing))
    return weight.unflatten(3, (blocks, stride)).unflatten(2, (blocks, stride))


def packed_kernel(conv: nn.Conv2d, winograd: bool, gradient: bool = False) -> Tensor:
    """The weights as our own kernels read them, for Winograd's algorithm or the direct sum.

    Args:
        gradient: those of the convolution that is the gradient to the images.
    """
    operators = torch.ops.lpips_fast
    pack = operators.winograd_pack if winograd else operators.direct_pack
    stride = _geometry(conv)[1] if winograd else 1  # which alone runs over blocks
    of_which = _gradient_weight if gradient else _block_weight
    purpose = f"{'winograd' if winograd else 'direct'}{' gradient' if gradient else ''}"
    return packed_weight(
        conv, purpose, torch.float32, lambda: pack(of_which(conv.weight.float(), stride))
    )


def _block_weight(weight: Tensor, stride: int) -> Tensor:
    """(O, s * s * I, t, t): of the convolution of stride 1 over blocks of s * s positions."""
    return _in_blocks(weight, stride).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


class _ConvReLU(torch.autograd.Function):
    """The derivative of the fused call: the ReLU's mask is where the result is positive."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d, keep_nan: bool
    ) -> Tensor:
        y = convolve(conv, x, keep_nan)
        ctx.conv = conv
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        conv = ctx.conv
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        needs = list(ctx.needs_input_grad[:3])
        # A second derivative needs torch's own operator, which has one.
        if needs == [True, False, False] and is_frozen(conv) and not torch.is_grad_enabled():
            return input_gradient(conv, grad, x), None, None, None, None
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


def input_gradient(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, through_relu: bool = False, add: Tensor | None = None
) -> Tensor:
    """The gradient to the images ``x`` of a convolution with frozen weights, without a graph.

    Args:
        grad: the gradient to the convolution's result, before its ReLU.
        through_relu: ``x`` is itself the result of a ReLU, whose derivative is applied too.
        add: another gradient to ``x``, to which the convolution's is added.
    """
    kernel, stride, padding = _geometry(conv)
    taps = -(-kernel // stride)
    border = taps - 1 - (padding if stride == 1 else 0)
    channels = conv.in_channels * stride**2
    if uses_winograd(conv, conv.out_channels, grad.shape[2:], x.dtype):
        packed = packed_kernel(conv, winograd=True, gradient=True)
        mask = x if through_relu and stride == 1 else None
        addend = add if stride == 1 else None
        result = torch.ops.lpips_fast.winograd_conv2d(
            grad, packed, None, False, mask, channels, taps, 1, border, addend
        )
        if stride == 1:
            return result
    else:
        grad = grad.contiguous(memory_format=torch.channels_last)
        packed = packed_weight(
            conv,
            "input gradient",
            grad.dtype,
            lambda: _pack(
                _gradient_weight(conv.weight.to(grad.dtype), stride).contiguous(
                    memory_format=torch.channels_last
                ),
                [border, border],
                [1, 1],
                grad.shape,
            ),
        )
        result = torch.ops.mkldnn._convolution_pointwise(
            grad, packed, None, [border, border], [1, 1], [1, 1], 1, "none", [], ""
        )
    if stride > 1:
        result = torch.ops.lpips_fast.depth_to_space(result, stride, padding, *x.shape[2:])
    if add is not None:
        result.add_(add)
    if through_relu:
        torch.ops.aten.threshold_backward.grad_input(result, x, 0, grad_input=result)
    return result


def _gradient_weight(weight: Tensor, stride: int) -> Tensor:
    """(s * s * I, O, t, t): the weights of the convolution of stride 1 that is the gradient.

    A position s * q + r of the image meets every s-th weight only, those of phase r. So its
    gradient is one of s * s convolutions of ceil(k / s) weights a side; they run as one, with
    s * s times the channels, and ``depth_to_space`` (sub-pixel convolution, Shi et al. 2016) gives
    the image's gradient. With stride 1 it is the flipped convolution of the
    textbooks. Torch's own takes four times as long for AlexNet's first layer (k = 11, s = 4).
    """
    return _in_blocks(weight, stride).flip(2, 4).permute(3, 5, 1, 0, 2, 4).flatten(0, 2)
