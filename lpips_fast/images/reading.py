"""Image files into the tensors that LPIPS takes, and nothing in between.

An 8-bit value ``v`` becomes ``v / 127.5 - 1``: to the bit what ``lpips.im2tensor`` of lpips 0.1.4
gives. Decoding is Pillow's (``pip install "lpips-fast[images]"``). A file whose pixels cannot be
had without a guess is refused in one sentence, never read as something near it.

What a file may hold, and what becomes of it:

=====================  ===========================================================================
grayscale              one channel, three times
palette                the palette's colours; its transparency counts as alpha
16 bits per channel    the high byte (``v >> 8``), as libpng, OpenCV and Pillow do it: gray and
                       colour agree, and an 8-bit image stored with 16 bits comes back unchanged
alpha                  ``alpha="white"`` composites on white, ``"drop"`` ignores it, ``"refuse"``
                       raises unless every pixel is opaque
EXIF orientation       applied
CMYK, YCbCr            Pillow's conversion to RGB
ICC profile, gamma     left alone: values are taken as stored, as LPIPS was trained
several frames, pages  refused (a camera's MPO file is read as its first picture, the photograph)
float, signed, 32-bit  refused: which value is white is not known
=====================  ===========================================================================
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from .files import Fingerprint, ImageError, ImageMemoryError, quoted, read_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image as PillowImage

__all__ = [
    "Alpha",
    "ImageError",
    "image_to_tensor",
    "pillow_pixels",
    "read_image",
    "read_image_uint8",
    "read_pixels",
]

Alpha = Literal["white", "drop", "refuse"]

# Pillow opens some forty formats, one of them (EPS) by starting Ghostscript. A short list keeps the
# surface small for files that come from elsewhere.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")

# im2tensor's arithmetic (float64, rounded once to float32) for each of the 256 values it can meet.
_FROM_UINT8 = torch.from_numpy((np.arange(256) / 127.5 - 1.0).astype(np.float32))

# `warnings.catch_warnings` and Pillow's limit are state of the whole process, so two readers must
# take turns.
_process_lock = threading.Lock()

# No format that is read here needs more for a pixel (16 bits in four channels are 8 bytes), nor so
# much besides. So a file that is larger holds no image within the limit, and is not read at all.
_BYTES_PER_PIXEL = 16
_BYTES_BESIDES = 64 * 2**20


def read_image(
    path: str | os.PathLike[str], *, alpha: Alpha = "white", max_pixels: int | None = None
) -> torch.Tensor:
    """Read an image file as a (1, 3, H, W) float32 tensor in [-1, 1], on the CPU.

    Args:
        path: the file. See the table at the top of this module for what it may hold.
        alpha: ``"white"`` composites a transparent image on white, ``"drop"`` ignores alpha (what
            ``cv2.imread``, and so the original's ``load_image``, does), ``"refuse"`` raises unless
            every pixel is opaque.
        max_pixels: an image that declares more is refused from its header. ``None``: Pillow's
            limit, ``PIL.Image.MAX_IMAGE_PIXELS``. Decoding takes up to 25 bytes a pixel (WebP).

    Raises:
        ImageError: no such file, not a regular file (a folder, a pipe, a device), not an image,
            damaged or cut short, too many pixels, no memory for it, several frames, or a kind of
            pixel without a known white.
        ImportError: Pillow is not installed.

    Example:
        >>> image = read_image("photo.png")      # doctest: +SKIP
        >>> image.shape, image.dtype             # doctest: +SKIP
        (torch.Size([1, 3, 64, 64]), torch.float32)
    """
    return image_to_tensor(read_image_uint8(path, alpha=alpha, max_pixels=max_pixels))


def image_to_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """Turn 8-bit RGB (H, W, 3) into float32 (1, 3, H, W) in [-1, 1].

    The values are those of ``lpips.im2tensor``, to the bit; the tensor is contiguous.

    Raises:
        ValueError: the array is not uint8 or not (H, W, 3).

    Example:
        >>> image_to_tensor(np.full((2, 2, 3), 255, np.uint8)).unique()
        tensor([1.])
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"expected a uint8 array of shape (H, W, 3), got {image.dtype} {tuple(image.shape)}"
        )
    # Transposed while one byte wide, then widened through the table in a single pass.
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return _FROM_UINT8[planes.int()].unsqueeze(0)


def read_image_uint8(
    path: str | os.PathLike[str], *, alpha: Alpha = "white", max_pixels: int | None = None
) -> NDArray[np.uint8]:
    """Read an image file as a writable uint8 RGB array (H, W, 3).

    The arguments and errors are those of :func:`read_image`.
    """
    return read_pixels(path, alpha=alpha, max_pixels=max_pixels)[0]


def read_pixels(
    path: str | os.PathLike[str], *, alpha: Alpha = "white", max_pixels: int | None = None
) -> tuple[NDArray[np.uint8], Fingerprint]:
    """What :func:`read_image_uint8` returns, and the fingerprint of the bytes it was decoded from.

    The arguments and errors are those of :func:`read_image`.
    """
    if alpha not in get_args(Alpha):
        choices = ", ".join(repr(choice) for choice in get_args(Alpha))
        raise ValueError(f"alpha is {alpha!r}, expected one of {choices}")
    name = quoted(path)
    limit = _pillows_limit() if max_pixels is None else max_pixels
    data, fingerprint = read_file(path, max_bytes=limit * _BYTES_PER_PIXEL + _BYTES_BESIDES)
    try:
        image = _open(data, name, max_pixels)
        return _flattened(image, name, alpha, _rawmode(image)), fingerprint
    except MemoryError as error:
        raise ImageMemoryError(f"cannot read {name}: there is no memory to decode it") from error


def pillow_pixels(image: PillowImage.Image, *, alpha: Alpha = "white") -> NDArray[np.uint8]:
    """A Pillow image as :func:`read_image_uint8` reads it from a file; the image stays as it is.

    Raises:
        ImageError: a kind of pixel without a known white, or transparency that is refused.

    >>> from PIL import Image
    >>> pillow_pixels(Image.new("L", (2, 1), 7)).tolist()
    [[[7, 7, 7], [7, 7, 7]]]
    """
    rawmode = _rawmode(image)  # known only until the pixels are loaded
    return _flattened(image.copy(), "the image", alpha, rawmode)


def _flattened(
    image: PillowImage.Image, name: str, alpha: Alpha, rawmode: str
) -> NDArray[np.uint8]:
    """Decoded, and without its alpha channel."""
    colours, opacity = _decode(image, name, alpha, rawmode)
    if opacity is None or alpha == "drop" or bool((opacity == 255).all()):
        return colours
    if alpha == "white":
        return _composite_on_white(colours, opacity)
    raise ImageError(
        f'{name} has transparent pixels; flatten it first, or pass alpha="white" to composite '
        f'it on white or alpha="drop" to ignore its alpha channel'
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'reading images needs Pillow: pip install "lpips-fast[images]"'
        ) from error
    return Image


def _pillows_limit() -> int:
    return _pillow().MAX_IMAGE_PIXELS or 2**48  # None: whoever set it wants none


def _open(data: bytes, name: str, max_pixels: int | None) -> PillowImage.Image:
    """Parse the header; refuse bombs and everything that holds more than one picture."""
    Image = _pillow()
    Image.init()
    formats = [fmt for fmt in _FORMATS if fmt in Image.OPEN]  # a Pillow built without some of them
    pillows_limit = Image.MAX_IMAGE_PIXELS
    try:
        with _process_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if max_pixels is not None:
                Image.MAX_IMAGE_PIXELS = None
            try:
                image = Image.open(io.BytesIO(data), formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = pillows_limit
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ImageError(
                f"refusing to read {name}: it declares {image.width}x{image.height} pixels, more "
                f"than the limit of {max_pixels:,}; raise max_pixels (--max-pixels) if you trust "
                "the file"
            )
        several = getattr(image, "is_animated", False) and image.format != "MPO"
        frames = image.n_frames if several else 1
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"refusing to read {name}: it declares more pixels than PIL.Image.MAX_IMAGE_PIXELS "
            f"({pillows_limit}) allows; pass max_pixels if you trust the file"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"cannot read {name}: not an image of a supported format ({', '.join(formats)}), "
            f"or too damaged to tell"
        ) from error
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # a malformed header makes a parser raise nearly anything
        raise _damaged(name, error) from error
    if several:
        raise ImageError(
            f"cannot read {name}: it holds {frames} frames or pages, and one image was expected; "
            f"extract the one to compare"
        )
    return image


def _damaged(name: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"cannot read {name}: the file is damaged or cut short: {reason}")


def _decode(
    image: PillowImage.Image, name: str, alpha: Alpha, rawmode: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Decode the pixels: colours (H, W, 3), and alpha (H, W) where the file has any."""
    from PIL import ImageOps

    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception as error:  # a malformed file makes a decoder raise nearly anything
        raise _damaged(name, error) from error

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _gray16(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        kind = {"I": "signed or 32-bit", "F": "floating-point"}.get(image.mode, image.mode)
        raise ImageError(
            f"cannot read {name}: it holds {kind} pixels, which have no agreed 8-bit RGB value; "
            f"convert it to 8 or 16 bits per channel first"
        )

    if "transparency" in image.info:
        _correct_transparent_colour(image, rawmode, name, alpha)
    if image.mode == "La":  # premultiplied; Pillow leads it to RGBA only by way of LA
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = np.array(image.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), rgba[..., 3]
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), None


def _rawmode(image: PillowImage.Image) -> str:
    """How the file packs its pixels, for example ``"RGB;16B"``; empty where Pillow does not say."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else None
    if isinstance(args, tuple) and args:
        args = args[0]
    return args if isinstance(args, str) else ""


def _gray16(
    image: PillowImage.Image,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """By hand, because Pillow's own conversion clips: every value above 255 would turn white."""
    values = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample: TIFF also has 12
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero, which Pillow inverts in
        values = (2**bits - 1) - values  # 8 bits only
    gray = (values >> (bits - 8)).astype(np.uint8)
    colours = np.repeat(gray[..., None], 3, axis=2)
    transparent = image.info.get("transparency")
    if transparent is None:
        return colours, None
    return colours, np.where(values == transparent, 0, 255).astype(np.uint8)


def _correct_transparent_colour(
    image: PillowImage.Image, rawmode: str, name: str, alpha: Alpha
) -> None:
    """A PNG names its transparent colour in its own bit depth; Pillow compares it with 8 bits."""
    if rawmode in ("1", "L;2", "L;4"):
        levels = 2 ** int(rawmode[-1])
        if image.info["transparency"] < levels:
            image.info["transparency"] *= 255 // (levels - 1)
    elif rawmode.startswith("RGB;16"):
        if alpha != "drop":
            raise ImageError(
                f"cannot read {name}: 16-bit RGB with a transparent colour loses the bits that "
                f'tell that colour apart; pass alpha="drop" to ignore it'
            )
        del image.info["transparency"]


def _composite_on_white(
    colours: NDArray[np.uint8], opacity: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    # Exact and rounded to nearest. The largest sum, 255 * 255 + 127, fits 16 bits.
    weight = opacity[..., None].astype(np.uint16)
    return ((colours * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
