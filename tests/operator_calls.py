"""A right call of every CPU operator, drawn at random, and the same in plain torch in float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lpips_fast import composed

OPS = torch.ops.lpips_fast
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ORDERS = [torch.channels_last, torch.contiguous_format]

# The arguments, and what becomes of them; None where nothing is promised.
Call = tuple[list[Any], Callable[..., Any]]


class Source(Protocol):
    """Where choices come from: hypothesis, or a random number generator."""

    def integer(self, least: int, most: int) -> int: ...

    def one_of(self, choices: Any) -> Any: ...


class Seeded:
    """Choices of a random number generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def one_of(self, choices: Any) -> Any:
        return self.random.choice(list(choices))


class Draw:
    """Draws sizes and tensors."""

    def __init__(self, source: Source) -> None:
        self.integer, self.one_of = source.integer, source.one_of
        self.generator = torch.Generator().manual_seed(self.integer(0, 2**31))

    def images(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random images in any order: dense, a crop, some of the channels, every second row."""
        n, c, h, w = shape
        x = torch.randn(n, c + 2, 2 * h, w + 3, generator=self.generator).to(dtype)
        x = x.contiguous(memory_format=self.one_of(ORDERS))
        part = x[:, 1 : c + 1, ::2, 2 : w + 2]
        return part if self.integer(0, 1) else part.contiguous(memory_format=self.one_of(ORDERS))

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------------------- distances


def layers(draw: Draw, most: int = 3) -> list[list[Tensor]]:
    dtype, n = draw.one_of(FLOATS), draw.integer(0, 3)
    weight_dtype = composed.accumulator_dtype(dtype)
    groups: list[list[Tensor]] = [[], [], []]
    for _ in range(draw.integer(1, most)):
        shape = (n, draw.integer(2, 40), draw.integer(1, 6), draw.integer(1, 6))
        groups[0].append(draw.images(*shape, dtype=dtype))
        groups[1].append(draw.images(*shape, dtype=dtype))
        groups[2].append(draw.numbers(shape[1], dtype=weight_dtype))
    return groups


def in_float64(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.detach().double() for t in group] for group in groups]


def distances(a: list, b: list, w: list, eps: float) -> Tensor:
    return composed.distance(*in_float64([a, b, w]), eps)


def maps(a: list, b: list, w: list, eps: float) -> list[Tensor]:
    return [composed.distance_map(*ts, eps) for ts in zip(*in_float64([a, b, w]))]


def gradients(grad: Any, a: list, b: list, w: list, eps: float, *needs: bool) -> list[Tensor]:
    inputs = in_float64([a, b, w])
    asked = [t.requires_grad_() for group, need in zip(inputs, needs) for t in group if need]
    if not asked:
        return []
    if isinstance(grad, Tensor):
        outputs, grads = [composed.distance(*inputs, eps)], [grad.double()]
    else:
        outputs = [composed.distance_map(*ts, eps) for ts in zip(*inputs)]
        grads = [g.double() for g in grad]
    return list(torch.autograd.grad(outputs, asked, grads))


def of_distance(draw: Draw) -> Call:
    return [*layers(draw), 1e-10], distances


def of_distance_map(draw: Draw) -> Call:
    return [*layers(draw), 1e-10], maps


def of_masked_distance(draw: Draw) -> Call:
    groups = layers(draw)
    n = len(groups[0][0])
    position_weights = [
        draw.numbers(draw.one_of([n, 1]), 1, *f.shape[2:], dtype=groups[2][0].dtype)
        for f in groups[0]
    ]

    def formula(a: list, b: list, w: list, p: list, eps: float) -> Tensor:
        a, b, w, p = in_float64([a, b, w, p])
        return composed.distance(a, b, w, eps, position_weights=p)

    return [*groups, position_weights, 1e-10], formula


def of_position_weights(draw: Draw) -> Call:
    size = (draw.integer(1, 30), draw.integer(1, 30))
    dtype = draw.one_of([torch.bool, *FLOATS])
    mask = draw.numbers(draw.integer(0, 3), 1, *size).to(dtype)
    mask[:, :, : draw.integer(0, size[0] - 1)] = 0
    grids = [(draw.integer(1, 9), draw.integer(1, 40)) for _ in range(draw.integer(0, 3))]
    heights, widths = [h for h, _ in grids], [w for _, w in grids]

    def formula(
        mask: Tensor, heights: list[int], widths: list[int], dtype: torch.dtype
    ) -> list[Tensor]:
        return [cell_means(mask, h, w) for h, w in zip(heights, widths, strict=True)]

    return [mask, heights, widths, draw.one_of([torch.float32, torch.float64])], formula


def cell_means(mask: Tensor, height: int, width: int) -> Tensor:
    """Of each of height x width cells the mean of a mask (N, 1, H, W), over the mean of all cells.

    By the area that each pixel and each cell have in common. NaN where a mask has no weights.
    """
    mask = mask.detach().double()
    mask = mask.masked_fill((mask < 0).any(3, True).any(2, True), float("nan"))
    down, across = (
        overlaps(size, count) for size, count in zip(mask.shape[2:], (height, width), strict=True)
    )
    means = torch.einsum("iy,ncyx,jx->ncij", down, mask, across)
    return means / means.mean(dim=(2, 3), keepdim=True)


def overlaps(size: int, count: int) -> Tensor:
    """(count, size): the part of each cell that lies in each pixel."""
    edges = torch.arange(count + 1, dtype=torch.float64)[:, None] * size / count
    pixel = torch.arange(size, dtype=torch.float64)
    common = torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)
    return common.clamp(min=0) * count / size


def of_distance_backward(draw: Draw) -> Call:
    a, b, w = layers(draw)
    grad = draw.numbers(len(a[0]), len(a), dtype=w[0].dtype)
    needs = [draw.one_of([False, True]) for _ in range(3)]
    return [grad, a, b, w, 1e-10, *needs], gradients


def of_distance_map_backward(draw: Draw) -> Call:
    a, b, w = layers(draw)
    grads = [draw.numbers(len(f), 1, *f.shape[2:], dtype=w[0].dtype) for f in a]
    needs = [draw.one_of([False, True]) for _ in range(3)]
    return [grads, a, b, w, 1e-10, *needs], gradients


def of_tap_backward(draw: Draw) -> Call:
    [a], [b], [w] = layers(draw, most=1)
    a = a.contiguous(memory_format=torch.channels_last)
    grad = draw.numbers(*draw.one_of([(len(a), 1), (len(a), 1, *a.shape[2:])]), dtype=w.dtype)
    deeper = draw.images(*a.shape, dtype=a.dtype) if draw.integer(0, 1) else None

    def formula(grad, deeper, a, b, w, eps, need_weight):
        grad = grad if grad.dim() == 2 else [grad]
        first, *rest = gradients(grad, [a], [b], [w], eps, True, False, need_weight)
        return [(first + (0 if deeper is None else deeper.double())) * (a > 0), *rest]

    return [grad, deeper, a, b, w, 1e-10, draw.one_of([False, True])], formula


# ------------------------------------------------------------------------- images and pooling


def of_scale_images(draw: Draw) -> Call:
    size = (draw.integer(1, 9), draw.integer(1, 300))
    images = [
        draw.images(draw.integer(0, 2), 3, *size, dtype=draw.one_of(FLOATS))
        for _ in range(draw.integer(1, 3))
    ]
    shift, scale = draw.numbers(1, 3, 1, 1), draw.numbers(1, 3, 1, 1) + 0.5

    def formula(images, shift, scale, unit_range, dtype):
        shift, scale = (t.double().reshape(1, 3, 1, 1) for t in (shift, scale))
        all_images = torch.cat([x.double() for x in images])
        return ((2 * all_images - 1 if unit_range else all_images) - shift) / scale

    return [images, shift, scale, draw.one_of([False, True]), draw.one_of(FLOATS)], formula


def window(draw: Draw) -> tuple[int, int]:
    return draw.integer(1, 4), draw.integer(1, 4)


def pooled_images(draw: Draw, kernel: int) -> Tensor:
    size = (draw.integer(kernel, 9), draw.integer(kernel, 9))
    return draw.images(draw.integer(0, 2), draw.integer(1, 20), *size, dtype=draw.one_of(FLOATS))


def of_max_pool2d(draw: Draw) -> Call:
    kernel, stride = window(draw)

    def formula(x, kernel, stride, ceil_mode):
        return F.max_pool2d(x.double(), kernel, stride, ceil_mode=bool(ceil_mode))

    return [pooled_images(draw, kernel), kernel, stride, draw.one_of([False, True])], formula


def of_max_pool2d_backward(draw: Draw) -> Call:
    kernel, stride = window(draw)
    x = pooled_images(draw, kernel)
    y = F.max_pool2d(x, kernel, stride, ceil_mode=draw.one_of([False, True]))

    def formula(grad, x, y, kernel, stride, keys=None):
        # The first of the window that has the pooled value, whatever that is, takes the gradient;
        # or, with keys, the first of the window that has this position's key.
        result = torch.zeros(x.shape, dtype=torch.float64)
        if keys is None:
            keys = (
                torch.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2:]).expand(len(x), 1, -1, -1)
            )
        keys = keys.repeat_interleave(x.shape[1] // keys.shape[1], dim=1)
        for row in range(y.shape[2]):
            for column in range(y.shape[3]):
                left = grad[:, :, row, column].double()
                rows = range(row * stride, min(row * stride + kernel, x.shape[2]))
                columns = range(column * stride, min(column * stride + kernel, x.shape[3]))
                window = list(itertools.product(rows, columns))
                for h, w in window:
                    mask = (x[:, :, h, w] == y[:, :, row, column]) | x[:, :, h, w].isnan()
                    given = torch.where(mask, left, 0)
                    left = torch.where(mask, 0, left)
                    for r, c in window:
                        alike = keys[:, :, r, c] == keys[:, :, h, w]
                        result[:, :, r, c] += torch.where(alike, given, 0)
                        given = torch.where(alike, 0, given)
        return result

    keys = None
    if draw.integer(0, 1):
        groups = 2 if x.shape[1] % 2 == 0 else 1
        keys = torch.randint(0, 3, (len(x), groups, *x.shape[2:]), generator=draw.generator)
    return [draw.images(*y.shape, dtype=y.dtype), x, y, kernel, stride, keys], formula


def of_receptive_fields(draw: Draw) -> Call:
    kinds = [
        [0, draw.integer(1, 3), draw.integer(1, 2), draw.integer(0, 1)],  # a convolution
        [1, draw.integer(1, 3), draw.integer(1, 2), draw.integer(0, 1)],  # a pooling
        [2, 3, 1, 1],  # a fire module
    ]
    drawn = [draw.one_of(kinds) for _ in range(draw.integer(0, 3))] + [kinds[1]]
    x = draw.images(
        draw.integer(0, 2), draw.integer(1, 5), draw.integer(12, 15), draw.integer(12, 15)
    )

    def formula(x, layers):
        # What keys mean is tested with the poolings' gradients; here, that any order is read alike.
        return OPS.receptive_fields(x.detach().contiguous().clone(), layers)

    return [x, [number for layer in drawn for number in layer]], formula


def of_depth_to_space(draw: Draw) -> Call:
    stride = draw.integer(1, 4)
    channels, size = draw.integer(1, 5), (draw.integer(1, 5), draw.integer(1, 5))
    blocks = draw.images(2, stride**2 * channels, *size, dtype=draw.one_of(FLOATS))

    def formula(blocks, stride, padding, height, width):
        n, c, rows, columns = blocks.shape
        result = torch.zeros(n, c // stride**2, height, width, dtype=torch.float64)
        depth = blocks.double().reshape(n, stride, stride, c // stride**2, rows, columns)
        for y in range(min(height, rows * stride - padding)):
            for x in range(min(width, columns * stride - padding)):
                (row, h), (column, w) = divmod(y + padding, stride), divmod(x + padding, stride)
                result[:, :, y, x] = depth[:, h, w, :, row, column]
        return result

    return [blocks, stride, draw.integer(0, 5), draw.integer(0, 22), draw.integer(0, 22)], formula


# -------------------------------------------------------------------------------- convolutions


def with_channels(weight: Tensor, count: int) -> Tensor:
    """A packed weight's last vector has channels of zeros."""
    return F.pad(weight.double(), (0, 0) * 3 + (0, max(count - len(weight), 0)))[:count]


def of_direct_pack(draw: Draw) -> Call:
    kernel = draw.integer(1, 4)
    shape = (draw.integer(0, 40), draw.integer(0, 9), kernel, kernel)

    def formula(weight):
        packed = OPS.direct_pack(weight.detach().clone())
        # All the numbers, and zeros.
        expected = torch.cat([weight.flatten(), torch.zeros(packed.numel() - weight.numel())])
        torch.testing.assert_close(packed.flatten().sort().values, expected.sort().values)
        return packed

    return [draw.numbers(*shape)], formula


def of_winograd_pack(draw: Draw) -> Call:
    kernel = draw.one_of([3, 5])
    shape = (draw.integer(0, 40), draw.integer(0, 9), kernel, kernel)
    # What it packs shows in a convolution, below; here, that it reads any order alike.
    return [draw.numbers(*shape)], lambda weight: OPS.winograd_pack(weight.detach().clone())


def of_direct_conv2d(draw: Draw) -> Call:
    kernel, stride, padding = draw.integer(1, 4), draw.integer(1, 3), draw.integer(0, 2)
    channels, out_channels = draw.integer(1, 9), draw.integer(1, 40)
    size = (draw.integer(kernel, 9), draw.integer(kernel, 9))
    x = draw.images(draw.integer(0, 2), channels, *size)
    weight = draw.numbers(out_channels, channels, kernel, kernel) - 0.5
    bias = draw.numbers(out_channels) if draw.integer(0, 1) else None

    def formula(x, packed, bias, relu, out_channels, kernel, stride, padding):
        bias = None if bias is None else bias.double()
        y = F.conv2d(x.double(), with_channels(weight, out_channels), bias, stride, padding)
        return y.relu() if relu else y

    flags = [draw.one_of([False, True]), out_channels, kernel, stride, padding]
    return [x, OPS.direct_pack(weight), bias, *flags], formula


def in_blocks(weight: Tensor, stride: int) -> Tensor:
    """(O, s * s * I, t, t): of the convolution of stride 1 over blocks of s * s positions."""
    kernel = weight.shape[-1]
    taps = -(-kernel // stride)
    weight = F.pad(weight, (0, taps * stride - kernel) * 2)
    weight = weight.unflatten(3, (taps, stride)).unflatten(2, (taps, stride))
    return weight.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def of_winograd_conv2d(draw: Draw) -> Call:
    kernel, stride = draw.one_of([(3, 1), (5, 1), (6, 2), (5, 2), (11, 4), (9, 2)])
    padding, channels, out_channels = draw.integer(0, 2), draw.integer(1, 6), draw.integer(1, 40)
    dtype = draw.one_of([torch.float32, torch.float16, torch.bfloat16])
    size = (draw.integer(kernel, kernel + 9), draw.integer(kernel, kernel + 9))
    x = draw.images(draw.integer(0, 2), channels, *size, dtype=dtype)
    weight = draw.numbers(out_channels, channels, kernel, kernel) - 0.5
    shape = F.conv2d(x.double(), weight.double(), None, stride, padding).shape
    bias = draw.numbers(out_channels) if draw.integer(0, 1) else None
    mask, add = (draw.images(*shape, dtype=dtype) if draw.integer(0, 1) else None for _ in range(2))

    def formula(x, packed, bias, relu, mask, out_channels, kernel, stride, padding, add, precise):
        if not precise and not (x.abs() <= 1000).all():
            return None  # a tile's results have the rounding, or the NaN, of all its numbers
        bias = None if bias is None else bias.double()
        y = F.conv2d(x.double(), with_channels(weight, out_channels), bias, stride, padding)
        y = y if add is None else y + add
        y = y.relu() if relu else y
        return y if mask is None else torch.where(mask <= 0, 0, y)

    packed = OPS.winograd_pack(in_blocks(weight, stride))
    relu = draw.one_of([False, True])
    geometry = [out_channels, kernel, stride, padding]
    precise = draw.one_of([False, True])
    if precise and x.numel() > 0:
        x[:, 0, 0, 0] = draw.one_of([5000.0, torch.nan])
    return [x, packed, bias, relu, mask, *geometry, add, precise], formula


def of_fire(draw: Draw) -> Call:
    channels, narrow, wide = draw.integer(1, 9), draw.integer(1, 20), draw.integer(1, 40)
    x = draw.images(draw.integer(0, 2), channels, draw.integer(1, 9), draw.integer(1, 9))
    winograd = draw.one_of([False, True])
    weights = [
        draw.numbers(out, inner, k, k) - 0.5
        for out, inner, k in ((narrow, channels, 1), (wide, narrow, 1), (wide, narrow, 3))
    ]
    biases = [draw.numbers(len(weight)) for weight in weights]

    def formula(x, squeeze, bias0, expand1x1, bias1, expand3x3, bias2, winograd):
        squeezed, first, second = (w.double() for w in weights)
        narrow = F.conv2d(x.double(), squeezed, bias0.double()).relu()
        both = [
            F.conv2d(narrow, first, bias1.double()),
            F.conv2d(narrow, second, bias2.double(), padding=1),
        ]
        return F.pad(narrow, (1, 1, 1, 1)), torch.cat(both, dim=1).relu()

    pack3x3 = OPS.winograd_pack if winograd else OPS.direct_pack
    packed = [OPS.direct_pack(weights[0]), OPS.direct_pack(weights[1]), pack3x3(weights[2])]
    pairs = [t for pair in zip(packed, biases) for t in pair]
    return [x, *pairs, winograd], formula


def of_fire_backward(draw: Draw) -> Call:
    channels, narrow, wide = draw.integer(1, 9), draw.integer(1, 20), draw.integer(1, 40)
    n, height, width = draw.integer(0, 2), draw.integer(1, 9), draw.integer(1, 9)
    winograd = draw.one_of([False, True])
    x = draw.images(n, channels, height, width)
    grad = draw.images(n, 2 * wide, height, width)
    squeezed = draw.images(n, narrow, height + 2, width + 2)
    # Of the convolutions that are the gradients: squeeze's, and of both that expand.
    squeeze = draw.numbers(channels, narrow, 1, 1) - 0.5
    first, second = (draw.numbers(narrow, wide, k, k) - 0.5 for k in (1, 3))

    def formula(grad, x, squeezed, _squeeze, _expand1x1, _expand3x3, through_relu, winograd):
        wide = first.shape[1]
        both = F.conv2d(grad[:, :wide].double(), first.double())
        both = both + F.conv2d(grad[:, wide:].double(), second.double(), padding=1)
        result = F.conv2d(both * (squeezed[:, :, 1:-1, 1:-1] > 0), squeeze.double())
        return result * (x > 0) if through_relu else result

    pack3x3 = OPS.winograd_pack if winograd else OPS.direct_pack
    packed = [OPS.direct_pack(squeeze), OPS.direct_pack(first), pack3x3(second)]
    return [grad, x, squeezed, *packed, draw.one_of([False, True]), winograd], formula


CALLS = {
    name.removeprefix("of_"): call
    for name, call in list(globals().items())
    if name.startswith("of_")
}
