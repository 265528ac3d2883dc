"""How far half precision is from float32, on the example images and distorted copies of them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders import trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast.images.reading import read_image

REPOSITORY = Path(__file__).resolve().parents[1]
NETS = ("alex", "squeeze", "vgg")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE = 128  # twice the example images', so that every trunk's last tap has several positions
LOSS_SCALE = 1024  # as torch.amp.GradScaler does, without which float16 loses small gradients


def image_pairs() -> tuple[Tensor, Tensor]:
    """The reference and its distorted copies, from faint to strong: (N, 3, H, W) each."""
    folder = REPOSITORY / "examples" / "images"
    reference, blurred, warped = (
        F.interpolate(read_image(folder / f"ex_{n}.png"), (SIZE, SIZE), mode="bicubic").clamp(-1, 1)
        for n in ("ref", "p0", "p1")
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(reference.shape, generator=generator)
    distorted = [
        blurred,
        warped,
        reference + 0.02 * noise,
        reference + 0.3 * noise,
        F.avg_pool2d(reference, 5, stride=1, padding=2, count_include_pad=False),
        reference * 0.7 + 0.2,
        reference.roll(1, dims=3),
        reference.flip(3),
    ]
    copies = torch.cat(distorted).clamp(-1, 1)
    return reference.expand_as(copies).contiguous(), copies


def _weights(net: str) -> tuple[Any, str]:
    """Trunk weights, and what they are."""
    beside = REPOSITORY.parent / "shared" / "weights"
    if lpips_fast.weights.WEIGHTS_VARIABLE not in os.environ and beside.is_dir():
        os.environ[lpips_fast.weights.WEIGHTS_VARIABLE] = str(beside)
    if lpips_fast.weights.locate_trunk_weights(net) is not None:
        return None, "ImageNet"
    return trunk_weights(net), "random"


def measure_all(device: torch.device, quick: bool = False) -> list[dict[str, Any]]:
    """Relative errors, one entry a net and way of asking for half precision.

    ``mean`` and ``max`` are of the distances, ``gradient`` the mean over pairs of the error's norm
    over the norm of the gradient to the image, for ``dtype=`` only.
    """
    image0, image1 = (x.to(device) for x in image_pairs())
    entries = []
    for net in NETS[: 1 if quick else None]:
        weights, kind = _weights(net)
        options: dict[str, Any] = {"net": net, "weights": weights, "verbose": False}
        exact = lpips_fast.LPIPS(**options).requires_grad_(False).to(device)
        expected, expected_gradient = _distance_and_gradient(exact, image0, image1)
        for name, dtype in DTYPES.items():
            reduced = lpips_fast.LPIPS(**options, dtype=dtype).requires_grad_(False).to(device)
            result, gradient = _distance_and_gradient(reduced, image0, image1)
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
                under_autocast = exact(image0, image1)
            difference = (gradient - expected_gradient).flatten(1).norm(dim=1)
            entry = {"net": net, "weights": kind, "pairs": len(image0)}
            entries += [
                {
                    **entry,
                    "way": f"dtype=torch.{name}",
                    **_errors(result, expected),
                    "gradient": (difference / expected_gradient.flatten(1).norm(dim=1))
                    .mean()
                    .item(),
                },
                {**entry, "way": f"autocast, {name}", **_errors(under_autocast, expected)},
            ]
    return entries


def _distance_and_gradient(
    model: lpips_fast.LPIPS, image0: Tensor, image1: Tensor
) -> tuple[Tensor, Tensor]:
    """Distances, and the gradient of each to its second image."""
    image1 = image1.clone().requires_grad_()
    distance = model(image0, image1)
    gradient = torch.autograd.grad(LOSS_SCALE * distance.sum(), image1)[0] / LOSS_SCALE
    return distance.detach(), gradient


def _errors(result: Tensor, expected: Tensor) -> dict[str, float]:
    error = ((result - expected) / expected).abs()
    return {"mean": error.mean().item(), "max": error.max().item()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for entry in measure_all(device):
        gradient = f", gradient {entry['gradient']:.1e}" if "gradient" in entry else ""
        text = "{net} ({weights} weights) {way}: mean {mean:.1e}, max {max:.1e}".format(**entry)
        print(text + gradient)


if __name__ == "__main__":
    main()
