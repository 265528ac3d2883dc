"""Resizing and cropping before the comparison: explicit, by Pillow, and named in words.

Another size, or another resampling filter, gives another LPIPS. So nothing is resized unless it is
asked for, and :attr:`Preprocessing.words` says how it was done, for the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Preprocessing", "Resampling"]

Resampling = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, then crop the centre; either may be left out.

    Args:
        resize: (width, height) in pixels, whatever the aspect; or one number, to which the shorter
            side is taken and the longer in proportion (rounded down, as torchvision does).
        crop: (width, height) in pixels of the centre to keep.
        resampling: Pillow's filter. When an image is reduced, all but ``"nearest"`` widen with the
            factor, that is, they do not alias.

    Raises:
        ValueError: a size below 1, or an unknown filter.

    >>> Preprocessing(resize=4, crop=(4, 4))(np.zeros((8, 16, 3), np.uint8)).shape
    (4, 4, 3)
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resampling: Resampling = "bicubic"

    def __post_init__(self) -> None:
        sizes = (self.resize,) if isinstance(self.resize, int) else self.resize or ()
        if any(size < 1 for size in (*sizes, *(self.crop or ()))):
            raise ValueError(
                f"resize={self.resize!r}, crop={self.crop!r}: sizes are in pixels, at least 1"
            )
        if self.resampling not in get_args(Resampling):
            raise ValueError(
                f"resampling is {self.resampling!r}, expected one of "
                f"{', '.join(get_args(Resampling))}"
            )

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """8-bit RGB (H, W, 3) to the same of another size.

        Raises:
            ValueError: the image is smaller than the crop.
            ImportError: Pillow is not installed.
        """
        if self.resize is not None:
            image = self._resized(image)
        if self.crop is None:
            return image
        height, width = image.shape[:2]
        crop_width, crop_height = self.crop
        if crop_width > width or crop_height > height:
            raise ValueError(
                f"a crop of {crop_width}x{crop_height} does not fit into {width}x{height} pixels"
            )
        top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
        return image[top : top + crop_height, left : left + crop_width]

    def _resized(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError(
                'resizing images needs Pillow: pip install "lpips-fast[images]"'
            ) from error

        height, width = image.shape[:2]
        if isinstance(self.resize, int):
            shorter = min(width, height)
            size = (self.resize * width // shorter, self.resize * height // shorter)
        else:
            assert self.resize is not None
            size = self.resize
        if size == (width, height):
            return image
        filter_ = Image.Resampling[self.resampling.upper()]
        return np.array(Image.fromarray(image).resize(size, filter_))

    @property
    def words(self) -> dict[str, str]:
        """``resize`` and ``crop`` in words.

        >>> Preprocessing(resize=256).words
        {'resize': 'shorter side to 256, Pillow bicubic', 'crop': 'none'}
        """
        if self.resize is None:
            resize = "none"
        elif isinstance(self.resize, int):
            resize = f"shorter side to {self.resize}, Pillow {self.resampling}"
        else:
            resize = f"{self.resize[0]}x{self.resize[1]}, Pillow {self.resampling}"
        crop = "none" if self.crop is None else f"centre {self.crop[0]}x{self.crop[1]}"
        return {"resize": resize, "crop": crop}
