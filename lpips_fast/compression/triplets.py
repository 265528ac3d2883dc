"""What a lighter trunk is fitted to and judged by: crops of images, each with two distortions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DISTORTIONS", "Triplets", "distorted_triplets"]


@dataclass(frozen=True)
class Triplets:
    """References and two distorted copies of each, (N, 3, H, W) in [-1, 1]."""

    ref: Tensor
    p0: Tensor
    p1: Tensor

    def __len__(self) -> int:
        return len(self.ref)

    def __getitem__(self, rows: slice | Tensor) -> Triplets:
        return Triplets(self.ref[rows], self.p0[rows], self.p1[rows])


def _noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return image + 0.6 * strength * torch.randn(image.shape, generator=generator)


def _blur(image: Tensor, strength: float, _: torch.Generator) -> Tensor:
    radius = min(6, min(image.shape[1:]) - 1)
    positions = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-(positions**2) / (2 * (0.3 + 2.5 * strength) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(image[None], [radius] * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[:, :, None], groups=3)
    return F.conv2d(rows, kernel[..., None], groups=3)[0]


def _shift(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    reach = 1 + round(5 * strength)
    across, down = (int(torch.randint(-reach, reach + 1, (), generator=generator)) for _ in "xy")
    return image.roll((down, across), dims=(1, 2))


def _contrast(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    gain, offset = torch.rand(2, generator=generator) * 2 - 1
    return image * (1 + 0.7 * strength * gain) + 0.5 * strength * offset


def _colour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return image + 0.6 * strength * (torch.rand(3, 1, 1, generator=generator) * 2 - 1)


def _coarser(image: Tensor, strength: float, _: torch.Generator) -> Tensor:
    size = [max(2, round(side / (1 + 3 * strength))) for side in image.shape[1:]]
    small = F.interpolate(image[None], size=size, mode="area")
    return F.interpolate(small, size=image.shape[1:], mode="bilinear")[0]


#: By name: an image (3, H, W), a strength in (0, 1] and a generator, to another image.
DISTORTIONS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "shift": _shift,
    "contrast": _contrast,
    "colour": _colour,
    "coarser": _coarser,
}


def distorted_triplets(
    images: Sequence[Tensor], size: int, count: int, *, seed: int = 0
) -> Triplets:
    """Square crops of images, each with two of its distortions, of random kinds and strengths.

    Strengths are drawn on a logarithmic scale, for small differences are where a loss ends.

    Args:
        images: (3, H, W) each, in [-1, 1]; those smaller than the crop are enlarged.
        size: of a crop, in pixels.
        count: of triplets.
        seed: the same gives the same triplets.

    Raises:
        ValueError: no images, or no triplets asked for.

    >>> triplets = distorted_triplets([torch.zeros(3, 80, 100)], 64, 5)
    >>> len(triplets), triplets.p1.shape
    (5, torch.Size([5, 3, 64, 64]))
    """
    if not images or count < 1 or size < 1:
        raise ValueError(
            f"expected images, and a size and a count from 1, got {len(images)} images, size "
            f"{size} and count {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    kinds, rows = list(DISTORTIONS.values()), []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        crop = _crop(image, size, generator)
        copies = []
        for kind in torch.randperm(len(kinds), generator=generator)[:2].tolist():
            strength = math.exp(-3.5 * torch.rand((), generator=generator).item())
            copies.append(kinds[kind](crop, strength, generator).clamp(-1, 1))
        rows.append((crop, *copies))
    ref, p0, p1 = (torch.stack(side) for side in zip(*rows))
    return Triplets(ref, p0, p1)


def _crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """At the image's own scale, or up to half of it, so that one photograph gives many pictures."""
    shorter = min(image.shape[1:])
    scale = 1 - 0.5 * torch.rand((), generator=generator).item()
    scale = max(scale, size / shorter)
    if scale != 1:
        wanted = [max(size, round(side * scale)) for side in image.shape[1:]]
        mode = "area" if scale < 1 else "bilinear"
        image = F.interpolate(image[None], size=wanted, mode=mode)[0]
    top, left = (
        int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[1:]
    )
    crop = image[:, top : top + size, left : left + size]
    return crop.flip(2) if torch.rand((), generator=generator) < 0.5 else crop.clone()
