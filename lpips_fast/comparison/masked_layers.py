"""The masked part of a pair: from a mask as it is given to every layer's distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from torch import Tensor

from ..features import Features
from ..inputs import check_same_size, common_batch
from ..trunk import tap_shapes
from .calls import size_of
from .masks import (
    Mask,
    MaskMode,
    check_fill,
    check_mask,
    check_values,
    fill_outside,
    may_look,
)
from .options import check_choice
from .routes import layer_distances
from .scaling import like_of

if TYPE_CHECKING:
    from ..lpips import LPIPS


def masked_layer_distances(
    model: LPIPS,
    pair: Sequence[Tensor | Features],
    normalize: bool,
    mask: Tensor,
    mask_mode: MaskMode,
    fill_value: float,
) -> list[Tensor]:
    """:func:`.routes.layer_distances` of what a mask lets through.

    Args:
        pair: images or features, as the model takes them.
        mask, mask_mode, fill_value: as :meth:`lpips_fast.LPIPS.forward` takes them.
    """
    check_choice("mask_mode", mask_mode, get_args(MaskMode))
    if mask_mode == "fill":
        pair = as_filled(model, pair, mask, fill_value, normalize)
        return layer_distances(model, pair[0], pair[1], normalize)
    if model.spatial:
        mask = as_mask(model, mask, pair)
        maps = layer_distances(model, pair[0], pair[1], normalize)
        return [of_layer * mask.to(of_layer.dtype) for of_layer in maps]
    weights = as_position_weights(model, mask, pair)
    return layer_distances(model, pair[0], pair[1], normalize, weights)


def as_filled_to_encode(
    model: LPIPS,
    image: Tensor,
    normalize: bool,
    mask: Tensor,
    mask_mode: MaskMode,
    fill_value: float,
) -> Tensor:
    """An image to be encoded, with one value outside a mask."""
    check_choice("mask_mode", mask_mode, get_args(MaskMode))
    if mask_mode == "weighted":
        raise ValueError(
            "mask_mode='weighted' does not change features; pass the mask to forward or "
            "distance, or encode with mask_mode='fill'"
        )
    return as_filled(model, [image], mask, fill_value, normalize)[0]


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
