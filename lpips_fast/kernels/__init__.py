"""The compiled operators, and what torch needs to know of them beyond their kernels.

Schemas are in ``csrc/ops.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``. :mod:`.libraries` loads
them; then one file an operator family holds its fake kernel and its derivative. Kernels know
tensors, never a network. Importing this package makes ``torch.ops.lpips_fast`` usable.
"""

from . import (
    convolution,
    distance,
    fire,
    max_pool,
    position_weights,
    receptive_fields,
    scale_images,
)
from .checks import AttributeCheck, ModuleCheck, WeightsCheck, WeightWatch, lie_plainly
from .dispatch import (
    autocast_dtype,
    below_autograd,
    has_kernel,
    has_operators,
    has_tangents,
    has_trunk_kernels,
    has_wide_vectors,
    is_compiling,
    is_eager,
    is_out_of_memory,
)
from .distance import fused_distance
from .libraries import LOADED_LIBRARIES

__all__ = [
    "LOADED_LIBRARIES",
    "AttributeCheck",
    "ModuleCheck",
    "WeightWatch",
    "WeightsCheck",
    "autocast_dtype",
    "below_autograd",
    "convolution",
    "distance",
    "fire",
    "fused_distance",
    "has_kernel",
    "has_operators",
    "has_tangents",
    "has_trunk_kernels",
    "has_wide_vectors",
    "is_compiling",
    "is_eager",
    "is_out_of_memory",
    "lie_plainly",
    "max_pool",
    "position_weights",
    "receptive_fields",
    "scale_images",
]
