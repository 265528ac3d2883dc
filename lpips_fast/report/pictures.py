"""Pictures that stand in a page: small, of a bounded number of bytes, as ``data:`` addresses."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..images.heatmap import COLOUR_MAP

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LONGEST_SIDE", "Picture", "colour_stops", "embedded", "map_picture", "thumbnail"]

#: Pixels of a thumbnail. What is smaller stays as it is.
LONGEST_SIDE = 256

# 600 of these (three for each of 200 pairs) in base64 are 16 MB: with the numbers of 10,000 pairs
# a page stays below 20.
_MOST_BYTES = 20_000
_QUALITY = 80
# Pictures below this side are enlarged as sharp squares: blurred, their pixels could not be seen.
_SMALL = 128


@dataclass(frozen=True)
class Picture:
    """A picture in a page.

    Attributes:
        address: ``data:image/…``, all of it.
        width, height: in pixels.
    """

    address: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) < _SMALL


def thumbnail(image: NDArray[np.uint8], longest: int = LONGEST_SIDE) -> Picture:
    """An image, (H, W, 3), reduced to ``longest`` and to some kilobytes."""
    from PIL import Image

    reduced = Image.fromarray(image)
    reduced.thumbnail((longest, longest), Image.Resampling.BOX, reducing_gap=None)
    return _bounded(reduced)


def map_picture(plane: NDArray[np.floating[Any]], brightest: float | None = None) -> Picture:
    """A distance map, (H, W), in colours from 0 to ``brightest``, by default its own largest."""
    import matplotlib
    from PIL import Image

    # Means of distances, and then colours: means of colours would be no colour of the scale.
    numbers = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    brightest = float(plane.max()) if brightest is None else brightest
    numbers.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX, reducing_gap=None)
    scaled = np.asarray(numbers) / (brightest if brightest > 0 else 1.0)
    colours = matplotlib.colormaps[COLOUR_MAP](scaled.clip(0, 1), bytes=True)[..., :3]
    return _bounded(Image.fromarray(np.ascontiguousarray(colours)))


def colour_stops(count: int = 9) -> list[str]:
    """The colours of maps, from 0 to their end."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(matplotlib.colormaps[COLOUR_MAP](k / (count - 1))) for k in range(count)]


def embedded(data: bytes, kind: str) -> str:
    """Bytes as the address of a picture.

    >>> embedded(b"abc", "png")
    'data:image/png;base64,YWJj'
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _bounded(image: Any) -> Picture:
    while True:
        file = io.BytesIO()
        # JPEG: WebP is a sixth smaller, and takes ten to twenty times as long to write.
        image.save(file, "JPEG", quality=_QUALITY)
        if file.tell() <= _MOST_BYTES or max(image.size) <= 16:
            return Picture(embedded(file.getvalue(), "jpeg"), *image.size)
        image = image.resize([max(1, side * 3 // 4) for side in image.size])
