"""Which positions before a max-pooling see the same picture.

Where an image is flat, padded or periodic, positions of a layer are equal in exact arithmetic, and
max-pooling's gradient belongs to the first of them. Computed, one of them is the largest by its
rounding, which with Winograd's algorithm depends on the place in a tile. So such ties are not told
by the values but by what a position sees: a key of the bits in its receptive field
(``csrc/cpu/receptive_fields_cpu.cpp``), from the images alone. The forward does not know of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.receptive_fields import CONVOLUTION, FIRE, POOLING
from .legality import FastSlice, Fault
from .slices import slice_layers
from .table import TRUNKS, Conv, Fire, MaxPool, architecture


def receptive_fields(slices: Sequence[FastSlice | Fault], x: Tensor) -> list[list[Tensor]]:
    """For every slice, the keys before each of its poolings, as its backward takes them.

    Args:
        slices: of a trunk, from the first on.
        x: what the first takes, in the dtype that it runs in.

    Returns:
        Int64 tensors (N, groups of channels, H_l, W_l). None for a slice behind one that is called
        as a module, of which nothing is known, nor on CUDA, where ties go by values.
    """
    by_hand = 0
    while by_hand < len(slices) and isinstance(slices[by_hand], FastSlice):
        by_hand += 1
    nothing: list[list[Tensor]] = [[] for _ in slices]
    if by_hand == 0 or x.device.type != "cpu":
        return nothing
    first = slices[0]
    assert isinstance(first, FastSlice)
    geometry, poolings = _GEOMETRY[architecture(first.net)][by_hand]
    if not geometry:
        return nothing
    keys = iter(torch.ops.lpips_fast.receptive_fields(x.detach(), geometry))
    return [[next(keys) for _ in range(count)] for count in poolings] + nothing[by_hand:]


def _geometry(net: str, slices: int) -> tuple[list[int], list[int]]:
    """The layers up to the last pooling, as the operator takes them; poolings of each slice."""
    geometry: list[int] = []
    poolings, last = [0] * slices, 0
    for number in range(1, slices + 1):
        for layer in slice_layers(net, number):
            match layer:
                case Conv():
                    geometry += [CONVOLUTION, layer.kernel, layer.stride, layer.padding]
                case Fire():
                    geometry += [FIRE, 3, 1, 1]
                case MaxPool():
                    geometry += [POOLING, layer.kernel, layer.stride, int(layer.ceil_mode)]
                    poolings[number - 1] += 1
                    last = len(geometry)
    return geometry[:last], poolings


# By the number of slices. A table, not a cached function, which torch.compile warns of.
_GEOMETRY = {
    net: [_geometry(net, slices) for slices in range(len(spec.taps) + 1)]
    for net, spec in TRUNKS.items()
}
