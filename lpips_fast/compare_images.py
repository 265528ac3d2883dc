"""LPIPS in one call, of images as people have them: paths, Pillow's, numpy's, torch's.

``lpips_fast.compare("a.png", "b.png")``. The model of a configuration is kept, so that the second
call does not load it again.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .comparison.masks import MaskMode
from .images.masks import read_mask
from .images.reading import Alpha, pillow_pixels, read_image_uint8
from .lpips import LPIPS
from .normalization import ModelNormalization

__all__ = ["AnyImage", "compare", "kept_model"]

#: A path, a Pillow image, a numpy array or a tensor; see :func:`compare`.
AnyImage = Any

_lock = threading.Lock()


def compare(
    a: AnyImage,
    b: AnyImage,
    *,
    net: str = "alex",
    version: str = "0.1",
    normalize: bool | None = None,
    lpips: bool = True,
    weights: str | os.PathLike[str] | None = None,
    normalization: ModelNormalization = "l2",
    layers: Sequence[int] | None = None,
    alpha: Alpha = "white",
    device: str | torch.device | None = None,
    mask: AnyImage = None,
    mask_mode: MaskMode = "weighted",
    fill_value: float = 0.0,
) -> float | Tensor:
    """The distance between two images, or between the images of two batches or videos.

    Args:
        a, b: each one of

            - a path of an image file, read as :func:`lpips_fast.images.read_image` reads it;
            - a Pillow image, converted in the same way;
            - a numpy array or a tensor: (H, W), gray; (H, W, C) or (C, H, W), with C 1 or 3; with
              more dimensions before these, a batch (N, …) or videos (N, T, …).

            Channels are the dimension of 1 or 3, of the last and the last but two; where both are,
            the array is refused. Integers are uint8, from 0 to 255. Floating point is in [-1, 1],
            or with ``normalize=True`` in [0, 1].
        net, version, lpips, weights, normalization, layers: as for :class:`LPIPS`.
        normalize: whether floating point is in [0, 1]. ``None``: it is in [-1, 1], and refused if
            it holds no negative value, for then it may be either.
        alpha: as for :func:`lpips_fast.images.read_image`.
        device: where to compute; by default where the first tensor is, or the CPU.
        mask: which part of the images counts: the path of a gray image, a Pillow image, an array or
            a tensor (H, W), or with one mask an image (N, 1, H, W): bool, or numbers that are not
            negative, of which only the ratios count.
        mask_mode, fill_value: as for :meth:`LPIPS.forward`.

    Returns:
        A number for two images; a tensor (N,), or (N, T) of videos, for batches, of which one image
        is compared with all of the other side. No graph is kept: a loss is :class:`LPIPS`.

    Raises:
        ValueError: images of different sizes or numbers, values out of range, an array whose
            channels cannot be told, or a file that cannot be read.
        TypeError: something else, or integers that are not uint8.

    Example:
        >>> image = np.zeros((64, 64, 3), np.uint8)
        >>> compare(image, image)
        0.0
        >>> compare("original.png", "decoded.jpg", net="vgg")      # doctest: +SKIP
        0.1234
    """
    if device is None:
        device = next((x.device for x in (a, b) if isinstance(x, Tensor)), "cpu")
    images = [_as_images(name, x, normalize, alpha) for name, x in (("a", a), ("b", b))]
    # More than one dimension before the channels: images of videos, one after the other.
    leading = max((x.shape[:-3] for x in images), key=lambda s: (len(s), s.numel()))
    for image in images:
        if image.shape[:-3] not in (leading, torch.Size([1]), torch.Size()):
            raise ValueError(
                f"a and b hold {_told(images[0])} and {_told(images[1])}; their numbers must match "
                "unless one of them is a single image"
            )
    model = kept_model(net, version, lpips, weights, normalization, layers, torch.device(device))
    in0, in1 = (image.reshape(-1, *image.shape[-3:]).to(device) for image in images)
    masking: dict[str, Any] = {}
    if mask is not None:
        weights_of_pixels = _as_mask(mask).to(device)
        masking = {"mask": weights_of_pixels, "mask_mode": mask_mode, "fill_value": fill_value}
    with torch.inference_mode():
        distances = model(in0, in1, **masking).flatten()
    return distances.item() if not leading else distances.reshape(leading)


def kept_model(
    net: str = "alex",
    version: str = "0.1",
    lpips: bool = True,
    weights: str | os.PathLike[str] | None = None,
    normalization: ModelNormalization = "l2",
    layers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> LPIPS:
    """The model of a configuration, made by the first call that asks for it; some are kept."""
    path = None if weights is None else os.path.abspath(weights)
    chosen = None if layers is None else tuple(layers)
    with _lock:  # two threads do not load it twice
        return _model(net, version, lpips, path, normalization, chosen, device)


@functools.lru_cache(maxsize=4)
def _model(
    net: Any,
    version: Any,
    lpips: bool,
    weights: str | None,
    normalization: ModelNormalization,
    layers: tuple[int, ...] | None,
    device: torch.device | None,
) -> LPIPS:
    model = LPIPS(
        net=net,
        version=version,
        lpips=lpips,
        weights=weights,
        normalization=normalization,
        layers=layers,
        verbose=False,
        check_inputs=False,  # it is done here
    )
    return model.requires_grad_(False).to(device)


# ------------------------------------------------------------------------------ one image


def _as_images(name: str, x: AnyImage, normalize: bool | None, alpha: Alpha) -> Tensor:
    """(…, 3, H, W) in [-1, 1], with as many dimensions before these as x has."""
    if isinstance(x, (str, os.PathLike)):
        x = read_image_uint8(x, alpha=alpha)
    elif _is_pillow(x):
        x = pillow_pixels(x, alpha=alpha)
    if isinstance(x, np.ndarray):
        x = _from_numpy(name, x)
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}, expected a path, a Pillow image, a numpy array or a "
            "tensor"
        )
    return _in_range(name, _channels_first(name, x.detach()), normalize)


def _as_mask(x: AnyImage) -> Tensor:
    if isinstance(x, (str, os.PathLike)):
        x = read_mask(x)[0]
    elif _is_pillow(x):
        pixels = pillow_pixels(x, alpha="refuse")
        if not (pixels == pixels[:, :, :1]).all():
            raise ValueError("mask has colours, expected a gray image")
        x = pixels[:, :, 0]
    if isinstance(x, np.ndarray):
        x = _from_numpy("mask", x)
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        x = x.float()
    if not isinstance(x, Tensor):
        raise TypeError(
            f"mask is a {type(x).__name__}, expected a path, a Pillow image, a numpy array or a "
            "tensor"
        )
    return x  # what else is wrong with it is said by the model


def _is_pillow(x: object) -> bool:
    try:
        from PIL import Image
    except ImportError:
        return False
    return isinstance(x, Image.Image)


def _from_numpy(name: str, x: np.ndarray[Any, Any]) -> Tensor:
    try:
        # A copy: an array may be read-only, or stored backwards.
        return torch.from_numpy(np.array(x, order="C"))
    except TypeError as error:
        raise TypeError(f"{name} is {x.dtype}, expected uint8 or floating point") from error


def _channels_first(name: str, x: Tensor) -> Tensor:
    shape = tuple(x.shape)
    if x.dim() == 2:
        x = x[None]
    elif x.dim() < 2:
        raise ValueError(f"{name} has shape {shape}, expected an image: (H, W, 3) or (3, H, W)")
    else:
        is_last, is_first = shape[-1] in (1, 3), shape[-3] in (1, 3)
        if is_last == is_first:
            reason = "both the first and the last may be" if is_last else "none is"
            raise ValueError(
                f"{name} has shape {shape}, of whose dimensions {reason} channels: expected "
                "(H, W, C) or (C, H, W) with C 1 or 3; composite or drop an alpha channel first"
            )
        x = x.movedim(-1, -3) if is_last else x
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:])


def _in_range(name: str, x: Tensor, normalize: bool | None) -> Tensor:
    if x.dtype == torch.uint8:
        # To the bit what files are read to.
        return (x.double() / 127.5 - 1).float()
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}, expected uint8 or floating point")
    x = x.float()
    if x.numel() == 0:
        return x
    low, high = (value.item() for value in torch.aminmax(x))
    if not -np.inf < low <= high < np.inf:
        raise ValueError(f"{name} holds NaN or infinite values")
    told = f"{name} has values from {low:.4g} to {high:.4g}"
    # What networks make overshoots a little; from 0 to 255, or a wrong range, is far outside.
    if normalize:
        if low < -0.5 or high > 1.5:
            raise ValueError(f"{told}, expected [0, 1] with normalize=True")
        return x * 2 - 1
    if low < -2 or high > 2:
        raise ValueError(f"{told}, expected [-1, 1]; 8-bit values are passed as uint8")
    if normalize is None and low >= 0:
        raise ValueError(
            f"{told}: pass normalize=True if it is in [0, 1], normalize=False if it is in [-1, 1]"
        )
    return x


def _told(image: Tensor) -> str:
    leading = tuple(image.shape[:-3])
    return "one image" if not leading else f"{' by '.join(map(str, leading))} images"
