"""Where weights come from: some are in the package, the others from outside.

The linear weights (a few kilobytes, BSD-2-Clause) and AlexNet's convolutions (9.4 MiB) ship with
the package. :func:`load_trunk_weights` looks for an ImageNet-trained trunk in this order:

1. its argument `weights`: a state dict, a file, or a folder;
2. the folder named by the environment variable ``LPIPS_FAST_WEIGHTS``;
3. the package itself (AlexNet);
4. torch's hub cache (``TORCH_HOME``), which torchvision and the original `lpips` fill too;
5. a download from the official address into torch's hub cache, with its size and SHA-256 checked.

Two more environment variables: ``LPIPS_FAST_MIRROR`` replaces the official base address, and
``LPIPS_FAST_OFFLINE=1`` forbids downloads. Nothing here ever unpickles a file, and what comes
from the package, the cache or the network is believed by its digest alone.
"""

from .checkpoints import lpips_state_dict, narrow_name
from .digests import features_digest
from .download import MIRROR_VARIABLE
from .errors import WeightsError, WeightsNotFoundError
from .files import read_state_dict
from .linear import LIN_VERSIONS, load_lin_weights
from .search import (
    OFFLINE_VARIABLE,
    WEIGHTS_VARIABLE,
    TrunkLocation,
    load_trunk_and_linear_weights,
    load_trunk_weights,
    locate_trunk_weights,
)
from .sources import TRUNK_SOURCES, TrunkSource

__all__ = [
    "LIN_VERSIONS",
    "MIRROR_VARIABLE",
    "OFFLINE_VARIABLE",
    "TRUNK_SOURCES",
    "WEIGHTS_VARIABLE",
    "TrunkLocation",
    "TrunkSource",
    "WeightsError",
    "WeightsNotFoundError",
    "features_digest",
    "load_lin_weights",
    "load_trunk_and_linear_weights",
    "load_trunk_weights",
    "locate_trunk_weights",
    "lpips_state_dict",
    "narrow_name",
    "read_state_dict",
]
