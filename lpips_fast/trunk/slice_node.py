"""A slice run by hand as one node of autograd, for frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from . import compiled
from .legality import FastSlice
from .slices import input_gradient, plain, record, run, slice_layers


def as_images(x: Tensor) -> Tensor:
    """Images in the dtype that the slice runs in, which autocast may say, and channels-last."""
    dtype = kernels.autocast_dtype(x.device) or x.dtype
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.to(dtype, memory_format=torch.channels_last)


def slice_tap(
    fast: FastSlice, images: Tensor | list[Tensor], keys: Sequence[Tensor] = ()
) -> Tensor:
    """The tap of images, differentiable in them where they want a gradient.

    Args:
        images: channels-last; or a list of one batch, whose memory goes back when used.
        keys: before each pooling (:mod:`lpips_fast.trunk.receptive_fields`), for the backward.
    """
    if isinstance(images, Tensor):
        images = [images]
    if kernels.is_compiling():
        return compiled.tap(fast, images.pop(), keys)
    images[0] = as_images(images[0])
    if torch.is_grad_enabled() and images[0].requires_grad:
        return _SliceTap.apply(images.pop(), fast, keys, *fast.parameters)
    return run([(slice_layers(fast.net, fast.number), fast.parameters, fast.keep_nan)], images)[0]


def taps_without_graph(slices: Sequence[FastSlice], held: list[Tensor]) -> list[Tensor]:
    """The taps of slices behind each other, in fewer calls than slice by slice.

    Args:
        held: a list of one batch, whose memory goes back when used.
    """
    held[0] = as_images(held[0])
    parts = [(slice_layers(s.net, s.number), s.parameters, s.keep_nan) for s in slices]
    return run(parts, held)


def is_transformed(*grads: Tensor | None) -> bool:
    """Whether a gradient is one of many at once, which our operators cannot take."""
    functorch = torch._C._functorch
    return any(
        g is not None and (functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g))
        for g in grads
    )


class _SliceTap(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, fast: FastSlice, keys: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.layers, ctx.keys = slice_layers(fast.net, fast.number), keys
        made = record(ctx.layers, parameters, x, fast.keep_nan)
        ctx.save_for_backward(x, *made, *parameters)
        ctx.made = len(made)
        return made[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        made, parameters = rest[: ctx.made], rest[ctx.made :]
        none = (None,) * (2 + len(parameters))
        if torch.is_grad_enabled() or is_transformed(grad):
            return plain_gradient(ctx.layers, parameters, grad, x), *none
        grad = torch.ops.aten.threshold_backward(grad, made[-1], 0)
        return input_gradient(ctx.layers, parameters, grad, x, made, ctx.keys), *none


def plain_gradient(
    layers: Sequence[Any], parameters: Sequence[Tensor], grad: Tensor, x: Tensor
) -> Tensor:
    """The same gradient through nodes that have derivatives themselves, as many as wanted."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view, so that the gradient is that of this use of x alone.
        images = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        tap = plain(layers, [p.detach() for p in parameters], images)
        (found,) = torch.autograd.grad(tap, images, grad, create_graph=again)
    return found
