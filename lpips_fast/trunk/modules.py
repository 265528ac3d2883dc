"""The module that runs a trunk.

The layers of :data:`~lpips_fast.trunk.TRUNKS` are grouped into ``slice1``, ``slice2``, … at the
taps, as in the ``lpips`` package, so that its checkpoints load.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import compiled, legality, packing
from .detached import call_detached
from .layers import make_layer
from .legality import LEARNS, FastSlice, Fault
from .receptive_fields import receptive_fields
from .slice_node import as_images, slice_tap
from .table import IMAGE_CHANNELS, trunk_spec


def _holds_no_numbers(block: nn.Module) -> bool:
    """Whether weights are on the meta device, and nobody brings them when a module is called."""
    if not any(p.is_meta for p in block.parameters()):
        return False
    return not any(compiled.is_watched(module) for module in block.modules())


class Trunk(nn.Module):
    """A frozen convolutional network that returns its taps.

    Args:
        net: a key of :data:`TRUNKS`, or the name of a narrow one.
        state_dict: ``features.N.…`` weights with torchvision's names
            (:func:`lpips_fast.weights.load_trunk_weights`), or ``None`` for random ones, drawn as
            torchvision draws them.
        requires_grad: whether the weights learn.

    Weights lie as in ``lpips``, contiguous; activations are channels-last where slices run by hand,
    the order in which both the convolutions and the distance that follows are fastest.

    >>> taps = Trunk("alex")(torch.zeros(1, 3, 64, 64))
    >>> taps._fields, taps.relu1.shape
    (('relu1', 'relu2', 'relu3', 'relu4', 'relu5'), torch.Size([1, 64, 15, 15]))
    """

    def __init__(
        self, net: str, state_dict: dict[str, Tensor] | None = None, requires_grad: bool = False
    ) -> None:
        super().__init__()
        spec = trunk_spec(net)
        self.net_name = net
        self.N_slices = len(spec.taps)
        self._outputs = namedtuple("TrunkOutputs", spec.taps)  # type: ignore[misc]
        channels, first = IMAGE_CHANNELS, 0
        for number, last in enumerate(spec.taps.values(), start=1):
            block = nn.Sequential()
            for index in range(first, last + 1):
                module, channels = make_layer(spec.layers[index], channels)
                block.add_module(str(index), module)
            self.add_module(f"slice{number}", block)
            first = last + 1
        if state_dict is not None:
            self.load_features(state_dict)
        elif spec.initialize is not None:
            for conv in self.modules():
                if isinstance(conv, nn.Conv2d):
                    spec.initialize(conv.weight)
                    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.requires_grad_(requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The outputs' class is made from the table and so cannot be pickled by name.
        state = {k: v for k, v in self.__dict__.items() if k != "_outputs"}
        return _restore_trunk, (type(self), state)

    def slices(self) -> list[nn.Module]:
        """The slices as they are now, replaced ones too."""
        modules = self._modules  # not by name, which costs a microsecond each
        return [modules[f"slice{number}"] for number in range(1, self.N_slices + 1)]  # type: ignore[misc]

    def fast_slices(
        self, device: torch.device, dtype: torch.dtype, frozen: bool = False
    ) -> list[FastSlice | Fault]:
        """Of each slice, what runs it by hand on scaled images of a dtype, or why nothing may.

        Args:
            frozen: the weights are used without a gradient, whether they ask for one or not.
        """
        return legality.fast_slices(self.slices(), self.net_name, device, dtype, frozen)

    def repack(self) -> None:
        """Has what was packed of the weights made anew by the next call."""
        packing.forget(self.parameters())

    def load_features(self, state_dict: dict[str, Tensor]) -> None:
        """Loads weights with torchvision's names, ``features.N.…``."""
        slice_of = {
            index: f"slice{number}"
            for number, block in enumerate(self.slices(), start=1)
            for index in block._modules
        }
        renamed = {}
        for key, value in state_dict.items():
            index = key.split(".")[1]
            renamed[f"{slice_of[index]}.{key.removeprefix('features.')}"] = value
        self.load_state_dict(renamed)

    def taps(
        self,
        x: Tensor,
        checkpoint: bool = False,
        layers: Sequence[int] | None = None,
        fast: Sequence[FastSlice | Fault] | None = None,
        frozen: bool = False,
    ) -> Iterator[Tensor]:
        """The taps of scaled images (N, 3, H, W) one after the other.

        A tap that the caller lets go of is kept no longer than the next slice needs it.

        Args:
            checkpoint: keep only the taps for backward, and recompute what lies between them.
            layers: which taps, ascending; ``None``: all. Nothing behind the last of them runs.
            fast: of :meth:`fast_slices`; a slice without one is called as a module.
            frozen: no gradient reaches the weights.
        """
        wanted = range(self.N_slices) if layers is None else layers
        keys: list[list[Tensor]] = []
        if fast is not None and torch.is_grad_enabled() and x.requires_grad:
            keys = receptive_fields(fast[: wanted[-1] + 1], as_images(x))
        held, called = [x], False
        del x
        for layer, block in enumerate(self.slices()[: wanted[-1] + 1]):
            by_hand = fast[layer] if fast is not None else None
            if called and isinstance(by_hand, FastSlice) and not legality.takes(by_hand, held[0]):
                by_hand = None  # of what a changed slice made, modules are the judges
            if isinstance(by_hand, FastSlice):
                of_slice = keys[layer] if keys else []
                if checkpoint and torch.is_grad_enabled():
                    function = functools.partial(slice_tap, by_hand, keys=of_slice)
                    held = [_checkpoint(function, held.pop())]
                else:
                    held = [slice_tap(by_hand, held, of_slice)]
            else:
                called = True
                if not held[0].is_meta and _holds_no_numbers(block):
                    raise RuntimeError(
                        f"slice{layer + 1} has weights on the meta device, which hold no numbers; "
                        "load them (load_state_dict with assign=True) before the model is called"
                    )
                if isinstance(by_hand, Fault) and by_hand is not LEARNS:
                    # As in lpips, for whoever looks into a slice that was changed.
                    held = [held.pop().contiguous()]
                run = functools.partial(call_detached, block) if frozen else block
                if checkpoint and torch.is_grad_enabled():
                    held = [_checkpoint(run, held.pop())]
                else:
                    held = [run(held.pop())]
            if layer in wanted:
                yield held[0]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Taps of scaled images.

        Args:
            x: (N, 3, H, W), as :class:`lpips_fast.ScalingLayer` returns it.

        Returns:
            A named tuple, one tensor (N, C_l, H_l, W_l) per tap.
        """
        by_hand = legality.call_fault([x], x.device, x.dtype) is None
        fast = self.fast_slices(x.device, x.dtype) if by_hand else None
        return self._outputs(*self.taps(x, fast=fast))


def _checkpoint(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


def _restore_trunk(cls: type[Trunk], state: dict[str, Any]) -> Trunk:
    trunk = cls.__new__(cls)
    trunk.__dict__.update(state)
    trunk._outputs = namedtuple("TrunkOutputs", trunk_spec(trunk.net_name).taps)  # type: ignore[misc]
    return trunk
