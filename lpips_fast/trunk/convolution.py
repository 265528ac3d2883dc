"""A frozen convolution with its bias and ReLU on the CPU, and its gradient, as fast as there is.

- Winograd's algorithm (``csrc/cpu/winograd_kernels.h``) for 3x3 and 5x5 convolutions, and for
  AlexNet's first, which is a 3x3 one over blocks of 4x4 positions: it multiplies a quarter to a
  sixth as often as the direct sum. It rounds no more than that (docs/numerics.md), and packed
  weights take up to five times the memory. Images of half precision are only read and written as
  such. ``LPIPS_FAST_WINOGRAD=0`` in the environment turns it off.
- Our own direct sum (``csrc/cpu/direct_kernels.h``) for 3x3 convolutions of the images themselves,
  and for the gradients of strided ones.
- oneDNN for the rest: it adds the bias while a result is in registers, and takes weights that were
  reordered into its own blocked layout once instead of at every call: at small images the
  reordering costs more than the convolution. A half precision that the CPU has no instructions for
  is widened to float32 around it, which is what its products are summed in anyway; torch's own
  convolution takes 20 to 50 times as long there.

On CUDA it is cuDNN's fused call (:mod:`lpips_fast.trunk.cuda_convolution`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .packing import PackedWeight


class Convolution(NamedTuple):
    """A convolution behind which a ReLU follows. Kernel, stride and padding are squares."""

    weight: Tensor  # (O, I, k, k), frozen
    bias: Tensor  # (O,)
    stride: int
    padding: int
    packed: PackedWeight | None  # None where nothing is packed: on CUDA

    def packed_copy(self, purpose: Hashable, pack: Callable[[], Tensor]) -> Tensor:
        """What ``pack`` makes of the weight, made once for a purpose."""
        assert self.packed is not None
        return self.packed.copy(purpose, pack)

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]


def _half_dtypes_without_amx() -> set[torch.dtype]:
    """Where a CPU multiplies matrices of half precision in a unit of its own, oneDNN is faster."""
    has_unit = {
        torch.bfloat16: getattr(torch.cpu, "_is_amx_tile_supported", lambda: False),
        torch.float16: getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False),
    }
    return {dtype for dtype, is_there in has_unit.items() if not is_there()}


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN has convolutions for on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    served = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_served in served.items() if is_served)


ONEDNN_DTYPES = _onednn_dtypes()

# Compared with oneDNN on the trunks' layers: below, transforming costs more than it saves.
_WINOGRAD_CHANNELS = 32
_WINOGRAD_POSITIONS = 7 * 7
_WINOGRAD_DTYPES = {torch.float32} | _half_dtypes_without_amx()
_WINOGRAD = kernels.has_wide_vectors() and os.environ.get("LPIPS_FAST_WINOGRAD", "1") != "0"


def uses_winograd(
    conv: Convolution, channels: int, grid: Sequence[int], dtype: torch.dtype
) -> bool:
    """Whether Winograd's algorithm convolves, forward or for the gradient.

    It does not depend on the batch, so that an image has the same bits in any.

    Args:
        channels: summed over at every position.
        grid: height and width of the convolution's results.
    """
    if dtype != torch.float32 and dtype in ONEDNN_DTYPES:
        # oneDNN multiplies twice as fast, so that more must be saved.
        channels = min(conv.in_channels * conv.stride**2, conv.out_channels) // 2
    return (
        _WINOGRAD
        and dtype in _WINOGRAD_DTYPES
        and -(-conv.kernel // conv.stride) in (3, 5)
        and channels >= _WINOGRAD_CHANNELS
        and grid[0] * grid[1] >= _WINOGRAD_POSITIONS
    )


def _is_direct(conv: Convolution, dtype: torch.dtype) -> bool:
    """Whether our own direct sum convolves: the images themselves, 3x3."""
    return (
        kernels.has_wide_vectors()
        and dtype == torch.float32
        and conv.in_channels <= 4
        and conv.kernel == 3
    )


def convolve(conv: Convolution, x: Tensor, keep_nan: bool = False) -> Tensor:
    """``relu(conv(x))`` for a channels-last batch of images, without a graph.

    NaN comes through, as through torch's ReLU: a map shows where it reaches.

    Args:
        keep_nan: of no meaning here: on CUDA letting NaN through takes longer.
    """
    kernel, stride, padding = conv.kernel, conv.stride, conv.padding
    _, _, height, width = x.shape
    grid = [(size + 2 * padding - kernel) // stride + 1 for size in (height, width)]
    if uses_winograd(conv, conv.in_channels * stride**2, grid, x.dtype):
        packed, bias = packed_kernel(conv, winograd=True), _as(conv.bias, torch.float32)
        return torch.ops.lpips_fast.winograd_conv2d(
            x, packed, bias, True, None, conv.out_channels, kernel, stride, padding, precise=True
        )
    bias = _as(conv.bias, x.dtype)
    if _is_direct(conv, x.dtype):
        packed = packed_kernel(conv, winograd=False)
        return torch.ops.lpips_fast.direct_conv2d(
            x, packed, bias, True, conv.out_channels, kernel, stride, padding
        )
    dtype, shape = x.dtype, x.shape
    weight = conv.packed_copy(
        ("forward", dtype), lambda: _reordered(conv.weight.to(dtype), padding, stride, shape)
    )
    # oneDNN's own ReLU turns NaN into 0.
    return _by_onednn(x, weight, bias, padding, stride).relu_()


def _reordered(weight: Tensor, padding: int, stride: int, images: torch.Size) -> Tensor:
    """In oneDNN's own order, and in a dtype that it has."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        _widened(weight), [padding] * 2, [stride] * 2, [1, 1], 1, list(images)
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int) -> Tensor:
    """``conv2d`` with a weight from :func:`_reordered`, in the dtype of ``x``."""
    y = torch.ops.mkldnn._convolution_pointwise(
        _widened(x),
        weight,
        None if bias is None else _widened(bias),
        [padding] * 2,
        [stride] * 2,
        [1, 1],
        1,
        "none",
        [],
        "",
    )
    return _as(y, x.dtype)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Asked first: a call of torch that changes nothing takes longer than the question.
    return x if x.dtype == dtype else x.to(dtype)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in ONEDNN_DTYPES else x.float()


def _in_blocks(weight: Tensor, stride: int) -> Tensor:
    """(O, I, k, k) to (O, I, t, s, t, s), t = ceil(k / s): zeros behind the last row and column."""
    kernel = weight.shape[-1]
    blocks = -(-kernel // stride)
    missing = blocks * stride - kernel
    weight = F.pad(weight, (0, missing, 0, missing))
    return weight.unflatten(3, (blocks, stride)).unflatten(2, (blocks, stride))


def packed_kernel(conv: Convolution, winograd: bool, gradient: bool = False) -> Tensor:
    """The weights as our own kernels read them, for Winograd's algorithm or the direct sum.

    Args:
        gradient: those of the convolution that is the gradient to the images.
    """
    operators = torch.ops.lpips_fast
    pack = operators.winograd_pack if winograd else operators.direct_pack
    stride = conv.stride if winograd or gradient else 1  # else the direct sum runs over positions
    of_which = _gradient_weight if gradient else _block_weight
    return conv.packed_copy(
        (winograd, gradient), lambda: pack(of_which(conv.weight.float(), stride))
    )


def _block_weight(weight: Tensor, stride: int) -> Tensor:
    """(O, s * s * I, t, t): of the convolution of stride 1 over blocks of s * s positions."""
    return _in_blocks(weight, stride).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def input_gradient(
    conv: Convolution,
    grad: Tensor,
    x: Tensor,
    through_relu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """The gradient to the images ``x`` of a convolution with frozen weights, without a graph.

    Args:
        grad: the gradient to the convolution's result, before its ReLU.
        through_relu: ``x`` is itself the result of a ReLU, whose derivative is applied too.
        add: another gradient to ``x``, to which the convolution's is added.
    """
    stride, padding = conv.stride, conv.padding
    taps = -(-conv.kernel // stride)
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
    elif stride > 1 and kernels.has_wide_vectors() and grad.dtype == torch.float32:
        # Few channels: oneDNN would share them out, and so add, by the number of threads.
        packed = packed_kernel(conv, winograd=False, gradient=True)
        result = torch.ops.lpips_fast.direct_conv2d(
            grad, packed, None, False, channels, taps, 1, border
        )
    else:
        grad = grad.contiguous(memory_format=torch.channels_last)
        dtype, shape = grad.dtype, grad.shape
        packed = conv.packed_copy(
            ("gradient", dtype),
            lambda: _reordered(
                _gradient_weight(conv.weight.to(dtype), stride).contiguous(
                    memory_format=torch.channels_last
                ),
                border,
                1,
                shape,
            ),
        )
        result = _by_onednn(grad, packed, None, border, 1)
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
