"""What a model is given, as it takes it, or an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..features import Features
from ..inputs import (
    as_rgb_batch,
    check_features,
    check_same_size,
    common_batch,
    warn_of_values,
)
from ..trunk import tap_channels, tap_shapes
from .calls import like_of, size_of
from .masks import Mask, check_fill, check_mask, check_values, fill_outside, may_look

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


def as_mask(
    model: LPIPS, mask: Tensor, pair: Sequence[Tensor | Features], look: bool = True
) -> Tensor:
    """A mask of images or features, as :func:`lpips_fast.comparison.masks.check_mask` has it.

    Args:
        pair: what is compared, or one of it.
        look: at the values too, where that may be.
    """
    size, batch = None, 1
    for x in pair:
        batch = common_batch(batch, len(x))
        of_x = x.image_size if isinstance(x, Features) else size_of(x)
        check_same_size(size or of_x, of_x)
        size = of_x
    assert size is not None
    mask = check_mask(mask, size, batch, like_of(model).device)
    if look and may_look(mask, model.check_inputs):
        check_values(mask)
    return mask


def as_position_weights(model: LPIPS, mask: Tensor, pair: Sequence[Tensor | Features]) -> Mask:
    """A mask with its weights for the compared layers, made in one pass over it."""
    weighted = Mask(as_mask(model, mask, pair, look=False))
    encoded = next((x for x in pair if isinstance(x, Features)), None)
    if encoded is not None:
        grids = [size_of(tap) for tap in encoded.taps]
    else:
        shapes = tap_shapes(model.net_name, size_of(weighted.mask))
        grids = [shapes[k][1:] for k in model.layers]
    weighted.weights(grids, like_of(model).dtype)
    if may_look(mask, model.check_inputs):
        weighted.check()
    return weighted


def as_filled(
    model: LPIPS,
    images: Sequence[Tensor | Features],
    mask: Tensor,
    fill_value: float,
    normalize: bool,
) -> list[Tensor]:
    """Images that have one value outside a mask."""
    mask = as_mask(model, mask, images)
    check_fill(mask, fill_value)
    filled = []
    for image in images:
        if isinstance(image, Features):
            raise ValueError(
                "features cannot be filled any more; encode the images with "
                "model.encode(images, mask=mask, fill_value=...) and compare these features "
                "without a mask, or pass images"
            )
        filled.append(fill_outside(image, mask, fill_value, normalize))
    return filled


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that is not among those there are."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")
