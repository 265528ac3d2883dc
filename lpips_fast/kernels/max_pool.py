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
def _(grad: Tensor, x: Tensor, y: Tensor, kernel: int, stride: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _save_pool(ctx, inputs, output) -> None:
    x, ctx.kernel, ctx.stride, _ = inputs
    ctx.save_for_backward(x, output)


def _pool_backward(ctx, grad):
    x, y = ctx.saved_tensors
    operator = torch.ops.lpips_fast.max_pool2d_backward
    return operator(grad, x, y, ctx.kernel, ctx.stride), None, None, None


def _save_pool_backward(ctx, inputs, output) -> None:
    _, x, y, ctx.kernel, ctx.stride = inputs
    ctx.save_for_backward(x, y)


def _pool_double_backward(ctx, grad_grad):
    # Linear in grad: the values of grad_grad at the maxima, one for each window.
    x, y = ctx.saved_tensors
    rows, columns = ((size - ctx.kernel) // ctx.stride + 1 for size in x.shape[2:])
    ceil_mode = bool(rows != y.shape[2] or columns != y.shape[3])
    _, index = torch.nn.functional.max_pool2d(
        x, ctx.kernel, ctx.stride, ceil_mode=ceil_mode, return_indices=True
    )
    picked = grad_grad.flatten(2).gather(2, index.flatten(2)).view_as(index)
    return picked, None, None, None, None


torch.library.register_autograd("lpips_fast::max_pool2d", _pool_backward, setup_context=_save_pool)
torch.library.register_autograd(
    "lpips_fast::max_pool2d_backward", _pool_double_backward, setup_context=_save_pool_backward
)
