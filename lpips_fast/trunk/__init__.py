"""The convolutional networks whose features are compared, and the fastest way to run them.

:mod:`.table` has them as data; :mod:`.modules` makes modules of the table; :mod:`.convolution`,
:mod:`.cuda_convolution` and :mod:`.fire` run their layers. A trunk knows layers, never a distance.
"""

from .modules import MaxPool2d, Slice, Trunk
from .table import (
    TRUNKS,
    Conv,
    Fire,
    Layer,
    MaxPool,
    ReLU,
    TrunkSpec,
    check_layers,
    feature_shapes,
    minimum_size,
    tap_channels,
    tap_shapes,
    trunk_spec,
)

__all__ = [
    "TRUNKS",
    "Conv",
    "Fire",
    "Layer",
    "MaxPool",
    "MaxPool2d",
    "ReLU",
    "Slice",
    "Trunk",
    "TrunkSpec",
    "check_layers",
    "feature_shapes",
    "minimum_size",
    "tap_channels",
    "tap_shapes",
    "trunk_spec",
]
