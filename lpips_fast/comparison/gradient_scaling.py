"""Gradients of float16 trunks that neither vanish nor overflow, whatever the loss's weight.

The gradient of a distance to a feature is that to the distance, divided by the layer's positions
and more: 1e-6 and less, where float16 ends. So it is multiplied by a power of two where it enters,
at the distances, and divided by it where it leaves, at the images: exactly, so that a gradient that
would not have vanished stays the same. The power is found on the device, without a
synchronisation, for every backward pass anew. It travels as data: the *token*, which the first node
hands to the last, comes back as a gradient that is the power of two::

    images ── enter ── images ── trunk ── distances ── leave ── distances
                └────────────── token ──────────────────┘

No state is kept outside the graph, so that several losses, partial and repeated passes, and a graph
that goes on before the images are right by construction. What the scaled gradients reach must pass
through :func:`enter`: the images, and the linear weights where these learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the gradient to a distance, over the layer's positions: it comes to this or up to twice as
# much. The largest gradients to features and images are 0.7 times that in photographs and flat
# images, and float16 ends at 2^16; the medians of layers are 2^-9 of it, of nearly equal images
# 2^-18.
_TARGET = 2.0**10
_SMALLEST = 2.0**-96  # number that is scaled so far: the power shall be a float32, too


def enter(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The same tensors, whose gradients are divided by the power of two; and the token."""
    *same, token = _Enter.apply(*tensors)
    return same, token


def leave(
    layers: Sequence[Tensor], token: Tensor, positions: Sequence[float | Tensor]
) -> list[Tensor]:
    """The same distances, whose gradients are multiplied by the power of two.

    Args:
        layers: distances or maps of every layer.
        token: as :func:`enter` gave it.
        positions: of the layer's features, for every element of the distance or map, over the
            largest weight of any; as a tensor where a mask gives the weights.
    """
    return list(_Leave.apply(token, tuple(positions), *layers))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return (*(t.view_as(t) for t in tensors), tensors[0].new_zeros((), dtype=torch.float32))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # type: ignore[override]
        *of_tensors, power = grads
        if power is None:
            return tuple(of_tensors)
        return tuple(None if g is None else _divide(g, power) for g in of_tensors)


def _divide(grad: Tensor, power: Tensor) -> Tensor:
    """In float32 at least: the power may lie beyond float16."""
    if grad.dtype.itemsize < 4:
        return (grad.float() / power).to(grad.dtype)
    return grad / power.to(grad.dtype)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, token: Tensor, positions: tuple[float | Tensor, ...], *layers: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.positions = positions
        return tuple(layer.view_as(layer) for layer in layers)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # type: ignore[override]
        asked = [(g, p) for g, p in zip(grads, ctx.positions) if g is not None and g.numel() > 0]
        if not asked:
            return (None, None, *grads)
        power = _power_of_two([g.detach().abs().amax().float() / p for g, p in asked])
        return (power, None, *(None if g is None else g * power.to(g.dtype) for g in grads))


def _power_of_two(largest: Sequence[Tensor]) -> Tensor:
    """By which the largest number comes to _TARGET or up to twice it; 1 for zero, NaN, infinity."""
    most = torch.stack(list(largest)).amax()
    # The exponent alone: of infinity and NaN it is infinity, of zero and subnormal numbers zero.
    below = (most.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = _TARGET / below.clamp(_SMALLEST, 1 / _SMALLEST)
    return torch.where((below > 0) & torch.isfinite(below), power, 1)
