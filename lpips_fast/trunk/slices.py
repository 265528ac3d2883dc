"""A slice of a trunk run by hand: forward, forward that records, and the gradient to its images.

A slice is the layers between two taps. Here it is one function of its images and its plain weights
and biases: packing, the choice of the convolution, and the ReLU behind each are inside. What it
computes is what the layers of the table compute when they are called one by one
(:func:`plain`, the definition), with frozen weights and without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import convolution, cuda_convolution, fire
from .convolution import Convolution
from .fire import FireConvolutions
from .packing import PackedWeight, packed_weights
from .table import TRUNKS, Conv, Fire, Layer, MaxPool, ReLU, TrunkSpec, architecture


def _layers_of_slices(spec: TrunkSpec) -> list[tuple[Layer, ...]]:
    ends = list(spec.taps.values())
    starts = [0, *(end + 1 for end in ends)]
    return [
        tuple(layer for layer in spec.layers[start : end + 1] if not isinstance(layer, ReLU))
        for start, end in zip(starts, ends)
    ]


# A table, not a cached function, which torch.compile warns of.
_LAYERS = {net: _layers_of_slices(spec) for net, spec in TRUNKS.items()}


def slice_layers(net: str, number: int) -> tuple[Layer, ...]:
    """The layers of slice ``number`` (from 1) of a trunk, ReLUs behind convolutions left out.

    A narrow trunk's have the table's numbers of channels: what runs takes those of the weights.
    """
    return _LAYERS[architecture(net)][number - 1]


def plain(layers: Sequence[Layer], parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The slice by torch's own operators: differentiable, of any dtype, on any device."""
    left = iter(parameters)

    def conv(x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, next(left), next(left), stride, padding).relu()

    for layer in layers:
        match layer:
            case Conv():
                x = conv(x, layer.stride, layer.padding)
            case MaxPool():
                x = F.max_pool2d(x, layer.kernel, layer.stride, ceil_mode=layer.ceil_mode)
            case Fire():
                squeezed = conv(x)
                x = torch.cat((conv(squeezed), conv(squeezed, padding=1)), dim=1)
    return x


def run(
    slices: Sequence[tuple[Sequence[Layer], Sequence[Tensor], bool]], held: list[Tensor]
) -> list[Tensor]:
    """The taps of slices behind each other, all of whose weights are looked at in one call.

    Args:
        slices: of each the layers (:func:`slice_layers`); weight and bias of every convolution, in
            order; and whether to let NaN through, so that a NaN in an image reaches the distance by
            its tap.
        held: one batch of images, channels-last, taken out of the list: their memory goes back when
            they were used.
    """
    layers = [layer for of_slice, _, _ in slices for layer in of_slice]
    parameters = [p for _, of_slice, _ in slices for p in of_slice]
    x = held.pop()
    taps = []
    with torch.no_grad(), kernels.below_autograd():
        convolutions = iter(_convolutions(layers, parameters, x))
        for of_slice, _, keep_nan in slices:
            for layer in of_slice:
                x = _made(layer, next(convolutions), x, keep_nan)[-1]
            taps.append(x)
    return taps


def record(
    layers: Sequence[Layer], parameters: Sequence[Tensor], x: Tensor, keep_nan: bool
) -> list[Tensor]:
    """What every layer of a slice made, the tap last, which :func:`input_gradient` needs."""
    made: list[Tensor] = []
    with torch.no_grad(), kernels.below_autograd():
        for layer, convolutions in zip(layers, _convolutions(layers, parameters, x)):
            made += _made(layer, convolutions, x, keep_nan)
            x = made[-1]
    return made


def input_gradient(
    layers: Sequence[Layer],
    parameters: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    made: Sequence[Tensor],
    keys: Sequence[Tensor] = (),
) -> Tensor:
    """The gradient to ``x``.

    One hand-written backward instead of a node of autograd for every layer: at small images the
    nodes take longer than the convolutions.

    Args:
        grad: the gradient to the tap before its ReLU.
        x, made: images and what :func:`record` made of them.
        keys: before each pooling (:mod:`lpips_fast.trunk.receptive_fields`); none: ties go by
            values.
    """
    with torch.no_grad(), kernels.below_autograd():
        return _input_gradient(layers, parameters, grad, x, made, keys)


def _input_gradient(
    layers: Sequence[Layer],
    parameters: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    made: Sequence[Tensor],
    keys: Sequence[Tensor],
) -> Tensor:
    keys_left = list(keys)
    convolutions, left = _convolutions(layers, parameters, x), [x, *made]
    backend = _backend(x)
    for k in range(len(layers) - 1, -1, -1):
        layer, result = layers[k], left.pop()
        through_relu = k > 0 and not isinstance(layers[k - 1], MaxPool)
        if isinstance(layer, Fire):
            squeezed = left.pop()
            grad = fire.input_gradient(
                FireConvolutions(*convolutions[k]), grad, left[-1], squeezed, through_relu, backend
            )
        elif isinstance(layer, MaxPool):
            key = keys_left.pop() if keys_left else None
            grad = _pool_gradient(layer, grad, left[-1], result, key)
        else:
            grad = backend.input_gradient(convolutions[k][0], grad, left[-1], through_relu)
    return grad


def _backend(x: Tensor) -> ModuleType:
    return cuda_convolution if x.is_cuda else convolution


def _convolutions(
    layers: Sequence[Layer], parameters: Sequence[Tensor], x: Tensor
) -> list[list[Convolution]]:
    """The convolutions of every layer: none, one, or a fire module's three."""
    # Nothing keeps a graph here, so that weights need not be detached.
    weights, biases = list(parameters[::2]), list(parameters[1::2])
    packed: Sequence[PackedWeight | None] = [None] * len(weights)
    if x.is_cuda:  # one launch where it is not so already
        weights = [w.to(x.dtype, memory_format=torch.channels_last) for w in weights]
        biases = [b.to(x.dtype) for b in biases]
    else:
        packed = packed_weights(weights)
    left = iter(zip(weights, biases, packed))

    def conv(stride: int = 1, padding: int = 0) -> Convolution:
        weight, bias, copies = next(left)
        return Convolution(weight, bias, stride, padding, copies)

    result: list[list[Convolution]] = []
    for layer in layers:
        match layer:
            case Conv():
                result.append([conv(layer.stride, layer.padding)])
            case Fire():
                result.append([conv(), conv(), conv(padding=1)])
            case _:
                result.append([])
    return result


def _made(
    layer: Layer, convolutions: Sequence[Convolution], x: Tensor, keep_nan: bool
) -> Sequence[Tensor]:
    """What one layer makes of ``x``, its result last."""
    if isinstance(layer, MaxPool):
        return [_pool(layer, x)]
    if isinstance(layer, Fire):
        return fire.record(FireConvolutions(*convolutions), x, _backend(x))
    return [_backend(x).convolve(convolutions[0], x, keep_nan)]


def _pool(layer: MaxPool, x: Tensor) -> Tensor:
    """By our own kernel, which needs no tensor of indices."""
    # Without cuDNN convolutions on CUDA return channels-first.
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.lpips_fast.max_pool2d(x, layer.kernel, layer.stride, layer.ceil_mode)


def _pool_gradient(
    layer: MaxPool, grad: Tensor, x: Tensor, y: Tensor, keys: Tensor | None
) -> Tensor:
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    return torch.ops.lpips_fast.max_pool2d_backward(grad, x, y, layer.kernel, layer.stride, keys)
