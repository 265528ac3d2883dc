"""A slice of the trunk and the distance at its tap, as one node of autograd.

For the usual training step: frozen weights, an image that learns, a target that does not. Where
the gradient comes back to a tap, three meet: that of the distance, that of deeper layers, and the
derivative of the ReLU. Here they meet in one pass over memory instead of three
(``tap_backward`` in ``csrc/cpu/distance_cpu.cpp``), when the tap is reached and not for all taps at
once; behind it the slice's own backward runs without a node for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .composed import EPS
from .trunk.modules import Slice, Trunk


def takes(trunk: Trunk, x: Tensor) -> bool:
    """Whether :func:`slice_distance` takes scaled images ``x``."""
    return kernels.is_eager() and trunk.records(x) and not torch.is_autocast_enabled("cpu")


def slice_distance(
    block: Slice,
    x: Tensor,
    target: Tensor | list[Tensor],
    weight: Tensor,
    spatial: bool,
    keys: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The tap of ``block`` for images ``x``, and its distance to another tap.

    Args:
        x: (N, C, H, W), channels-last: scaled images, or the tap before.
        target: (N, C_l, H_l, W_l), without a graph, the tap to compare with. Or what becomes of it:
            a list of one tensor, ``x`` and the target's images (or tap before) as one batch
            (2N, C, H, W), which is replaced by both taps. Where calls take longer than arithmetic,
            half as many are faster; what the slice makes of the target is kept for backward too.
        weight: (C_l,) in the accumulator's dtype; may learn.
        spatial: return a map (N, 1, H_l, W_l) instead of its mean (N, 1).
        keys: of ``x``, before the slice's poolings (:meth:`Trunk.receptive_fields`).
    """
    return _SliceDistance.apply(x, weight, target, block, spatial, keys)


def _distance(tap: Tensor, target: Tensor, weight: Tensor, spatial: bool) -> Tensor:
    operators = torch.ops.lpips_fast
    if spatial:
        return operators.distance_map([tap], [target], [weight], EPS)[0]
    return operators.distance([tap], [target], [weight], EPS)


class _SliceDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        target: Tensor | list[Tensor],
        block: Slice,
        spatial: bool,
        keys: Sequence[Tensor],
    ):  # type: ignore[override]
        if isinstance(target, list):
            of_both = block.record(target.pop())
            target.append(of_both[-1])
            made, target = [m[: len(x)] for m in of_both], of_both[-1][len(x) :]
        else:
            made = block.record(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, target, *made)
        ctx.block, ctx.spatial, ctx.keys = block, spatial, keys
        return made[-1], _distance(made[-1], target, weight, spatial)

    @staticmethod
    def backward(ctx, grad_tap: Tensor | None, grad_distance: Tensor | None):  # type: ignore[override]
        x, weight, target, *made = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            both = _differentiable_backward(
                ctx, x, weight, target, grad_tap, grad_distance, needs_x, needs_weight
            )
            return (*both, None, None, None, None)
        if grad_distance is not None:
            grads = torch.ops.lpips_fast.tap_backward(
                grad_distance, grad_tap, made[-1], target, weight, EPS, needs_weight
            )
        elif grad_tap is not None:
            grads = [torch.ops.aten.threshold_backward(grad_tap, made[-1], 0)]
        else:
            return None, None, None, None, None, None
        grad_weight = grads.pop() if len(grads) > 1 else None
        # Popped, so that the slice can let go of it.
        grad_x = ctx.block.input_gradient(grads.pop(), x, made, ctx.keys) if needs_x else None
        return grad_x, grad_weight, None, None, None, None


def _differentiable_backward(
    ctx, x, weight, target, grad_tap, grad_distance, needs_x, needs_weight
) -> tuple[Tensor | None, Tensor | None]:
    """The same gradients through nodes that have a derivative themselves, for a second one."""
    tap = ctx.block(x, ctx.keys)
    results = (tap, _distance(tap, target, weight, ctx.spatial))
    pairs = [(r, g) for r, g in zip(results, (grad_tap, grad_distance)) if g is not None]
    inputs = [t for t, needed in ((x, needs_x), (weight, needs_weight)) if needed]
    if not pairs or not inputs:
        return None, None
    found = iter(
        torch.autograd.grad(
            [r for r, _ in pairs],
            inputs,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return next(found) if needs_x else None, next(found) if needs_weight else None
