"""What LPIPS accepts as an image, and what it says of anything else."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from torch import Tensor


def as_rgb_batch(
    name: str, image: Tensor, *, like: Tensor, any_dtype: bool, minimum_size: int, trunk: str
) -> Tensor:
    """An image argument as (N, 3, H, W), or an error that says what is wrong with it.

    Args:
        name: of the argument, for messages.
        image: (N, 3, H, W), (N, 1, H, W) or, without a batch, (3, H, W) or (1, H, W).
        like: a tensor on the model's device and of its dtype.
        any_dtype: take images of any floating dtype, not that of ``like`` alone; autocast does so
            too, and takes them to it.
        minimum_size: the smallest height and width that the trunk can take.
        trunk: its name, for messages.
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of shape (N, 3, H, W), got {type(image).__name__}; "
            "lpips_fast.im2tensor converts an RGB array"
        )
    if not image.is_floating_point():
        raise TypeError(
            f"{name} is {image.dtype}, expected floating point in [-1, 1]; "
            "convert 8-bit images with x.float() / 127.5 - 1"
        )
    if image.device != like.device:
        raise ValueError(
            f"{name} is on {image.device} but the model is on {like.device}; "
            "move one of them with .to()"
        )
    if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}, expected (N, 3, H, W), RGB, or (N, 1, H, W), "
            "grayscale; composite or drop an alpha channel first"
        )
    if min(image.shape[-2:]) < minimum_size:
        raise ValueError(
            f"{name} of {image.shape[-2]}x{image.shape[-1]} pixels is too small for trunk "
            f"{trunk!r}: it needs at least {minimum_size}x{minimum_size}; resize or pad it"
        )
    if any_dtype or torch.is_autocast_enabled(like.device.type):
        image = image.to(like.dtype)
    elif image.dtype != like.dtype:
        raise TypeError(
            f"{name} is {image.dtype} but the model is {like.dtype}; "
            "convert one of them with .to(), or use torch.autocast"
        )
    if image.dim() == 3:
        image = image.unsqueeze(0)
    return image.expand(-1, 3, -1, -1)


def check_same_size(size0: tuple[int, int], size1: tuple[int, int]) -> None:
    """Refuses two images of different sizes."""
    if size0 != size1:
        raise ValueError(
            f"the two images differ in size, {size0[0]}x{size0[1]} and {size1[0]}x{size1[1]} "
            "pixels (height x width); resize or crop one of them"
        )


def common_batch(batch0: int, batch1: int) -> int:
    """The batch size of a comparison: one image is compared with every image of the other."""
    if batch0 != batch1 and 1 not in (batch0, batch1):
        raise ValueError(
            f"the two batches differ, {batch0} and {batch1} images; "
            "they must match unless one of them is 1"
        )
    return batch0 if batch1 == 1 else batch1


def warn_of_values(name: str, image: Tensor, normalize: bool) -> None:
    """Warns of NaN, infinity, and values outside the range that ``normalize`` implies."""
    message = _suspicion(image, normalize)
    if message is not None:
        warnings.warn(f"{name} {message}", stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """The stack level, seen from the calling function, of the first frame that is a user's."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _suspicion(image: Tensor, normalize: bool) -> str | None:
    if image.numel() == 0:
        return None
    bad = (~torch.isfinite(image)).sum().item()
    if bad:
        return f"holds {bad} NaN or infinite values"
    low, high = image.min().item(), image.max().item()
    span = f"has values from {low:.4g} to {high:.4g}, expected "
    tolerance = 0.01  # of resampling, which overshoots a little
    if low < (0 if normalize else -1) - tolerance or high > 1 + tolerance:
        hint = "; 8-bit images are taken there by x / 127.5 - 1" if high > 2 else ""
        return f"{span}[{0 if normalize else -1}, 1] with normalize={normalize}{hint}"
    if not normalize and low >= 0 and high > 0:
        return f"{span}[-1, 1]: if it is an image in [0, 1], pass normalize=True"
    return None
