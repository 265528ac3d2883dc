"""Masks as image files: gray values are weights.

Black does not count; everything else counts in proportion to its value, so that 1 in a file of 0
and 1 is as good as 255 in one of 0 and 255. Formats that change values, as JPEG, leave traces
where all was black.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from .files import Fingerprint, ImageError, quoted
from .reading import read_pixels
from .resizing import Preprocessing

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_mask"]


def read_mask(
    path: str | os.PathLike[str],
    *,
    max_pixels: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[NDArray[np.uint8], Fingerprint]:
    """The gray values (H, W) of a mask file, and by what the file is known again.

    Args:
        path, max_pixels: as for :func:`lpips_fast.images.read_image`.
        preprocessing: of the images, which the mask goes through too, resized by area.

    Raises:
        ImageError: as for :func:`lpips_fast.images.read_image`; or it has colours, or an alpha
            channel that is not opaque, or all of it is black.
        ValueError: it is smaller than the crop.
    """
    pixels, fingerprint = read_pixels(path, alpha="refuse", max_pixels=max_pixels)
    if not (pixels == pixels[:, :, :1]).all():
        raise ImageError(f"{quoted(path)} has colours, expected a mask: a gray image")
    if preprocessing is not None:
        pixels = Preprocessing(preprocessing.resize, preprocessing.crop, "box")(pixels)
    mask = np.ascontiguousarray(pixels[:, :, 0])
    if not mask.any():
        raise ImageError(f"the mask {quoted(path)} is empty: all of it is black")
    return mask, fingerprint
