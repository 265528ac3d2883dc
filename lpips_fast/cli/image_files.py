"""Image files that a sub-command compares: how they are read, and what is said of their sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

import torch

from ..images.reading import Alpha, read_image
from .command import CommandError


def add_alpha_argument(parser: argparse.ArgumentParser) -> None:
    """``--alpha``, for :func:`lpips_fast.images.read_image`."""
    parser.add_argument(
        "--alpha",
        choices=get_args(Alpha),
        default="white",
        help="transparent images: composite on white (default), ignore alpha, or refuse",
    )


def read_one_size(paths: Sequence[str], alpha: Alpha) -> list[torch.Tensor]:
    """Images that are to be compared with the first, each (1, 3, H, W)."""
    images = [read_image(path, alpha=alpha) for path in paths]
    for path, image in zip(paths, images):
        if image.shape != images[0].shape:
            raise CommandError(
                f"the images differ in size: {paths[0]} is {size_text(images[0])} and "
                f"{path} is {size_text(image)} pixels; crop or resize one of them"
            )
    return images


def size_text(image: torch.Tensor) -> str:
    """Width and height."""
    return f"{image.shape[-1]}x{image.shape[-2]}"
