"""Channels removed from a trunk, by their effect on the distance.

A channel's effect is what the distance would lose to first order if the channel were not there:
with a gate ``g = 1`` on it, ``|dD/dg| / D`` on average over pairs (Molchanov et al., "Pruning
Convolutional Neural Networks for Resource Efficient Inference", 2017, of a loss). It goes through
the norms, too: at a tap a channel whose linear weight is 0 still counts in the norm, and with it in
the distance. So when channels of a tap go, those that stay are scaled such that the sum of their
squares is the old one over the given images, as near as non-negative factors come. The factors cost
nothing: a ReLU lets them through, so that they go into the filter, their inverses into the filters
behind, and their inverse squares into the linear weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..comparison.linear import linear_weight
from ..lpips import LPIPS, Net
from ..trunk.fire import FireModule
from ..trunk.table import (
    IMAGE_CHANNELS,
    Conv,
    Fire,
    Layer,
    architecture,
    trunk_spec,
    with_widths,
)
from .triplets import Triplets

__all__ = ["channel_effects", "prune"]

# Widths are multiples of it: what CPUs have in a register, and GPUs load at a time.
_STEP = 8
# Of a scale's square, so that what it divides stays finite.
_LEAST = 0.05
# Of the mean diagonal, which draws squares of scales towards 1: they are fitted on few images, and
# to features of channels that are no longer quite what they were.
_RIDGE = 0.03


def channel_effects(model: LPIPS, triplets: Triplets, *, batch: int = 16) -> dict[str, Tensor]:
    """First-order effect of every channel of every convolution on the distance.

    Args:
        model: with any trunk.
        triplets: both pairs of each count.
        batch: triplets at a time.

    Returns:
        (C,) by the name of the convolution in ``model.net``, such as ``slice1.0``.
    """
    watched = copy.deepcopy(model).requires_grad_(False).eval()
    convolutions = {n: m for n, m in watched.net.named_modules() if isinstance(m, nn.Conv2d)}
    gates: dict[nn.Module, Tensor] = {}

    def gate(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * gates[module]

    for conv in convolutions.values():
        conv.register_forward_hook(gate)
    effects = {
        name: conv.weight.new_zeros(conv.out_channels) for name, conv in convolutions.items()
    }
    for first in range(0, len(triplets), batch):
        part = triplets[first : first + batch]
        for other in (part.p0, part.p1):
            for conv in convolutions.values():  # of each image its own
                ones = conv.weight.new_ones(len(part), conv.out_channels, 1, 1)
                gates[conv] = ones.requires_grad_()
            distances = watched(part.ref, other).flatten()
            distances = distances[distances > 0].log()  # whose derivative is relative
            if len(distances) == 0:
                continue
            gated = [gates[conv] for conv in convolutions.values()]
            # Behind the last layer that is compared, nothing has an effect.
            grads = torch.autograd.grad(distances.sum(), gated, allow_unused=True)
            for name, grad in zip(convolutions, grads):
                if grad is not None:
                    effects[name] += grad.abs().sum(dim=(0, 2, 3))
    return {name: effect / (2 * len(triplets)) for name, effect in effects.items()}


def prune(
    model: LPIPS, triplets: Triplets, keep: float, *, effects: dict[str, Tensor] | None = None
) -> LPIPS:
    """A model whose trunk keeps a part of the channels of every convolution.

    Args:
        model: float32; it is left as it is.
        triplets: that effects and norms are measured on.
        keep: the part, in (0, 1]; widths are rounded up to multiples of 8.
        effects: of :func:`channel_effects`, or other numbers by which channels are chosen; ``None``
            measures them.

    Returns:
        A new model on the same device. Its trunk is an ordinary one: it runs by the fast path, and
        ``LPIPS(model_path=…)`` loads its state dict.

    Raises:
        ValueError: a part that is none.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, expected the part of the channels that stays, in (0, 1]")
    effects = channel_effects(model, triplets) if effects is None else effects
    layers, kept = _choose(model, keep, effects)
    narrow = _with_channels(model, layers, kept)
    _keep_norms(narrow, model, triplets)
    return narrow


def _most(effect: Tensor, keep: float) -> Tensor:
    count = min(len(effect), _STEP * math.ceil(len(effect) * keep / _STEP))
    return effect.topk(count).indices.sort().values


def _choose(
    model: LPIPS, keep: float, effects: dict[str, Tensor]
) -> tuple[list[Layer], dict[str, Tensor]]:
    """The narrow trunk's layers, and which outputs of every convolution stay."""
    layers: list[Layer] = []
    kept: dict[str, Tensor] = {}
    names = {
        name.split(".")[1]: name for name, _ in model.net.named_modules() if name.count(".") == 1
    }
    for index, layer in enumerate(trunk_spec(model.net_name).layers):
        name = names[str(index)]
        match layer:
            case Conv():
                kept[name] = _most(effects[name], keep)
                layer = layer._replace(channels=len(kept[name]))
            case Fire():
                for part in ("squeeze", "expand1x1", "expand3x3"):
                    kept[f"{name}.{part}"] = _most(effects[f"{name}.{part}"], keep)
                layer = Fire(len(kept[f"{name}.squeeze"]), len(kept[f"{name}.expand1x1"]))
        layers.append(layer)
    return layers, kept


@torch.no_grad()
def _with_channels(model: LPIPS, layers: Sequence[Layer], kept: dict[str, Tensor]) -> LPIPS:
    narrow = LPIPS(
        pretrained=False,
        net=cast(Net, with_widths(model.net_name, layers)),
        version=model.version,  # type: ignore[arg-type]
        lpips=model.lpips,
        pnet_rand=True,
        verbose=False,
        layers=model._chosen_layers,
        normalization=model.normalization,
    )
    narrow.pnet_rand, narrow.pnet_type = model.pnet_rand, architecture(model.net_name)  # type: ignore[assignment]
    narrow.to(model.scaling_layer.shift.device)
    inputs = torch.arange(IMAGE_CHANNELS)
    for k, (old, new) in enumerate(zip(model.net.slices(), narrow.net.slices())):
        for (index, source), target in zip(old.named_children(), new.children()):
            name = f"slice{k + 1}.{index}"
            if isinstance(source, nn.Conv2d):
                _copy(source, target, kept[name], inputs)
                inputs = kept[name]
            elif isinstance(source, FireModule):
                squeezed, one, three = (
                    kept[f"{name}.{part}"] for part in ("squeeze", "expand1x1", "expand3x3")
                )
                assert isinstance(target, FireModule)
                _copy(source.squeeze, target.squeeze, squeezed, inputs)
                _copy(source.expand1x1, target.expand1x1, one, squeezed)
                _copy(source.expand3x3, target.expand3x3, three, squeezed)
                inputs = torch.cat((one, source.expand1x1.out_channels + three))
        if model.lpips:
            weight = linear_weight(model.lins[k])  # type: ignore[arg-type]
            linear_weight(narrow.lins[k]).copy_(weight[:, inputs])  # type: ignore[arg-type]
    if model.normalization == "learned":
        narrow.norms.load_state_dict(model.norms.state_dict())
    return narrow


def _copy(source: nn.Conv2d, target: nn.Module, outputs: Tensor, inputs: Tensor) -> None:
    assert isinstance(target, nn.Conv2d) and source.bias is not None and target.bias is not None
    target.weight.copy_(source.weight[outputs][:, inputs])
    target.bias.copy_(source.bias[outputs])


# ------------------------------------------------------------------------------------ the norms


@torch.no_grad()
def _keep_norms(narrow: LPIPS, full: LPIPS, triplets: Triplets, batch: int = 16) -> None:
    """Scales the channels of every tap such that their norms are those of the full trunk."""
    if not narrow.lpips or narrow.net_name == full.net_name:
        return  # without linear weights, nothing takes the factors back
    sums: list[list[Tensor]] = [[] for _ in range(narrow.L)]
    for first in range(0, len(triplets), batch):
        part = triplets[first : first + batch]
        images = torch.cat((part.ref, part.p0, part.p1))
        for k, pair in enumerate(zip(_taps(narrow, images), _taps(full, images))):
            equations = norm_equations(*pair)
            sums[k] = [a + b for a, b in zip(sums[k], equations)] or list(equations)
    for k, (products, wanted) in enumerate(sums):
        _scale_tap(narrow, k, norm_factors(products, wanted).sqrt().float())


def _taps(model: LPIPS, images: Tensor) -> Sequence[Tensor]:
    return model.net(images if model.version == "0.0" else model.scaling_layer(images))


def norm_equations(few: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of factors on squares, so that their sums are the squared norms of all.

    Args:
        few, every: features (N, C, H, W) of fewer and of all channels.

    Returns:
        (C, C) and (C,) in float64. Errors count relative to the norm, by which a position's
        distance is divided.
    """
    norms = every.double().pow(2).sum(dim=1).flatten()
    relative = norms.clamp_min(1e-6).reciprocal()
    squares = few.double().pow(2).transpose(0, 1).flatten(1) * relative
    return squares @ squares.T, squares @ (norms * relative)


def norm_factors(products: Tensor, wanted: Tensor) -> Tensor:
    """Factors (C,) on squares, at least ``_LEAST``, that solve the equations, with a ridge.

    What falls below is held at the limit, and the rest solved again, until nothing falls.
    """
    ridge = _RIDGE * products.diagonal().mean()
    if not ridge > 0:  # no activations
        return torch.ones_like(wanted)
    products = products + ridge * torch.eye(len(wanted), dtype=wanted.dtype, device=wanted.device)
    wanted = wanted + ridge
    factors = torch.full_like(wanted, _LEAST)
    free = torch.ones_like(wanted, dtype=torch.bool)
    while free.any():
        held = products[free][:, ~free].sum(dim=1) * _LEAST
        found = torch.linalg.solve(products[free][:, free], wanted[free] - held)
        if bool((found >= _LEAST).all()):
            factors[free] = found
            break
        free[free.clone()] = found >= _LEAST
    return factors


def _scale_tap(model: LPIPS, layer: int, scales: Tensor) -> None:
    """Multiplies the channels of a tap; what comes behind sees no change."""
    blocks = [list(block.children()) for block in model.net.slices()]
    last = next(m for m in reversed(blocks[layer]) if isinstance(m, (nn.Conv2d, FireModule)))
    if isinstance(last, FireModule):
        one, three = last.expand1x1, last.expand3x3
        parts = list(zip((one, three), scales.split([one.out_channels, three.out_channels])))
    else:
        parts = [(last, scales)]
    for conv, scale in parts:
        assert conv.bias is not None
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.mul_(scale)
    if layer + 1 < len(blocks):
        behind = next(m for m in blocks[layer + 1] if isinstance(m, (nn.Conv2d, FireModule)))
        conv = behind.squeeze if isinstance(behind, FireModule) else behind
        conv.weight.div_(scales.view(1, -1, 1, 1))
    linear_weight(model.lins[layer]).div_(scales.view(1, -1, 1, 1) ** 2)  # type: ignore[arg-type]
