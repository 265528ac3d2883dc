"""The fused distance: fake kernels (shapes and strides for compiling and exporting), derivatives.

The backward kernels are operators too; their own derivative is that of the composed formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import composed
from .dispatch import below_autograd
from .registration import fake_kernel, flops, without_derivative


def fused_distance(
    feats0: list[Tensor],
    feats1: list[Tensor],
    weights: list[Tensor],
    eps: float,
    position_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """The operator of the distance, or of the masked one: (N, L), in the fewest calls.

    Args:
        feats0, feats1: features a layer, all that the operator takes.
        weights: (C_l,) in the accumulator's dtype.
        position_weights: (N or 1, 1, H_l, W_l), in the same.
    """
    if position_weights is not None:
        with below_autograd(*feats0, *feats1, *weights, *position_weights):
            return torch.ops.lpips_fast.masked_distance(
                feats0, feats1, weights, list(position_weights), eps
            )
    with below_autograd(*feats0, *feats1, *weights):
        return torch.ops.lpips_fast.distance(feats0, feats1, weights, eps)


def _empty_distance(feats: Sequence[Tensor]) -> Tensor:
    dtype = composed.accumulator_dtype(feats[0].dtype)
    return feats[0].new_empty((feats[0].shape[0], len(feats)), dtype=dtype)


def _empty_gradient(feat: Tensor, order_of: Tensor) -> Tensor:
    # The layout rule of csrc/lpips_distance.h: gradients lie in the order that the layer ran in.
    channels_last = order_of.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(feat.shape, dtype=feat.dtype, device=feat.device, memory_format=layout)


@fake_kernel("distance")
def _(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], weights: Sequence[Tensor], eps: float
) -> Tensor:
    return _empty_distance(feats0)


@fake_kernel("masked_distance")
def _(
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor],
    position_weights: Sequence[Tensor],
    eps: float,
) -> Tensor:
    return _empty_distance(feats0)


@fake_kernel("distance_map")
def _(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], weights: Sequence[Tensor], eps: float
) -> list[Tensor]:
    dtype = composed.accumulator_dtype(feats0[0].dtype)
    return [f.new_empty((f.shape[0], 1, f.shape[2], f.shape[3]), dtype=dtype) for f in feats0]


def _fake_backward(
    grad: Tensor | Sequence[Tensor],
    feats0: Sequence[Tensor],
    feats1: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float,
    need_feats0: bool,
    need_feats1: bool,
    need_weights: bool,
) -> list[Tensor]:
    grads0 = [_empty_gradient(f, f) for f in feats0] if need_feats0 else []
    grads1 = [_empty_gradient(f, o) for f, o in zip(feats1, feats0)] if need_feats1 else []
    return grads0 + grads1 + ([torch.empty_like(w) for w in weights] if need_weights else [])


fake_kernel("distance_backward")(_fake_backward)
fake_kernel("distance_map_backward")(_fake_backward)


@fake_kernel("tap_backward")
def _(
    grad: Tensor,
    deeper: Tensor | None,
    feat0: Tensor,
    feat1: Tensor,
    weight: Tensor,
    eps: float,
    need_weight: bool,
) -> list[Tensor]:
    return _fake_backward(grad, [feat0], [feat1], [weight], eps, True, False, need_weight)


def _save_inputs(ctx, inputs, output) -> None:
    feats0, feats1, weights, ctx.eps = inputs
    ctx.layers = len(feats0)
    ctx.save_for_backward(*feats0, *feats1, *weights)


def _split(tensors: Sequence[Tensor], layers: int) -> tuple[list[Tensor], ...]:
    return tuple(list(tensors[k * layers : (k + 1) * layers]) for k in range(3))


def _layerwise_backward(operator: Callable) -> Callable:
    """The backward of a forward operator, by the backward operator of the same formula."""

    def backward(ctx, grad):
        feats0, feats1, weights = _split(ctx.saved_tensors, ctx.layers)
        needs = [any(needed) for needed in ctx.needs_input_grad[:3]]
        if isinstance(grad, list):  # a map that took no part in the loss has no gradient
            grad = [
                g if g is not None else torch.zeros_like(f[:, :1], dtype=weights[0].dtype)
                for g, f in zip(grad, feats0)
            ]
        grads = iter(operator(grad, feats0, feats1, weights, ctx.eps, *needs))
        results = []
        for asked, needed in zip(ctx.needs_input_grad[:3], needs):
            computed = [next(grads) for _ in asked] if needed else [None] * ctx.layers
            results.append([g if a else None for g, a in zip(computed, asked)])
        return (*results, None)

    return backward


def _save_backward_inputs(ctx, inputs, output) -> None:
    grad, feats0, feats1, weights, ctx.eps, *ctx.needs = inputs
    ctx.layers = len(feats0)
    ctx.grad_is_list = isinstance(grad, list)
    ctx.save_for_backward(*feats0, *feats1, *weights, *(grad if ctx.grad_is_list else (grad,)))


def _double_backward(formula: Callable) -> Callable:
    """The derivative of a backward operator, by differentiating the composed formula twice.

    With a graph of its own where one is wanted, so that there are derivatives of any order.
    """

    def backward(ctx, grad_grads):
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that derivatives are those of this use of a tensor, not of another tensor
            # that was made from it; new leaves where a tensor has no derivative.
            saved = [
                t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
                for t in ctx.saved_tensors
            ]
            inputs, grad = saved[: 3 * ctx.layers], saved[3 * ctx.layers :]
            outputs = formula(*_split(inputs, ctx.layers), ctx.eps)
            first = torch.autograd.grad(
                outputs, inputs, grad if ctx.grad_is_list else grad[0], create_graph=True
            )
            groups = _split(first, ctx.layers)
            asked = [g for group, need in zip(groups, ctx.needs) if need for g in group]
            pairs = [(g, gg) for g, gg in zip(asked, grad_grads) if gg is not None]
            second = torch.autograd.grad(
                [g for g, _ in pairs],
                saved,
                [gg for _, gg in pairs],
                create_graph=again,
                allow_unused=True,
            )
        feats0, feats1, weights = _split(second[: 3 * ctx.layers], ctx.layers)
        grad_of_grad = list(second[3 * ctx.layers :])
        return (
            grad_of_grad if ctx.grad_is_list else grad_of_grad[0],
            feats0,
            feats1,
            weights,
            *[None] * 4,
        )

    return backward


def _composed_maps(feats0, feats1, weights, eps) -> list[Tensor]:
    return [composed.distance_map(a, b, w, eps) for a, b, w in zip(feats0, feats1, weights)]


for _name, _formula in (("distance", composed.distance), ("distance_map", _composed_maps)):
    torch.library.register_autograd(
        f"lpips_fast::{_name}",
        _layerwise_backward(getattr(torch.ops.lpips_fast, f"{_name}_backward")),
        setup_context=_save_inputs,
    )
    torch.library.register_autograd(
        f"lpips_fast::{_name}_backward",
        _double_backward(_formula),
        setup_context=_save_backward_inputs,
    )

without_derivative("tap_backward")


def gradient_of_map(grad: Tensor, position_weights: Tensor) -> Tensor:
    """The gradient to a layer's map (N, 1, H, W) from that to its masked distance, (N,).

    Weights of 1 give the numbers that the backward of ``distance`` uses, to the bit: on the CPU it
    divides by the number of positions in float64, on CUDA in the accumulator's dtype.
    """
    share = 1.0 / (position_weights.shape[2] * position_weights.shape[3])
    wide = grad.double() if grad.device.type == "cpu" else grad
    return (wide * share).to(grad.dtype).view(-1, 1, 1, 1) * position_weights


def _save_masked(ctx, inputs, output) -> None:
    feats0, feats1, weights, position_weights, ctx.eps = inputs
    ctx.layers = len(feats0)
    ctx.save_for_backward(*feats0, *feats1, *weights, *position_weights)


def _masked_backward(ctx, grad):
    """By the backward of the map, which takes a gradient for every position."""
    feats0, feats1, weights = _split(ctx.saved_tensors, ctx.layers)
    position_weights = ctx.saved_tensors[3 * ctx.layers :]
    asked = ctx.needs_input_grad[:4]
    needs = [any(needed) for needed in asked[:3]]
    columns = grad.unbind(dim=1)
    results = [[None] * ctx.layers for _ in range(4)]
    if any(needs):
        grads = [gradient_of_map(g, p) for g, p in zip(columns, position_weights)]
        found = iter(
            torch.ops.lpips_fast.distance_map_backward(
                grads, feats0, feats1, weights, ctx.eps, *needs
            )
        )
        for group, needed in enumerate(needs):
            computed = [next(found) for _ in feats0] if needed else [None] * ctx.layers
            results[group] = [g if a else None for g, a in zip(computed, asked[group])]
    if any(asked[3]):  # of a mask that learns
        maps = torch.ops.lpips_fast.distance_map(feats0, feats1, weights, ctx.eps)
        of_maps = [gradient_of_map(g, torch.ones_like(m)) * m for g, m in zip(columns, maps)]
        results[3] = [
            (g.sum(dim=0, keepdim=True) if len(p) < len(g) else g) if a else None
            for g, p, a in zip(of_maps, position_weights, asked[3])
        ]
    return (*results, None)


torch.library.register_autograd(
    "lpips_fast::masked_distance", _masked_backward, setup_context=_save_masked
)


# ---------------------------------------------------------------------------------------- FLOPs


def _distance_flops(feats: Sequence[torch.Size]) -> int:
    # Of a channel at a position: its share of both norms, and of the weighted sum.
    return sum(6 * feat.numel() for feat in feats)


@flops("distance", "distance_map")
def _(
    feats0: Sequence[torch.Size],
    feats1: Sequence[torch.Size],
    weights: Sequence[torch.Size],
    eps: float,
) -> int:
    return _distance_flops(feats0)


@flops("masked_distance")
def _(
    feats0: Sequence[torch.Size],
    feats1: Sequence[torch.Size],
    weights: Sequence[torch.Size],
    position_weights: Sequence[torch.Size],
    eps: float,
) -> int:
    return _distance_flops(feats0) + sum(2 * f[0] * f[2] * f[3] for f in feats0)


@flops("distance_backward", "distance_map_backward")
def _(
    grad: torch.Size | Sequence[torch.Size],
    feats0: Sequence[torch.Size],
    feats1: Sequence[torch.Size],
    weights: Sequence[torch.Size],
    eps: float,
    need_feats0: bool,
    need_feats1: bool,
    need_weights: bool,
) -> int:
    return (need_feats0 + need_feats1 + need_weights) * _distance_flops(feats0)


@flops("tap_backward")
def _(
    grad: torch.Size,
    deeper: torch.Size | None,
    feat0: torch.Size,
    feat1: torch.Size,
    weight: torch.Size,
    eps: float,
    need_weight: bool,
) -> int:
    return (1 + need_weight) * _distance_flops([feat0])
