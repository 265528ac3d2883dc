"""Models and images for the tests of what looks at many images at a time."""

from __future__ import annotations

from typing import Any

import torch
from parity import trunk_weights
from torch import Tensor

from lpips_fast import LPIPS
from lpips_fast.pairs.all_pairs import plan


def model_of(net: str = "alex", **options: Any) -> LPIPS:
    return LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)


def some_images(
    count: int, size: tuple[int, int] = (48, 40), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fresh images of blurred noise in [-1, 1]."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    coarse = torch.rand(count, 3, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    noise = 0.1 * torch.randn(smooth.shape, generator=generator)
    return (smooth * 2 - 1 + noise).clamp(-1, 1).to(dtype)


def pair_by_pair(model: LPIPS, X: Tensor, Y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(x[None], Y).flatten() for x in X])


class DataSet:
    """Images as torch's data sets have them, (image, label) by position; it counts the reads."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.reads = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.images[position], 7


def smallest_limit(model: LPIPS, size: tuple[int, int], held: int) -> int:
    """The least memory in which so many images are held at a time."""
    limit = 2**16
    while True:
        try:
            if plan(model, 100, size, memory_limit=limit, max_batch=2).held >= held:
                return limit
        except ValueError as error:
            assert "memory_limit is" in str(error)
        limit += 2**16
