"""The scaling layer: images as the trunks expect them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import kernels


class ScalingLayer(nn.Module):
    """Takes images from [-1, 1] to the mean and deviation of ImageNet that the trunks expect."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, inp: Tensor) -> Tensor:
        return (inp - self.shift) / self.scale


def scaled_batch(
    layer: ScalingLayer,
    images: Sequence[Tensor],
    unit_range: bool,
    dtype: torch.dtype,
    version: str = "0.1",
) -> Tensor:
    """Batches of images one behind the other, scaled, channels-last, as ``dtype``.

    The same numbers as by the layer itself, in one pass over memory; on the CPU and on CUDA alone.

    Args:
        images: (N_k, 3, H, W) each, of one size.
        unit_range: the images are in [0, 1] instead of [-1, 1].
        version: the first release, 0.0, fed images to the trunk unscaled.

    Returns:
        (sum of N_k, 3, H, W).
    """
    shift, scale = layer.shift, layer.scale
    if version == "0.0":
        shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
    with kernels.below_autograd(*images):
        return torch.ops.lpips_fast.scale_images(list(images), shift, scale, unit_range, dtype)
