"""A slice of the trunk and the distance at its tap, as one node of autograd.

For the usual training step: frozen weights, an image that learns, a target that does not. Where
the gradient comes back to a tap, three meet: that of the distance, that of deeper layers, and the
derivative of the ReLU. Here they meet in one pass over memory instead of three
(``tap_backward`` in ``csrc/cpu/distance_cpu.cpp``), when the tap is reached and not for all taps at
once; behind it the slice's own backward runs without a node for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import composed, kernels
from ..composed import EPS
from ..kernels.distance import gradient_of_map
from ..trunk.compiled import made_like
from ..trunk.legality import FastSlice
from ..trunk.slice_node import as_images, is_transformed
from ..trunk.slices import input_gradient, plain, record, slice_layers


def slice_distance(
    fast: FastSlice,
    x: Tensor,
    target: Tensor | list[Tensor],
    weight: Tensor,
    spatial: bool,
    keys: Sequence[Tensor] = (),
    of_positions: Tensor | None = None,
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
        keys: of ``x``, before each pooling (:mod:`lpips_fast.trunk.receptive_fields`).
        of_positions: (N or 1, 1, H_l, W_l), without a graph, by which the map is multiplied before
            its mean is taken; not for ``spatial``.
    """
    x = as_images(x)
    if kernels.is_compiling():
        if of_positions is None:
            return _compiled(fast, x, target, weight, spatial, keys)
        tap, distances = _compiled(fast, x, target, weight, True, keys)
        return tap, (distances * of_positions).mean(dim=(2, 3))
    return _SliceDistance.apply(
        x, weight, target, spatial, fast, keys, of_positions, *fast.parameters
    )


def _distance(
    tap: Tensor,
    target: Tensor,
    weight: Tensor,
    spatial: bool,
    of_positions: Tensor | None = None,
) -> Tensor:
    operators = torch.ops.lpips_fast
    with kernels.below_autograd(tap, target, weight):
        if spatial:
            return operators.distance_map([tap], [target], [weight], EPS)[0]
        if of_positions is not None:
            return operators.masked_distance([tap], [target], [weight], [of_positions], EPS)
        return operators.distance([tap], [target], [weight], EPS)


class _SliceDistance(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor | list[Tensor],
        spatial: bool,
        fast: FastSlice,
        keys: Sequence[Tensor],
        of_positions: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = slice_layers(fast.net, fast.number)
        if isinstance(target, list):
            of_both = record(layers, parameters, target.pop(), fast.keep_nan)
            target.append(of_both[-1])
            # Not by slices or len(), which ask for __torch_function__ first.
            halves = [x.shape[0], of_both[-1].shape[0] - x.shape[0]]
            made = [torch.split_with_sizes(m, halves)[0] for m in of_both[:-1]]
            tap, target = torch.split_with_sizes(of_both[-1], halves)
            made.append(tap)
        else:
            made = record(layers, parameters, x, fast.keep_nan)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, target, *made, *parameters)
        ctx.layers, ctx.spatial, ctx.made, ctx.keys = layers, spatial, len(made), keys
        ctx.of_positions = of_positions
        return made[-1], _distance(made[-1], target, weight, spatial, of_positions)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_tap: Tensor | None, grad_distance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, target, *rest = ctx.saved_tensors
        made, parameters = rest[: ctx.made], rest[ctx.made :]
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        none = (None,) * (5 + len(parameters))
        if torch.is_grad_enabled() or is_transformed(grad_tap, grad_distance):
            both = _plain_gradients(ctx, x, weight, target, parameters, grad_tap, grad_distance)
            return (*both, *none)
        if grad_distance is not None:
            if ctx.of_positions is not None:
                grad_distance = gradient_of_map(grad_distance, ctx.of_positions)
            with kernels.below_autograd():
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
            input_gradient(ctx.layers, parameters, grads.pop(), x, made, ctx.keys),
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
        if ctx.of_positions is not None:
            distance = distance * ctx.of_positions
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


# ------------------------------------------------------------------------- under torch.compile

_LIBRARY = torch.library.Library("lpips_fast", "FRAGMENT")
_LIBRARY.define(
    "slice_distance(Tensor x, Tensor target, Tensor weight, Tensor[] keys, Tensor[] parameters, "
    "str net, int number, bool spatial) -> Tensor[]"
)
_LIBRARY.define(
    "slice_distance_backward(Tensor? grad_tap, Tensor grad_distance, Tensor x, Tensor target, "
    "Tensor weight, Tensor[] made, Tensor[] keys, Tensor[] parameters, str net, int number, "
    "bool need_x, bool need_weight) -> Tensor[]"
)


def _compiled(
    fast: FastSlice,
    x: Tensor,
    target: Tensor | list[Tensor],
    weight: Tensor,
    spatial: bool,
    keys: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    value, *made = torch.ops.lpips_fast.slice_distance(
        x, target, weight, list(keys), list(fast.parameters), fast.net, fast.number, spatial
    )
    return made[-1], value


def _slice_distance(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    keys: Sequence[Tensor],
    parameters: Sequence[Tensor],
    net: str,
    number: int,
    spatial: bool,
) -> list[Tensor]:
    """The distance, then what every layer of the slice made, the tap last."""
    made = record(slice_layers(net, number), parameters, as_images(x), number == 1)
    return [_distance(made[-1], target, weight, spatial), *made]


def _slice_distance_backward(
    grad_tap: Tensor | None,
    grad_distance: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    made: Sequence[Tensor],
    keys: Sequence[Tensor],
    parameters: Sequence[Tensor],
    net: str,
    number: int,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]:
    grads = torch.ops.lpips_fast.tap_backward(
        grad_distance, grad_tap, made[-1], target, weight, EPS, need_weight
    )
    if not need_x:
        return grads[1:]
    layers = slice_layers(net, number)
    return [input_gradient(layers, parameters, grads[0], as_images(x), made, keys), *grads[1:]]


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("slice_distance", _slice_distance, _device)
    _LIBRARY.impl("slice_distance_backward", _slice_distance_backward, _device)


@torch.library.register_fake("lpips_fast::slice_distance")
def _(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    keys: Sequence[Tensor],
    parameters: Sequence[Tensor],
    net: str,
    number: int,
    spatial: bool,
) -> list[Tensor]:
    made = made_like(x, parameters, slice_layers(net, number))
    batch, _, height, width = made[-1].shape
    shape = (batch, 1, height, width) if spatial else (batch, 1)
    return [x.new_empty(shape, dtype=weight.dtype), *made]


@torch.library.register_fake("lpips_fast::slice_distance_backward")
def _(
    grad_tap: Tensor | None,
    grad_distance: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    made: Sequence[Tensor],
    keys: Sequence[Tensor],
    parameters: Sequence[Tensor],
    net: str,
    number: int,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.channels_last)] if need_x else []
    return grads + ([torch.empty_like(weight)] if need_weight else [])


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, target, weight, keys, parameters, ctx.net, ctx.number, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.made, ctx.keys = len(output) - 1, len(keys)
    ctx.save_for_backward(x, target, weight, *output, *keys, *parameters)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, target, weight, value, *rest = ctx.saved_tensors
    made, rest = rest[: ctx.made], rest[ctx.made :]
    keys, parameters = rest[: ctx.keys], rest[ctx.keys :]
    need_x, need_target, need_weight = ctx.needs_input_grad[:3]
    if need_target:
        raise RuntimeError("slice_distance has no derivative in its target: detach it")
    grad_distance = torch.zeros_like(value) if grads[0] is None else grads[0]
    found = iter(
        torch.ops.lpips_fast.slice_distance_backward(
            grads[-1],
            grad_distance,
            x,
            target,
            weight,
            made,
            keys,
            parameters,
            ctx.net,
            ctx.number,
            need_x,
            need_weight,
        )
    )
    grad_x = next(found) if need_x else None
    grad_weight = next(found) if need_weight else None
    none = ([None] * len(keys), [None] * len(parameters), None, None, None)
    return (grad_x, None, grad_weight, *none)


torch.library.register_autograd("lpips_fast::slice_distance", _backward, setup_context=_save)
