"""A slice of the trunk and the distance at its tap, as one node of autograd.

For the usual training step: frozen weights, an image that learns, a target that does not. Where
the gradient comes back to a tap, three meet: that of the distance, that of deeper layers, and the
derivative of the ReLU. Here they meet in one pass over memory instead of three
(``tap_backward`` in ``csrc/cpu/distance_cpu.cpp``), when the tap is reached and not for all taps at
once; behind it the slice's own backward runs without a node for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import composed
from .composed import EPS
from .trunk.legality import FastSlice
from .trunk.slice_node import as_images, is_transformed, keeps_nan
from .trunk.slices import input_gradient, plain, record, slice_layers


def slice_distance(
    fast: FastSlice, x: Tensor, target: Tensor | list[Tensor], weight: Tensor, spatial: bool
) -> tuple[Tensor, Tensor]:
    """The tap of a slice for images ``x``, and its distance to another tap.

    Args:
        x: (N, C, H, W), channels-last: scaled images, or the tap before.
        target: (N, C_l, H_l, W_l), without a graph, the tap to compare with. Or what becomes of it:
            a list of one tensor, ``x`` and the target's images (or tap before) as one batch
            (2N, C, H, W), which is replaced by both taps. Where calls take longer than arithmetic,
            half as many are faster; what the slice makes of the target is kept for backward too.
        weight: (C_l,) in the accumulator's dtype; may learn.
        spatial: return a map (N, 1, H_l, W_l) instead of its mean (N, 1).
    """
    x = as_images(x)
    return _SliceDistance.apply(x, weight, target, spatial, fast.net, fast.number, *fast.parameters)


def _distance(tap: Tensor, target: Tensor, weight: Tensor, spatial: bool) -> Tensor:
    operators = torch.ops.lpips_fast
    if spatial:
        return operators.distance_map([tap], [target], [weight], EPS)[0]
    return operators.distance([tap], [target], [weight], EPS)


class _SliceDistance(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor | list[Tensor],
        spatial: bool,
        net: str,
        number: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = slice_layers(net, number)
        if isinstance(target, list):
            of_both = record(layers, parameters, target.pop(), keeps_nan(number))
            target.append(of_both[-1])
            made, target = [m[: len(x)] for m in of_both], of_both[-1][len(x) :]
        else:
            made = record(layers, parameters, x, keeps_nan(number))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, target, *made, *parameters)
        ctx.layers, ctx.spatial, ctx.made = layers, spatial, len(made)
        return made[-1], _distance(made[-1], target, weight, spatial)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_tap: Tensor | None, grad_distance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, target, *rest = ctx.saved_tensors
        made, parameters = rest[: ctx.made], rest[ctx.made :]
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        none = (None,) * (4 + len(parameters))
        if torch.is_grad_enabled() or is_transformed(grad_tap, grad_distance):
            both = _plain_gradients(ctx, x, weight, target, parameters, grad_tap, grad_distance)
            return (*both, *none)
        if grad_distance is not None:
            grads = torch.ops.lpips_fast.tap_backward(
                grad_distance, grad_tap, made[-1], target, weight, EPS, needs_weight
            )
        elif grad_tap is not None:
            grads = [torch.ops.aten.threshold_backward(grad_tap, made[-1], 0)]
        else:
            return (None, None, *none)
        grad_weight = grads.pop() if len(grads) > 1 else None
        if not needs_x:
            return (None, grad_weight, *none)
        # Popped, so that the slice can let go of it.
        return (
            input_gradient(ctx.layers, parameters, grads.pop(), x, made),
            grad_weight,
            *none,
        )


def _plain_gradients(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    parameters: list[Tensor],
    grad_tap: Tensor | None,
    grad_distance: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The same gradients through nodes that have derivatives themselves, as many as wanted."""
    needs, again = ctx.needs_input_grad[:2], torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the gradients are those of this use alone.
        aliases = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_(needed)
            for t, needed in zip((x, weight), needs)
        ]
        tap = plain(ctx.layers, [p.detach() for p in parameters], aliases[0])
        distance = composed.distance_map(tap, target, aliases[1])
        if not ctx.spatial:
            distance = distance.mean(dim=(2, 3))
        results = ((tap, grad_tap), (distance, grad_distance))
        pairs = [(r, g) for r, g in results if g is not None]
        inputs = [alias for alias, needed in zip(aliases, needs) if needed]
        if not pairs or not inputs:
            return None, None
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs],
                inputs,
                [g for _, g in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
    return next(found) if needs[0] else None, next(found) if needs[1] else None
