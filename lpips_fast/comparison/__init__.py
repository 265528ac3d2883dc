"""How two images become distances: what :class:`lpips_fast.LPIPS` is made of.

:mod:`.calls` says what of a model may run by hand just now, :mod:`.routes` has the ways from two
images to every layer's distance, :mod:`.slice_distance` a slice and its distance as one node of
autograd, :mod:`.masked_layers` what a mask makes of a pair. :mod:`.scaling` and :mod:`.linear` are
the modules before and behind the trunk, :mod:`.options` the words that a model is made with.
"""

from .linear import NetLinLayer
from .scaling import ScalingLayer
from .spatial import spatial_average, upsample

__all__ = ["NetLinLayer", "ScalingLayer", "spatial_average", "upsample"]
