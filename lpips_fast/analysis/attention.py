"""Spatial attention: how strongly a trunk answers at every position of an image, as a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..comparison.spatial import upsample
from ..normalization import channel_norms

if TYPE_CHECKING:
    from ..lpips import LPIPS

__all__ = ["attention_map"]


@torch.no_grad()
def attention_map(
    model: LPIPS, images: Tensor, *, layer: int = -1, normalize: bool = False
) -> Tensor:
    """Activation-based attention: a layer's squared features, summed over channels.

    As a mask it makes positions count by what the trunk sees there, which the normalisation of
    LPIPS takes away: ``model(reference, image, mask=attention_map(model, reference))``. The
    distance is then no longer symmetric, since the mask is that of one of both.

    Args:
        model: whose trunk looks.
        images: (N, 3, H, W), as for :meth:`LPIPS.forward`.
        layer: position among the layers that the model compares; the last by default.
        normalize: images are in [0, 1].

    Returns:
        (N, 1, H, W) in [0, 1], of which each image's maximum is 1. An image without any activation
        has 1 everywhere, as without a mask.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, section 3.1.

    >>> import lpips_fast
    >>> model, images = lpips_fast.LPIPS(pnet_rand=True, verbose=False), torch.rand(2, 3, 64, 64)
    >>> attention_map(model, images).shape
    torch.Size([2, 1, 64, 64])
    """
    features = model.encode(images, normalize)
    squared = channel_norms(features.taps[layer]) ** 2
    attention = upsample(squared, features.image_size).clamp_min(0)
    largest = attention.amax(dim=(2, 3), keepdim=True)
    return torch.where(largest > 0, attention / torch.where(largest > 0, largest, 1), 1.0)
