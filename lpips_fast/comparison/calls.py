"""What of a model may run by hand in one call, and its images on their way to taps.

A part that is as built (:mod:`lpips_fast.trunk.legality`) runs fast; any other is called as the
module that it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from .. import kernels
from ..features import Features
from ..trunk import Trunk, compiled, tap_channels
from ..trunk.detached import call_detached
from ..trunk.legality import (
    GLOBAL_HOOKS,
    METHODS,
    FastSlice,
    Fault,
    Template,
    call_fault,
    calls_fault,
    device_fault,
    module_fault,
    own_fault,
)
from ..trunk.slice_node import taps_without_graph
from ..trunk.table import IMAGE_CHANNELS
from .linear import NetLinLayer, drops
from .masks import Mask
from .scaling import (
    ScalingLayer,
    like_of,
    scaled_batch,
    scaled_batch_and_flags,
    scaled_pair,
)

if TYPE_CHECKING:
    from ..lpips import LPIPS


@dataclass(frozen=True)
class Call:
    """One call of a model: the model, and what of it may run by hand just now.

    Attributes:
        unit_range: the images are in [0, 1].
        by_hand: of each slice, what runs it, or why it is called as a module; ``None``: nothing
            may, whatever the modules are.
        scales: whether the scaling layer is as built, so that one kernel stands for it.
        linear: whether the linear layers are weights a channel, which the kernels take.
        lins: the weights of the linear layers (1, C, 1, 1), where all are as built.
        weights: by layer, what stands for its linear weights in this call.
        mask: by which positions are weighted.
        flags: where :meth:`scaled` leaves those of the images; ``None``: it makes none.
    """

    model: LPIPS
    unit_range: bool
    by_hand: list[FastSlice | Fault] | None
    scales: bool
    linear: bool
    lins: list[Tensor] | None = None
    weights: Mapping[int, Tensor] = field(default_factory=dict)
    mask: Mask | None = None
    flags: list[Tensor] | None = None

    @property
    def is_as_built(self) -> bool:
        """Whether all that the compared layers need runs by hand."""
        return (
            self.scales
            and self.by_hand is not None
            and all(isinstance(s, FastSlice) for s in self.by_hand[: self.model.layers[-1] + 1])
        )

    def scaled(self, images: Sequence[Tensor]) -> Tensor:
        """Batches of images one behind the other, as the trunk takes them."""
        model = self.model
        if self.scales:
            dtype = model.dtype or model.scaling_layer.shift.dtype
            arguments = (model.scaling_layer, images, self.unit_range, dtype, model.version)
            if self.flags is None:
                return scaled_batch(*arguments)
            batch, flags = scaled_batch_and_flags(*arguments)
            self.flags.append(flags)
            return batch
        together = images[0] if len(images) == 1 else torch.cat(tuple(images))
        if self.unit_range:
            together = 2 * together - 1
        scaled = together if model.version == "0.0" else run(model, model.scaling_layer, together)
        return scaled if model.dtype is None else scaled.to(model.dtype)

    def scaled_pair(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Images that want a gradient, scaled; and without one, behind them, their target's.

        Where the scaling layer is as built.
        """
        model = self.model
        dtype = model.dtype or model.scaling_layer.shift.dtype
        arguments = (model.scaling_layer, images, target, self.unit_range, dtype, model.version)
        x, both, flags = scaled_pair(*arguments, flagged=self.flags is not None)
        if self.flags is not None and flags is not None:
            self.flags.append(flags)
        return x, both

    def with_flags(self) -> Call:
        """The same call, whose scaling flags images that are not finite, on CUDA; as built."""
        assert self.by_hand is not None
        by_hand = [
            dataclasses.replace(s, flagged=True) if isinstance(s, FastSlice) else s
            for s in self.by_hand
        ]
        return dataclasses.replace(self, by_hand=by_hand, flags=[])

    def taps(self, images: Sequence[Tensor]) -> Iterator[Tensor]:
        """The compared taps of batches of images one behind the other, layer by layer."""
        model = self.model
        if self.by_hand is None and _is_called_whole(model.net):
            outputs = run(model, model.net, self.scaled(images))
            return iter([outputs[k] for k in model.layers])
        return model.net.taps(
            self.scaled(images), model.checkpoint, model.layers, self.by_hand, model.frozen
        )

    def taps_at_once(self, images: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`taps` in fewer calls, where nobody wants memory back between them."""
        needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in images)
        if not self.is_as_built or needs_graph or kernels.is_compiling():
            return list(self.taps(images))
        layers = self.model.layers
        slices = self.by_hand[: layers[-1] + 1]  # type: ignore[index]
        taps = taps_without_graph(slices, [self.scaled(images)])  # type: ignore[arg-type]
        return taps if len(layers) == len(taps) else [taps[k] for k in layers]

    def encode(self, image: Tensor) -> Features:
        """The compared taps of a batch of images, together."""
        return Features(
            tuple(self.taps_at_once([image])),
            size_of(image),
            self.model.net_name,
            self.model.layers,
        )

    def trunk_learns(self) -> bool:
        """Whether any weight of the trunk gets a gradient."""
        if self.is_as_built or self.model.frozen:  # as built: learning weights are not
            return False
        return any(p.requires_grad for p in self.model.net.parameters())


def prepare_call(model: LPIPS, images: Sequence[Tensor], unit_range: bool) -> Call:
    """Looks at a model once for a call.

    Args:
        images: of the call, as the model takes them.
        unit_range: they are in [0, 1].
    """
    like = like_of(model)
    dtype = model.dtype or like.dtype
    if kernels.is_compiling():
        return _compiled_call(model, unit_range, like.device, dtype)
    by_hand = None
    fault = call_fault(images, like.device, dtype)
    net = model.net
    if fault is None and trunk_fault(net) is None:
        by_hand = net.fast_slices(like.device, dtype, model.frozen)
    scales = by_hand is not None and scaling_fault(model.scaling_layer) is None
    # Under transforms nothing is asked of the layers: they are called.
    are_called = fault is not None and (
        not kernels.has_operators() or (model.lpips and calls_fault() is not None)
    )
    lins = None if are_called else _weights_as_built(model)
    linear = not are_called and (lins is not None or _lins_fault(model) is None)
    return Call(model, unit_range, by_hand, scales, linear, lins)


def _compiled_call(
    model: LPIPS, unit_range: bool, device: torch.device, dtype: torch.dtype
) -> Call:
    """Under torch.compile all runs by hand, or nothing: the rest its own compiler fuses."""
    by_hand = None
    if device_fault(device, dtype) is None:
        by_hand = _compiled_slices(model, device, dtype)
    return Call(model, unit_range, by_hand, by_hand is not None, lins_are_linear(model))


def _compiled_slices(
    model: LPIPS, device: torch.device, dtype: torch.dtype
) -> list[FastSlice | Fault] | None:
    """The slices that run, if all is as built, in terms that torch.compile turns into guards."""
    net, scaling = model.net, model.scaling_layer
    if (
        type(net) is not Trunk
        or compiled.is_watched(net)
        or type(scaling) is not ScalingLayer
        or compiled.is_watched(scaling)
    ):
        return None
    expected = dtype if kernels.autocast_dtype(device) is None else like_of(model).dtype
    by_hand = [
        compiled.fast_slice(block, model.net_name, number, device, expected, model.frozen)
        for number, block in enumerate(net.slices()[: model.layers[-1] + 1], start=1)
    ]
    return by_hand if all(isinstance(found, FastSlice) for found in by_hand) else None


def is_unwatched(model: LPIPS) -> bool:
    """Whether nobody but a call sees its features and their gradients, whoever computes them.

    All is as built, frozen and without hooks, from the scaling layer to the linear layers.
    """
    like = like_of(model)
    dtype = model.dtype or like.dtype
    if not lins_are_linear(model):
        return False
    if kernels.is_compiling():
        return _compiled_slices(model, like.device, dtype) is not None
    if trunk_fault(model.net) is not None or scaling_fault(model.scaling_layer) is not None:
        return False
    if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
        return False
    slices = model.net.fast_slices(like.device, dtype)[: model.layers[-1] + 1]
    return all(isinstance(found, FastSlice) for found in slices)


def fast_path(model: LPIPS) -> dict[str, str]:
    """Of every part of a model ``"yes"``, or the first reason why it is called as a module."""
    like = like_of(model)
    dtype = model.dtype or like.dtype
    whole = call_fault([], like.device, dtype) or trunk_fault(model.net)
    faults: dict[str, object] = {"scaling_layer": whole or scaling_fault(model.scaling_layer)}
    slices = model.net.fast_slices(like.device, dtype, model.frozen) if whole is None else []
    for k in range(len(tap_channels(model.net_name))):
        found = slices[k] if slices else whole
        faults[f"slice{k + 1}"] = None if isinstance(found, FastSlice) else found
    faults["lins"] = lins_fault(model)
    return {part: "yes" if fault is None else str(fault) for part, fault in faults.items()}


def run(model: LPIPS, module: nn.Module, x: Tensor) -> Tensor:
    """A part of a model, called as the module that it is."""
    return call_detached(module, x) if model.frozen else module(x)


def size_of(image: Tensor) -> tuple[int, int]:
    """Height and width."""
    return image.shape[2], image.shape[3]


# --------------------------------------------------------------------------- is it as built?


_CLASSES: dict[type[nn.Module], kernels.AttributeCheck] = {
    kind: kernels.AttributeCheck([(kind, name) for name in METHODS if hasattr(kind, name)])
    for kind in (Trunk, ScalingLayer, NetLinLayer)
}


def _class_fault(kind: type[nn.Module]) -> Fault | None:
    if _CLASSES[kind].unchanged():
        return None
    return Fault("", f"is a {kind.__name__}, of which a method was replaced")


_TRUNK_ATTRIBUTES = frozenset(nn.Module().__dict__) | {"net_name", "N_slices", "_outputs"}


def trunk_fault(net: nn.Module) -> Fault | None:
    """Why the trunk is called whole: replaced, or somebody waits for it to be called."""
    return own_fault(net, Trunk, _TRUNK_ATTRIBUTES) or _class_fault(Trunk)


def _is_called_whole(net: nn.Module) -> bool:
    """:func:`trunk_fault` in terms that torch.compile turns into guards, too."""
    if kernels.is_compiling():
        return type(net) is not Trunk or compiled.is_watched(net)
    return trunk_fault(net) is not None


@functools.cache
def _scaling_template() -> Template:
    return Template(ScalingLayer())


def scaling_fault(layer: nn.Module) -> Fault | None:
    """Why the scaling layer is called as a module."""
    fault = module_fault(layer, _scaling_template(), []) or _class_fault(ScalingLayer)
    if fault is not None:
        return fault
    for name, buffer in layer._buffers.items():
        if type(buffer) is not Tensor or buffer.shape != (1, IMAGE_CHANNELS, 1, 1):
            return Fault("", f"has a {name} that is not one number a channel, as built")
        if buffer.requires_grad:
            return Fault("", f"has a {name} that learns")
    return None


def _lin_as_built(channels: int, dropout: float | None) -> NetLinLayer:
    with torch.device("meta"):
        lin = NetLinLayer(channels, use_dropout=dropout is not None)
    if dropout is not None:
        lin.model[0].p = dropout  # type: ignore[assignment]
    return lin


@functools.cache
def _lin_template(channels: int, dropout: float | None) -> Template:
    return Template(_lin_as_built(channels, dropout))


def _weights_as_built(model: LPIPS) -> list[Tensor] | None:
    """The weights of all linear layers, found in one comparison if all are as built."""
    lins = model._modules.get("lins")
    if type(lins) is not nn.ModuleList or not model.lpips or not _CLASSES[NetLinLayer].unchanged():
        return None
    rates = []
    for lin in lins._modules.values():
        rate, is_dropping = _dropout(lin)  # type: ignore[arg-type]
        if is_dropping:
            return None
        rates.append(rate)
    found: list[Tensor] = []
    template = _lins_template(model.net_name, tuple(rates))
    return found if template.check.matches(lins, found) else None


@functools.cache
def _lins_template(net: str, rates: tuple[float | None, ...]) -> Template:
    lins = nn.ModuleList()
    for channels, rate in zip(tap_channels(net), rates):
        lins.append(_lin_as_built(channels, rate))
    return Template(lins)


def lin_fault(model: LPIPS, layer: int) -> Fault | None:
    """Why a linear layer is called as a module, instead of the kernels taking its weights."""
    lins = model.lins
    # Not by index, which costs more than the comparison.
    lin = lins._modules.get(str(layer)) if type(lins) is nn.ModuleList else lins[layer]
    rate, is_dropping = _dropout(lin)  # type: ignore[arg-type]
    # Not model.chns, which is the user's to change, and nothing reads it in lpips.
    template = _lin_template(tap_channels(model.net_name)[layer], rate)
    fault = module_fault(lin, template, []) or _class_fault(NetLinLayer)  # type: ignore[arg-type]
    if fault is None and is_dropping:
        return Fault("", "drops channels in training mode")
    return fault


def _dropout(lin: nn.Module) -> tuple[float | None, bool]:
    """The rate of a linear layer's dropout, None without one; and whether it drops just now."""
    inner = lin._modules.get("model") if type(lin) is NetLinLayer else None
    first = None if inner is None else next(iter(inner._modules.values()), None)
    if not isinstance(first, nn.Dropout):
        return None, False
    return first.p, bool(first.training and first.p)


def _is_linear(lin: nn.Module) -> bool:
    """The same in terms that torch.compile turns into guards."""
    if type(lin) is not NetLinLayer or drops(lin):
        return False
    return not any(compiled.is_watched(module) for module in (lin, lin.model, lin.model[-1]))


def lins_fault(model: LPIPS) -> Fault | str | None:
    """Why the linear layers are called as modules; the baseline has none."""
    return _lins_fault(model) or (calls_fault() if model.lpips else None)


def _lins_fault(model: LPIPS) -> Fault | None:
    if not model.lpips:
        return None
    faults = (lin_fault(model, k) for k in model.layers)
    return next((fault for fault in faults if fault is not None), None)


def lins_are_linear(model: LPIPS) -> bool:
    """Whether the linear layers are nothing but weights a channel: as built, without dropout."""
    if kernels.is_compiling():
        return not model.lpips or all(_is_linear(model.lins[k]) for k in model.layers)
    return lins_fault(model) is None
