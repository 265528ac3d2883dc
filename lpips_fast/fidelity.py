"""PSNR and SSIM, the columns that stand beside LPIPS in a table; on torch, one value an image.

**Conventions**, by which both equal scikit-image with the settings of the SSIM paper (that is,
``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``) in float64 to 1e-9:

- All pixels of all channels count equally: RGB, no luma. (Papers on super-resolution often measure
  the Y of YCbCr and cut a border; their numbers are higher, and not comparable with these.)
- PSNR is ``10 log10(data_range² / MSE)`` with one MSE an image; of identical images it is infinite.
- SSIM has the 11x11 Gaussian window of the paper, sigma 1.5, K1 = 0.01, K2 = 0.03, and population
  variances. The mean is over the positions at which the window lies within the image, (H - 10) by
  (W - 10) of them: nothing is padded. Then it is over channels. torchmetrics reflects the image at
  its border and counts every position; ``border="reflect"`` does so, and equals it.

Black is 0, and ``data_range`` is white: 255 or 1. SSIM compares brightness too, so that it is
another number for images in [-1, 1]: take them to [0, 1] first, ``(x + 1) / 2``.

Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural
similarity", IEEE Transactions on Image Processing 13(4), 2004.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["SSIM_WINDOW", "Border", "psnr", "ssim"]

Border = Literal["valid", "reflect"]

#: Height and width of SSIM's window, and of the smallest image that it takes.
SSIM_WINDOW = 11

_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03

# So many pixels are filtered at a time on a CPU: what is made of them stays in a core's cache,
# which makes it twice as fast.
_PIXELS_AT_A_TIME = 2**16


def psnr(in0: Tensor, in1: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio in decibels, one an image.

    Args:
        in0, in1: (N, C, H, W), of one shape; floating point.
        data_range: white, where black is 0.

    Returns:
        (N,), infinite where the images are identical; in the images' dtype, at least float32.

    Raises:
        ValueError: images that differ in shape, or are no batches.
        TypeError: images that are not floating point.

    >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1), data_range=1.0)
    tensor([20.])
    """
    in0, in1 = _checked(in0, in1)
    error = (in0 - in1).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(data_range**2 / error)


def ssim(in0: Tensor, in1: Tensor, *, data_range: float, border: Border = "valid") -> Tensor:
    """Structural similarity, one an image; 1 for identical images. Differentiable.

    Args:
        in0, in1: (N, C, H, W), of one shape, at least 11x11 pixels; floating point.
        data_range: white, where black is 0.
        border: ``"valid"`` counts the positions at which the window lies within the image, as
            scikit-image does, ``"reflect"`` all, as torchmetrics does.

    Returns:
        (N,), at most 1; in the images' dtype, at least float32. The error in float32 is below 1e-6.

    Raises:
        ValueError: images that differ in shape, are no batches, or are smaller than the window; an
            unknown border.
        TypeError: images that are not floating point.

    >>> images = torch.rand(2, 3, 16, 16)
    >>> ssim(images, images, data_range=1.0)
    tensor([1., 1.])
    """
    in0, in1 = _checked(in0, in1)
    height, width = in0.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"images of {height}x{width} pixels are smaller than SSIM's window, "
            f"{SSIM_WINDOW}x{SSIM_WINDOW}; resize them, or leave SSIM out"
        )
    if border not in get_args(Border):
        raise ValueError(f"border is {border!r}, expected 'valid' or 'reflect'")
    if border == "reflect":
        in0, in1 = (functional.pad(x, [SSIM_WINDOW // 2] * 4, mode="reflect") for x in (in0, in1))
    count, channels = in0.shape[:2]
    # Variances do not depend on where zero is; near it, float32 loses the least to cancellation.
    # So the images are moved by the middle of the first one's range, and the means moved back.
    middle = (in0.detach().amax() + in0.detach().amin()) / 2 if in0.numel() else 0.0
    is_cpu = in0.device.type == "cpu"
    at_a_time = max(1, _PIXELS_AT_A_TIME // (height * width) if is_cpu else count * channels)
    parts = zip(
        (in0 - middle).flatten(0, 1).split(at_a_time), (in1 - middle).flatten(0, 1).split(at_a_time)
    )
    means = [_ssim_of_planes(plane0, plane1, middle, data_range) for plane0, plane1 in parts]
    return torch.cat(means).view(count, channels).mean(dim=1)


def _ssim_of_planes(
    plane0: Tensor, plane1: Tensor, middle: Tensor | float, data_range: float
) -> Tensor:
    """The mean of the similarity of (M, H, W), moved by ``middle``: (M,).

    With s = x + y and d = x - y, of which the window takes mean m and variance v,

        2 µx µy = (ms² - md²) / 2        µx² + µy² = (ms² + md²) / 2
        2 σxy   = (vs  - vd ) / 2        σx² + σy² = (vs  + vd ) / 2

    so that four images are filtered and not five, and identical images give 1 exactly.
    """
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    s, d = plane0 + plane1, plane0 - plane1
    mean_s, mean_d, square_s, square_d = _filtered(torch.stack((s, d, s * s, d * d))).unbind()
    squared_mean_d = mean_d * mean_d
    variance_s = square_s - mean_s * mean_s
    variance_d = square_d - squared_mean_d
    true_mean_s = mean_s + 2 * middle
    squared_mean_s = true_mean_s * true_mean_s
    luminance = (squared_mean_s - squared_mean_d + 2 * c1) / (
        squared_mean_s + squared_mean_d + 2 * c1
    )
    structure = (variance_s - variance_d + 2 * c2) / (variance_s + variance_d + 2 * c2)
    return (luminance * structure).mean(dim=(1, 2))


def _filtered(planes: Tensor) -> Tensor:
    """The Gaussian window along height, then width; only where it fits.

    As sums of shifted images: the window is symmetric, so that 5 products and one are enough, and
    torch's convolution of single channels is several times slower in float64.
    """
    weights = _window()
    for dim in (-2, -1):
        size = planes.shape[dim] - SSIM_WINDOW + 1
        total = planes.narrow(dim, SSIM_WINDOW // 2, size) * weights[SSIM_WINDOW // 2]
        for i in range(SSIM_WINDOW // 2):
            both = planes.narrow(dim, i, size) + planes.narrow(dim, SSIM_WINDOW - 1 - i, size)
            total = total.add_(both, alpha=weights[i])
        planes = total
    return planes


def _window() -> list[float]:
    values = [
        math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for i in range(SSIM_WINDOW)
    ]
    return [value / sum(values) for value in values]


def _checked(in0: Tensor, in1: Tensor) -> tuple[Tensor, Tensor]:
    if in0.dim() != 4 or in0.shape != in1.shape:
        raise ValueError(
            f"the images have shapes {tuple(in0.shape)} and {tuple(in1.shape)}, expected one shape "
            "(N, C, H, W)"
        )
    for image in (in0, in1):
        if not image.is_floating_point():
            raise TypeError(f"the images are {image.dtype}, expected floating point: x.float()")
    dtype = torch.promote_types(torch.promote_types(in0.dtype, in1.dtype), torch.float32)
    return in0.to(dtype), in1.to(dtype)
