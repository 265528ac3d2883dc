"""A small world in which the right answer is known: judgements drawn from hidden weights.

Patches of random texture are distorted by gratings of one contrast, so that the sum over channels
says little about which is nearer, and their shares say much. "People" compare distances under
hidden non-negative weights of the first layer, and choose the nearer patch with a probability that
grows with the difference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from parity import trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.judgements.cached_triplets import cache_triplets

Item = dict[str, Tensor]


def hidden_model(generator: torch.Generator, net: str = "alex") -> lpips_fast.LPIPS:
    """LPIPS on a seeded random trunk that looks at a few channels of its first layer."""
    model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
    with torch.no_grad():
        for lin in model.lins:
            linear_weight(lin).zero_()
        first = linear_weight(model.lins[0])
        first.copy_(torch.rand(first.shape, generator=generator) ** 4)
    return model


def patches(count: int, generator: torch.Generator, size: int = 64) -> Tensor:
    """Texture of random coarseness and colour, (count, 3, size, size) within [-0.6, 0.6]."""
    images = []
    for _ in range(count):
        cells = int(torch.randint(2, size // 2, (), generator=generator))
        coarse = torch.rand(1, 3, cells, cells, generator=generator)
        images.append(F.interpolate(coarse, (size, size), mode="bilinear"))
    return 1.2 * torch.cat(images) - 0.6


def with_grating(image: Tensor, generator: torch.Generator, contrast: float = 0.35) -> Tensor:
    """A copy (3, H, W) with a grating of random direction, period and colour."""
    direction, period, phase = torch.rand(3, generator=generator).tolist()
    colour = F.normalize(torch.randn(3, generator=generator), dim=0).view(3, 1, 1)
    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in image.shape[1:]), indexing="ij")
    along = x * math.cos(math.pi * direction) + y * math.sin(math.pi * direction)
    wave = torch.sin(2 * math.pi * (along / (4 + 12 * period) + phase))
    return (image + contrast * colour * wave).clamp(-1, 1)


def triplets(count: int, generator: torch.Generator) -> list[Item]:
    """Judgements still to be filled in: ``judge`` is one half."""
    return [
        {
            "ref": ref,
            "p0": with_grating(ref, generator),
            "p1": with_grating(ref, generator),
            "judge": torch.tensor(0.5),
        }
        for ref in patches(count, generator)
    ]


def judged(
    items: list[Item],
    model: lpips_fast.LPIPS,
    generator: torch.Generator,
    people: int = 5,
    sharpness: float = 8.0,
) -> list[Item]:
    """The same triplets, judged by ``people`` who see with the weights of ``model``."""
    cached = cache_triplets(model, items, deviations=False)
    weights = torch.cat([linear_weight(lin).detach().flatten() for lin in model.lins])
    d0, d1 = cached.distances(weights)
    probability = torch.sigmoid(sharpness * (d0 - d1) / (d0 - d1).abs().mean())
    votes = torch.rand(people, len(items), generator=generator) < probability
    return [{**item, "judge": share} for item, share in zip(items, votes.float().mean(dim=0))]
