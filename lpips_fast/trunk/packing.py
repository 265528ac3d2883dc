"""Packed copies of frozen weights: made once, kept outside the modules, never stale.

Winograd's transform and oneDNN's blocked order are made of a weight once and used at every call.
What they were made of is checked at every call: torch's version counter, the address, and, because
a write through ``.data``, a numpy view or another alias changes neither, the memory itself
(``csrc/weight_watch.h``): a sample with an element of every output and input channel, and a further
chunk in rotation. Any write to a whole filter or channel is seen at once, and any lasting one
within :func:`rounds` calls.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import kernels

_SAMPLE_CHANGED, _CHUNK_CHANGED = 1, 2


class PackedWeight:
    """The packed copies of one weight on the CPU, by purpose."""

    __slots__ = (
        "__weakref__",
        "_copies",
        "_dtype",
        "_shape",
        "_storage",
        "_strides",
        "_version",
        "finalizer",
        "watch",
    )

    def __init__(self, weight: Tensor) -> None:
        self._storage = StorageWeakRef(weight.untyped_storage())
        self._shape, self._strides, self._dtype = weight.shape, weight.stride(), weight.dtype
        self._version = _version(weight)
        self.watch = kernels.WeightWatch(
            weight.data_ptr(), weight.element_size(), self._shape, self._strides
        )
        self._copies: dict[Hashable, Tensor] = {}
        self.finalizer: weakref.finalize | None = None

    def is_of(self, weight: Tensor) -> bool:
        """Whether the copies are what packing ``weight`` now would give."""
        if (
            self._version != _version(weight)
            or self._strides != weight.stride()
            or self._dtype != weight.dtype
            or self._shape != weight.shape
            or self._storage.expired()
        ):
            return False
        verdict = self.watch.look(weight.data_ptr())
        if verdict == _CHUNK_CHANGED:
            warnings.warn(
                "a frozen weight of the trunk was changed in place in a few elements, behind "
                f"torch's version counter, within the last {self.watch.rounds} calls; it is "
                "packed again now. Call model.repack() after such a write to have it seen at once",
                stacklevel=2,
            )
        return verdict == 0

    def copy(self, purpose: Hashable, pack: Callable[[], Tensor]) -> Tensor:
        """What ``pack`` makes of the weight, made once for a purpose."""
        found = self._copies.get(purpose)
        if found is None:
            # Two threads may both pack; they make the same.
            with torch.no_grad():
                found = self._copies[purpose] = pack()
        return found

    @property
    def rounds(self) -> int:
        """Calls within which any lasting change of the memory is found."""
        return self.watch.rounds


# By address. The weight itself is not kept alive: where its memory is gone, so is what it says.
_PACKED: dict[int, PackedWeight] = {}


class _OfSlice(NamedTuple):
    """What was packed of a slice's weights, and one check for all of them."""

    check: kernels.WeightsCheck
    packed: list[PackedWeight]
    finalizers: list[weakref.finalize]  # of the weights' storages


# By the identities of a slice's weights.
_OF_SLICES: dict[tuple[int, ...], _OfSlice] = {}


def packed_weights(weights: list[Tensor]) -> list[PackedWeight]:
    """:func:`packed_weight` of all of a slice's weights, in one call where nothing changed."""
    key = tuple(map(id, weights))
    held = _OF_SLICES.get(key)
    if held is not None and held.check.unchanged(weights):
        return held.packed
    packed = [packed_weight(weight) for weight in weights]
    if all(type(weight) is nn.Parameter for weight in weights):  # others come and go
        check = kernels.WeightsCheck(weights, [one.watch for one in packed])
        # Of the memory, not of the parameters: torch swaps no tensor that has a weak reference.
        gone = [_when_gone(weight, _forget_slice, key) for weight in weights]
        _forget_slice(key)
        _OF_SLICES[key] = _OfSlice(check, packed, gone)
    return packed


def _forget_slice(key: tuple[int, ...]) -> None:
    held = _OF_SLICES.pop(key, None)
    if held is not None:  # or they pile up where weights are replaced at every step
        for finalizer in held.finalizers:
            finalizer.detach()


def _when_gone(weight: Tensor, function: Callable[..., Any], *arguments: Any) -> weakref.finalize:
    """Calls a function when a weight's memory is given back."""
    finalizer = weakref.finalize(weight.untyped_storage(), function, *arguments)
    finalizer.atexit = False
    return finalizer


def packed_weight(weight: Tensor) -> PackedWeight:
    """The packed copies of a weight (O, I, k, k) that lies on the CPU, checked to be of today."""
    address = weight.data_ptr()
    if address == 0 and weight.numel() > 0:
        raise RuntimeError(
            "the memory of a weight was freed between forward and backward; where weights are "
            "sharded, call backward on what the sharded module returned"
        )
    found = _PACKED.get(address)
    if found is not None and found.is_of(weight):
        return found
    # A copy of the keys alone, which makes no object: else garbage is collected meanwhile, and
    # finalizers take entries out.
    for other in list(_PACKED):
        held = _PACKED.get(other)
        if held is not None and held._storage.expired():
            _PACKED.pop(other, None)
    packed = PackedWeight(weight)
    packed.finalizer = _when_gone(weight, _forget, address, weakref.ref(packed))
    if found is not None and found.finalizer is not None:
        found.finalizer.detach()
    _PACKED[address] = packed
    return packed


def _forget(address: int, packed: weakref.ref[PackedWeight]) -> None:
    if _PACKED.get(address) is packed():
        _PACKED.pop(address, None)


def forget(weights: Iterable[Tensor]) -> None:
    """Drops what was packed of some weights: the next call packs anew."""
    for weight in weights:
        if weight.device.type == "cpu" and weight.layout == torch.strided:
            _PACKED.pop(weight.data_ptr(), None)
    for key in list(_OF_SLICES):
        _forget_slice(key)


def is_packable(weight: Tensor) -> bool:
    """Whether a weight fills its memory without a gap, so that its memory can be watched."""
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version
