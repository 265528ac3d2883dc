"""Images scaled for the trunk and joined to one batch in one pass: fake kernel and derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import fake_kernel


@fake_kernel("scale_images")
def _(
    images: Sequence[Tensor], shift: Tensor, scale: Tensor, unit_range: bool, dtype: torch.dtype
) -> Tensor:
    shape = (sum(len(image) for image in images), *images[0].shape[1:])
    return torch.empty(
        shape, dtype=dtype, device=images[0].device, memory_format=torch.channels_last
    )


@fake_kernel("scale_images_flagged")
def _(
    images: Sequence[Tensor], shift: Tensor, scale: Tensor, unit_range: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch = torch.ops.lpips_fast.scale_images(images, shift, scale, unit_range, dtype)
    return batch, torch.empty(len(batch), dtype=torch.float32, device=batch.device)


def _save_scaling(ctx, inputs, output) -> None:
    images, _, scale, ctx.unit_range, _ = inputs
    ctx.batches = [(len(image), image.dtype) for image in images]
    ctx.save_for_backward(scale)


def _scaling_backward(ctx, grad, _=None):
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError(
            "lpips_fast::scale_images has no derivative with respect to shift and scale; pass them "
            "detached"
        )
    (scale,) = ctx.saved_tensors
    if ctx.unit_range:
        scale = scale / 2
    grads, first = [], 0
    for (batch, dtype), needed in zip(ctx.batches, ctx.needs_input_grad[0]):
        part = grad[first : first + batch]
        grads.append(part.to(dtype) / scale.to(dtype).view(1, -1, 1, 1) if needed else None)
        first += batch
    return grads, None, None, None, None


torch.library.register_autograd(
    "lpips_fast::scale_images", _scaling_backward, setup_context=_save_scaling
)
torch.library.register_autograd(
    "lpips_fast::scale_images_flagged", _scaling_backward, setup_context=_save_scaling
)
