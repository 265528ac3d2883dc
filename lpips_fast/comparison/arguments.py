"""What a model is given, as it takes it, or an error that says why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..features import Features
from ..inputs import as_rgb_batch, check_features, warn_of_values
from ..trunk import tap_channels
from .scaling import like_of

if TYPE_CHECKING:
    from ..lpips import LPIPS


def as_image(model: LPIPS, name: str, image: Tensor, normalize: bool) -> Tensor:
    """An argument as an image that the scaling layer takes.

    Args:
        name: of the argument, for messages.
        image: of any shape that :meth:`lpips_fast.LPIPS.forward` takes.
        normalize: it is in [0, 1].
    """
    image = as_rgb_batch(
        name,
        image,
        like=like_of(model),
        any_dtype=model.dtype is not None,
        minimum_size=model.minimum_size,
        trunk=model.pnet_type,
        unit_range=normalize,
    )
    if model.check_inputs:
        warn_of_values(name, image, normalize)
    return image


def as_argument(
    model: LPIPS, name: str, x: Tensor | Features, normalize: bool
) -> Tensor | Features:
    """An argument as images or features that the model compares."""
    if isinstance(x, Features):
        return as_features(model, name, x)
    return as_image(model, name, x, normalize)


def as_features(model: LPIPS, name: str, features: Features) -> Features:
    """An argument as features that the model compares."""
    check_features(
        name,
        features,
        net=model.net_name,
        layers=model.layers,
        channels=tap_channels(model.net_name),
        device=like_of(model).device,
        look=bool(model.check_inputs),
    )
    return features
