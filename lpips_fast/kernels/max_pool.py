"""Max-pooling without a tensor of indices: fake kernels and derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import fake_kernel


@fake_kernel("max_pool2d")
def _(x: Tensor, kernel: int, stride: int, ceil_mode: bool) -> Tensor:
    y = torch.nn.functional.max_pool2d(x, kernel, stride, ceil_mode=ceil_mode)
    return torch.empty_like(y, memory_format=torch.channels_last)


@fake_kernel("max_pool2d_backward")
def _(
    grad: Tensor, x: Tensor, y: Tensor, kernel: int, stride: int, keys: Tensor | None = None
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _save_pool(ctx, inputs, output) -> None:
    x, ctx.kernel, ctx.stride, _ = inputs
    ctx.save_for_backward(x, output)


def _pool_backward(ctx, grad):
    x, y = ctx.saved_tensors
    operator = torch.ops.lpips_fast.max_pool2d_backward
    return operator(grad, x, y, ctx.kernel, ctx.stride), None, None, None


def _save_pool_backward(ctx, inputs, output) -> None:
    _, x, y, ctx.kernel, ctx.stride, keys = inputs
    ctx.save_for_backward(x, y, keys)


def _pool_double_backward(ctx, grad_grad):
    # Linear in grad: the values of grad_grad at the maxima, one for each window.
    x, y, keys = ctx.saved_tensors
    index = receivers(x, y, ctx.kernel, ctx.stride, keys)
    picked = grad_grad.flatten(2).gather(2, index.flatten(2)).view_as(index)
    return picked, None, None, None, None, None


def receivers(x: Tensor, y: Tensor, kernel: int, stride: int, keys: Tensor | None) -> Tensor:
    """(N, C, h, w), int64: where the gradient of every window goes, as row * width + column."""
    height, width = x.shape[2:]
    ceil_mode = any((s - kernel) // stride + 1 != o for s, o in zip((height, width), y.shape[2:]))
    _, index = torch.nn.functional.max_pool2d(
        x, kernel, stride, ceil_mode=ceil_mode, return_indices=True
    )
    if keys is None:
        return index
    of_channels = keys.repeat_interleave(x.shape[1] // keys.shape[1], 1).flatten(2)
    wanted = of_channels.gather(2, index.flatten(2)).view_as(index)
    found = index.clone()
    tops, lefts = (torch.arange(n).mul_(stride) for n in y.shape[2:])
    for k in reversed(range(kernel**2)):  # the first of the window is written last
        rows, columns = tops + k // kernel, lefts + k % kernel
        inside = (rows < height)[:, None] & (columns < width)
        at = rows.clamp(max=height - 1)[:, None] * width + columns.clamp(max=width - 1)
        found = torch.where((of_channels[:, :, at] == wanted) & inside, at, found)
    return found


torch.library.register_autograd("lpips_fast::max_pool2d", _pool_backward, setup_context=_save_pool)
torch.library.register_autograd(
    "lpips_fast::max_pool2d_backward", _pool_double_backward, setup_context=_save_pool_backward
)
