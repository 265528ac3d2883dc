"""The scaling layer: images as the trunks expect them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import kernels

if TYPE_CHECKING:
    from ..lpips import LPIPS


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
    shift, scale = _shift_and_scale(layer, version)
    with kernels.below_autograd(*images):
        return torch.ops.lpips_fast.scale_images(list(images), shift, scale, unit_range, dtype)


def scaled_batch_and_flags(
    layer: ScalingLayer,
    images: Sequence[Tensor],
    unit_range: bool,
    dtype: torch.dtype,
    version: str = "0.1",
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_batch` on CUDA, and (sum of N_k,): 0, or NaN of images that are not finite.

    A NaN in an image, or infinity, is lost in cuDNN's fused convolutions.
    """
    shift, scale = _shift_and_scale(layer, version)
    return torch.ops.lpips_fast.scale_images_flagged(list(images), shift, scale, unit_range, dtype)


def scaled_pair(
    layer: ScalingLayer,
    images: Tensor,
    target: Tensor,
    unit_range: bool,
    dtype: torch.dtype,
    version: str = "0.1",
    flagged: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`scaled_batch` of images that want a gradient and of a target that wants none.

    Args:
        flagged: on CUDA: with the flags of both.

    Returns:
        The scaled images, with a graph; without one both behind each other, in the same memory; and
        their flags, as :func:`scaled_batch_and_flags` has them, or ``None``.
    """
    shift, scale = _shift_and_scale(layer, version)
    return _ScaledPair.apply(images, target.detach(), shift, scale, unit_range, dtype, flagged)


def _shift_and_scale(layer: ScalingLayer, version: str) -> tuple[Tensor, Tensor]:
    if version == "0.0":
        return torch.zeros_like(layer.shift), torch.ones_like(layer.scale)
    return layer.shift, layer.scale


class _ScaledPair(torch.autograd.Function):
    """One pass over both; the graph of a slice of the batch would fill as much with zeros."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        images: Tensor,
        target: Tensor,
        shift: Tensor,
        scale: Tensor,
        unit_range: bool,
        dtype: torch.dtype,
        flagged: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        operators, arguments = torch.ops.lpips_fast, (shift, scale, unit_range, dtype)
        flags = None
        if flagged:
            both, flags = operators.scale_images_flagged([images, target], *arguments)
            ctx.mark_non_differentiable(both, flags)
        else:
            both = operators.scale_images([images, target], *arguments)
            ctx.mark_non_differentiable(both)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale / 2 if unit_range else scale)
        ctx.dtype = images.dtype
        return both.narrow(0, 0, images.shape[0]), both, flags

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 7
        (scale,) = ctx.saved_tensors
        return (grad.to(ctx.dtype) / scale.to(ctx.dtype), *(None,) * 6)


def like_of(model: LPIPS) -> Tensor:
    """A tensor on the model's device, of the dtype that images are scaled in."""
    shift = model.scaling_layer._buffers.get("shift")
    return shift if isinstance(shift, Tensor) else next(model.parameters())
