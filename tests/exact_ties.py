"""The gradient that exact arithmetic has: the original in float64, ties to a window's first."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def windows(x: Tensor, pool: nn.MaxPool2d) -> tuple[Tensor, Tensor]:
    """(N, C, h, w, kernel^2), beyond the edge -1e300; and the pooled, whose shape torch decides."""
    kernel, stride = pool.kernel_size, pool.stride
    pooled = F.max_pool2d(x, kernel, stride, ceil_mode=pool.ceil_mode)
    rows, columns = pooled.shape[2:]
    missing = [
        max((n - 1) * stride + kernel - size, 0) for n, size in zip((rows, columns), x.shape[2:])
    ]
    padded = F.pad(x, (0, missing[1], 0, missing[0]), value=-1e300)
    unfolded = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)
    return unfolded[:, :, :rows, :columns].flatten(4), pooled


class FirstMax(nn.Module):
    """Max-pooling in float64 whose ties go to the first position, as in exact arithmetic.

    A tie is what lies within 1e-12 of the window's scale: float64's own rounding would break it.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        values, pooled = windows(x, self.pool)
        scale = values.detach().clamp_min(-1e200).abs().amax(-1, keepdim=True)
        is_near = values.detach() >= pooled.detach()[..., None] - 1e-12 * scale
        order = torch.arange(values.shape[-1], 0, -1, dtype=x.dtype)
        return values.gather(-1, (is_near * order).argmax(-1, keepdim=True)).squeeze(-1)


def exact(reference: nn.Module) -> nn.Module:
    """A copy of the original ``lpips.LPIPS`` in float64 with :class:`FirstMax`."""
    model = copy.deepcopy(reference).double()
    for block in model.net.children():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                block._modules[name] = FirstMax(layer)
    return model


def image_gradient(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    leaf = image.clone().requires_grad_()
    model(leaf, target).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# Photographs are noise, smooth in parts; what is tied is what was drawn.


def flat_images(size: int = 64) -> dict[str, Tensor]:
    """Flat, framed, padded, periodic and ramp images, (1, 3, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, size // 8, size // 8, generator=generator)
    photo = F.interpolate(coarse, size=(size, size), mode="bicubic") * 2 - 1
    photo = (photo + 0.1 * torch.randn(photo.shape, generator=generator)).clamp(-1, 1)
    position = torch.arange(size)
    across, down = position.expand(size, size), position[:, None].expand(size, size)

    def gray(plane: Tensor) -> Tensor:
        return plane.expand(1, 3, size, size).contiguous()

    def framed(left: int, top: int, right: int, bottom: int, color: list[float]) -> Tensor:
        image = (
            torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1).expand(photo.shape).clone()
        )
        inside = (slice(top, size - bottom), slice(left, size - right))
        image[..., inside[0], inside[1]] = photo[..., inside[0], inside[1]]
        return image

    def tiled(height: int, width: int) -> Tensor:
        repeats = (1, 1, -(-size // height), -(-size // width))
        return photo[..., :height, :width].repeat(repeats)[..., :size, :size].contiguous()

    thirds = (across * 3 // size).float() - 1
    return {
        "black": -torch.ones_like(photo),
        "one colour": torch.tensor([0.3, -0.2, 0.9]).view(1, 3, 1, 1).expand(photo.shape).clone(),
        "letterboxed": framed(0, 11, 0, 13, [-1, -1, -1]),
        "pillarboxed, gray": framed(7, 0, 10, 0, [0, 0, 0]),
        "framed, 5 pixels": framed(5, 5, 5, 5, [1, 1, 1]),
        "object on a colour": framed(17, 22, 19, 15, [0.7, 0.1, -0.4]),
        "padded below and right": framed(0, 0, 21, 14, [-1, -1, -1]),
        "squares of 8": gray((down // 8 + across // 8) % 2 * 2.0 - 1),
        "squares of 5": gray((down // 5 + across // 5) % 2 * 2.0 - 1),
        "stripes of 3": gray(across // 3 % 2 * 2.0 - 1),
        "tiles of 4x4": tiled(4, 4),
        "tiles of 16x12": tiled(16, 12),
        "ramp across": gray(across / (size - 1) * 2 - 1),
        "ramp down": gray(down / (size - 1) * 2 - 1),
        "diagonal ramp": gray((across + down) / (2 * size - 2) * 2 - 1),
        "gentle ramp": gray(0.2 + across / size * 1e-2),
        "three steps": gray(thirds),
        "disc": gray(((across - size / 2) ** 2 + (down - size / 2) ** 2 < size**2 / 9) * 2.0 - 1),
    }
