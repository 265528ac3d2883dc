"""Runs every CUDA kernel once on a GPU: what compute-sanitizer watches, and a first sign of life.

    python scripts/gpu_every_kernel.py [--dtype float32]

On layers small enough for a tool that slows a kernel down a thousand times.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from lpips_fast import functional

DTYPES = ("float32", "float16", "bfloat16", "float64")
ORDERS = (torch.channels_last, torch.contiguous_format)
# Vector loads, single elements, more channels than registers hold, several blocks an image.
SHAPES = ((2, 64, 8, 8), (1, 33, 5, 7), (1, 1200, 2, 3), (1, 64, 48, 48))


def distances(dtype: torch.dtype) -> None:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for order, shape in itertools.product(ORDERS, SHAPES):
        a, b = (images(shape, dtype, order).relu_() for _ in range(2))
        w = torch.rand(shape[1], device="cuda", dtype=accumulator, requires_grad=True)
        for weight in (w.detach(), w):
            leaves = [x.detach().requires_grad_() for x in (a, b)]
            functional.distance(leaves[:1], leaves[1:], [weight]).sum().backward()
            functional.distance_map(leaves[:1], leaves[1:], [weight])[0].sum().backward()
            positions = torch.rand((1, 1, *shape[2:]), device="cuda", dtype=accumulator)
            torch.ops.lpips_fast.masked_distance(
                leaves[:1], leaves[1:], [weight], [positions], 1e-10
            ).sum().backward()
        if order == torch.channels_last:
            grad = torch.ones(shape[0], 1, device="cuda", dtype=accumulator)
            for deeper, need_weight in itertools.product((None, b), (False, True)):
                torch.ops.lpips_fast.tap_backward(grad, deeper, a, b, w, 1e-10, need_weight)


def scaling(dtype: torch.dtype) -> None:
    operators = torch.ops.lpips_fast
    shift, scale = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    for order, name in itertools.product(ORDERS, DTYPES):
        result = getattr(torch, name)
        for shape in ((2, 3, 8, 16), (1, 3, 5, 7)):
            image = images(shape, dtype, order)
            operators.scale_images([image], shift, scale, True, result)
            operators.scale_images([image[:, :, 1:, 1:]] * 2, shift, scale, False, result)
            image[0, 1, 2, 3] = torch.nan
            operators.scale_images_flagged([image], shift, scale, True, result)


def trunk(dtype: torch.dtype) -> None:
    operators = torch.ops.lpips_fast
    windows = ((2, False), (3, True), (4, False))
    for channels, (kernel, ceil_mode) in itertools.product((64, 33), windows):
        x = images((2, channels, 13, 11), dtype, torch.channels_last).requires_grad_()
        operators.max_pool2d(x, kernel, 2, ceil_mode).sum().backward()
        operators.bias_relu_(x.detach(), torch.zeros(channels, device="cuda", dtype=dtype))


def images(shape: tuple[int, ...], dtype: torch.dtype, order: torch.memory_format) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default all")
    for name in parser.parse_args().dtype or DTYPES:
        for run in (distances, scaling, trunk):
            run(getattr(torch, name))
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
