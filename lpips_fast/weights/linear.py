"""The linear weights, which people's judgements taught and which ship with the package."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..trunk.table import architecture
from .errors import WeightsError
from .sources import listed, trunk_source

LIN_VERSIONS = ("0.0", "0.1")

#: Where this package keeps its weights: ``v0.0/``, ``v0.1/`` and ``imagenet/``.
PACKAGED = Path(__file__).resolve().parent


def load_lin_weights(net: str, version: str) -> dict[str, Tensor]:
    """Load the linear weights that ship with the package.

    Args:
        net: 'alex', 'vgg' or 'squeeze'.
        version: '0.1' (the published metric) or '0.0'.

    Returns:
        ``lin0.model.1.weight`` and so on, one per tap, each of shape (1, C, 1, 1), float32, on
        the CPU; bit for bit those of `lpips` 0.1.4.

    Raises:
        ValueError: there is no such net or version.
        WeightsError: the installation is incomplete.

    Source: Zhang et al. 2018, https://github.com/richzhang/PerceptualSimilarity (BSD-2-Clause).

    Example:
        >>> weights = load_lin_weights("alex", "0.1")
        >>> weights["lin1.model.1.weight"].shape
        torch.Size([1, 192, 1, 1])
    """
    if isinstance(net, str) and net != architecture(net):
        raise WeightsError(
            f"the trunk {net!r} has no linear weights of its own but those that lie beside it in "
            "its checkpoint, and there are none: give a checkpoint of the whole model"
        )
    trunk_source(net)
    if version not in LIN_VERSIONS:
        raise ValueError(f"version={version!r} is unknown: use one of {listed(LIN_VERSIONS)}")
    path = PACKAGED / f"v{version}" / f"{net}.safetensors"
    try:
        weights = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be read ({error}): the installation is incomplete, "
            "install lpips-fast again"
        ) from None
    return {key: weights[key].clone() for key in sorted(weights)}
