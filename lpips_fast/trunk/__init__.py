"""The convolutional networks whose features are compared, and the fastest way to run them.

:mod:`.table` has them as data and :mod:`.modules` as modules. :mod:`.legality` says which slices
may run by hand, and :mod:`.slices` runs them, by :mod:`.convolution`, :mod:`.cuda_convolution` and
:mod:`.fire`, with weights that :mod:`.packing` keeps packed. A trunk knows layers, no distance.
"""

from .modules import Trunk
from .table import (
    TRUNKS,
    Conv,
    Fire,
    Layer,
    MaxPool,
    ReLU,
    TrunkSpec,
    architecture,
    check_layers,
    feature_shapes,
    minimum_size,
    name_by_shapes,
    tap_channels,
    tap_shapes,
    trunk_spec,
    with_widths,
)

__all__ = [
    "TRUNKS",
    "Conv",
    "Fire",
    "Layer",
    "MaxPool",
    "ReLU",
    "Trunk",
    "TrunkSpec",
    "architecture",
    "check_layers",
    "feature_shapes",
    "minimum_size",
    "name_by_shapes",
    "tap_channels",
    "tap_shapes",
    "trunk_spec",
    "with_widths",
]
