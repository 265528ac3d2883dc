"""The module of a layer of the table."""

from __future__ import annotations

from torch import nn

from .fire import FireModule
from .max_pool import CeilMaxPool2d
from .table import Conv, Fire, Layer, MaxPool, ReLU


def make_layer(layer: Layer, in_channels: int) -> tuple[nn.Module, int]:
    """A module for images of ``in_channels``, and the channels of its result.

    >>> make_layer(Conv(64, 11, stride=4, padding=2), 3)
    (Conv2d(3, 64, kernel_size=(11, 11), stride=(4, 4), padding=(2, 2)), 64)
    """
    match layer:
        case Conv(channels, kernel, stride, padding):
            return nn.Conv2d(in_channels, channels, kernel, stride, padding), channels
        case ReLU():
            return nn.ReLU(inplace=True), in_channels
        case MaxPool(kernel, stride, ceil_mode):
            kind = CeilMaxPool2d if ceil_mode else nn.MaxPool2d
            return kind(kernel, stride, ceil_mode=ceil_mode), in_channels
        case Fire(squeeze, expand):
            return FireModule(in_channels, squeeze, expand), 2 * expand
    raise TypeError(f"not a layer of a trunk: {layer!r}")
