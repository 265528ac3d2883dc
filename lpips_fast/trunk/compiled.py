"""Slices under torch.compile: opaque operators, and when they stand for modules.

A slice is one operator, forward and backward, that takes images and plain weights and biases;
packing happens inside as it runs, so that compiled code never holds a stale copy. Exported, traced
and transformed programs get torch's own operators instead: there the modules are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .fire import FireModule, has_border
from .legality import FastSlice, Fault
from .max_pool import CeilMaxPool2d
from .slices import input_gradient, record, run, slice_layers
from .table import Conv, Fire, Layer, MaxPool

_LIBRARY = torch.library.Library("lpips_fast", "FRAGMENT")
_LIBRARY.define("slice_tap(Tensor x, Tensor[] parameters, str net, int number) -> Tensor")
_LIBRARY.define(
    "slice_record(Tensor x, Tensor[] keys, Tensor[] parameters, str net, int number) -> Tensor[]"
)
_LIBRARY.define(
    "slice_backward(Tensor grad, Tensor x, Tensor[] made, Tensor[] keys, Tensor[] parameters, "
    "str net, int number) -> Tensor"
)


def _slice_tap(x: Tensor, parameters: Sequence[Tensor], net: str, number: int) -> Tensor:
    return run([(slice_layers(net, number), parameters, number == 1)], [_as_images(x)])[0]


def _slice_record(
    x: Tensor, keys: Sequence[Tensor], parameters: Sequence[Tensor], net: str, number: int
) -> list[Tensor]:
    return record(slice_layers(net, number), parameters, _as_images(x), number == 1)


def _slice_backward(
    grad: Tensor,
    x: Tensor,
    made: Sequence[Tensor],
    keys: Sequence[Tensor],
    parameters: Sequence[Tensor],
    net: str,
    number: int,
) -> Tensor:
    grad = torch.ops.aten.threshold_backward(grad, made[-1], 0)
    return input_gradient(slice_layers(net, number), parameters, grad, _as_images(x), made, keys)


def _as_images(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("slice_tap", _slice_tap, _device)
    _LIBRARY.impl("slice_record", _slice_record, _device)
    _LIBRARY.impl("slice_backward", _slice_backward, _device)


# ------------------------------------------------------------------------------- fake kernels


def made_like(x: Tensor, parameters: Sequence[Tensor], layers: Sequence[Layer]) -> list[Tensor]:
    """Empty tensors like those that :func:`~lpips_fast.trunk.slices.record` makes."""
    left, made = iter(parameters), []

    def conv(x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        # As the kernels take them, which under autocast are given others.
        weight, bias = next(left).to(x.dtype), next(left).to(x.dtype)
        y = F.conv2d(x, weight, bias, stride, padding)
        return torch.empty_like(y, memory_format=torch.channels_last)

    for layer in layers:
        match layer:
            case Conv():
                x = conv(x, layer.stride, layer.padding)
            case MaxPool():
                y = F.max_pool2d(x, layer.kernel, layer.stride, ceil_mode=layer.ceil_mode)
                x = torch.empty_like(y, memory_format=torch.channels_last)
            case Fire():
                squeezed = conv(x)
                expanded = torch.cat((conv(squeezed), conv(squeezed, padding=1)), dim=1)
                x = torch.empty_like(expanded, memory_format=torch.channels_last)
                if has_border(x):
                    squeezed = F.pad(squeezed, (1, 1, 1, 1))
                made.append(torch.empty_like(squeezed, memory_format=torch.channels_last))
        made.append(x)
    return made


@torch.library.register_fake("lpips_fast::slice_tap")
def _(x: Tensor, parameters: Sequence[Tensor], net: str, number: int) -> Tensor:
    return made_like(x, parameters, slice_layers(net, number))[-1]


@torch.library.register_fake("lpips_fast::slice_record")
def _(
    x: Tensor, keys: Sequence[Tensor], parameters: Sequence[Tensor], net: str, number: int
) -> list[Tensor]:
    return made_like(x, parameters, slice_layers(net, number))


@torch.library.register_fake("lpips_fast::slice_backward")
def _(
    grad: Tensor,
    x: Tensor,
    made: Sequence[Tensor],
    keys: Sequence[Tensor],
    parameters: Sequence[Tensor],
    net: str,
    number: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------- derivative


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, keys, parameters, ctx.net, ctx.number = inputs
    ctx.set_materialize_grads(False)
    ctx.made, ctx.keys = len(output), len(keys)
    ctx.save_for_backward(x, *output, *keys, *parameters)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    made, rest = rest[: ctx.made], rest[ctx.made :]
    keys, parameters = rest[: ctx.keys], rest[ctx.keys :]
    none = ([None] * len(keys), [None] * len(parameters), None, None)
    if grads[-1] is None:
        return (None, *none)
    operator = torch.ops.lpips_fast.slice_backward
    return (operator(grads[-1], x, made, keys, parameters, ctx.net, ctx.number), *none)


torch.library.register_autograd("lpips_fast::slice_record", _backward, setup_context=_save)


def tap(fast: FastSlice, x: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """The tap of images, as torch.compile records it."""
    operators, parameters = torch.ops.lpips_fast, list(fast.parameters)
    dtype = kernels.autocast_dtype(x.device)
    if dtype is not None:
        x = x.to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return operators.slice_record(x, list(keys), parameters, fast.net, fast.number)[-1]
    return operators.slice_tap(x, parameters, fast.net, fast.number)


# ------------------------------------------------------------------------------------ legality


def fast_slice(
    block: nn.Module, net: str, number: int, device: torch.device, dtype: torch.dtype, frozen: bool
) -> FastSlice | Fault:
    """:func:`lpips_fast.trunk.legality.fast_slice` in terms that torch.compile turns into guards.

    What is looked at here is looked at again before every compiled call, so that a model that was
    changed since is compiled anew.
    """
    layers, children = slice_layers(net, number), list(block.children())
    if type(block) is not nn.Sequential or is_watched(block):
        return Fault("", "is not as built")
    parameters: list[Tensor] = []
    position = 0
    for layer in layers:
        if position >= len(children) or not _is_as_built(children[position], layer, parameters):
            return Fault("", "holds layers that are not as built")
        position += 1
        if isinstance(layer, Conv):
            if position >= len(children) or not _is_relu(children[position]):
                return Fault("", "holds layers that are not as built")
            position += 1
    if position != len(children):
        return Fault("", "holds other layers than as built")
    for parameter in parameters:
        if parameter.dtype != dtype or parameter.device != device:
            return Fault("", "has weights of another dtype or device than the images")
        if parameter.requires_grad and not frozen and torch.is_grad_enabled():
            return Fault("", "has weights that learn")
    if frozen:
        parameters = [parameter.detach() for parameter in parameters]
    return FastSlice(net, number, tuple(parameters))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called, or replaced what a call does."""
    return bool(
        len(module._forward_hooks)
        or len(module._forward_pre_hooks)
        or len(module._backward_hooks)
        or len(module._backward_pre_hooks)
        or "forward" in module.__dict__
    )


def _is_as_built(module: nn.Module, layer: Layer, parameters: list[Tensor]) -> bool:
    if is_watched(module):
        return False
    if isinstance(layer, MaxPool):
        return (
            type(module) is (CeilMaxPool2d if layer.ceil_mode else nn.MaxPool2d)
            and module.kernel_size == layer.kernel
            and module.stride == layer.stride
            and module.padding == 0
            and module.dilation == 1
            and module.ceil_mode == layer.ceil_mode
            and not module.return_indices
        )
    if isinstance(layer, Conv):
        return _is_convolution(module, layer.kernel, layer.stride, layer.padding, parameters)
    return (
        type(module) is FireModule
        and _is_convolution(module.squeeze, 1, 1, 0, parameters)
        and _is_convolution(module.expand1x1, 1, 1, 0, parameters)
        and _is_convolution(module.expand3x3, 3, 1, 1, parameters)
        and _is_relu(module.squeeze_activation)
        and _is_relu(module.expand1x1_activation)
        and _is_relu(module.expand3x3_activation)
    )


def _is_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not is_watched(module)


def _is_convolution(
    module: nn.Module, kernel: int, stride: int, padding: int, parameters: list[Tensor]
) -> bool:
    if type(module) is not nn.Conv2d or is_watched(module) or module.bias is None:
        return False
    parameters.append(module.weight)
    parameters.append(module.bias)
    return (
        module.weight.shape[2] == kernel
        and module.weight.shape[3] == kernel
        and module.kernel_size == (kernel, kernel)
        and module.stride == (stride, stride)
        and module.padding == (padding, padding)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )
