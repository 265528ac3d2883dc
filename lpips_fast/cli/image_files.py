"""Image files that a sub-command compares: how they are read, and what is said of their sizes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ..images.reading import Alpha, image_to_tensor, read_image_uint8
from ..images.resizing import Preprocessing, Resampling
from . import argument_types
from .command import CommandError, UsageError

if TYPE_CHECKING:
    from ..lpips import LPIPS

#: Of an image, unless --max-pixels says otherwise: some 7000 by 7000. Decoding one takes at most
#: 1.2 GB, and AlexNet 5 GB.
DEFAULT_MAX_PIXELS = 50_000_000


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are read, and changed before they are compared."""
    parser.add_argument(
        "--resize",
        type=argument_types.size_or_side,
        metavar="WxH|N",
        help="resize to W by H pixels, or the shorter side to N; by default images keep their size",
    )
    parser.add_argument(
        "--crop",
        type=argument_types.size,
        metavar="WxH",
        help="keep the centre, after --resize if both are given",
    )
    parser.add_argument(
        "--resampling",
        choices=get_args(Resampling),
        default="bicubic",
        help="Pillow's filter for --resize (default: bicubic)",
    )
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """How image files are read."""
    parser.add_argument(
        "--alpha",
        choices=get_args(Alpha),
        default="white",
        help="transparent images: composite on white (default), ignore alpha, or refuse",
    )
    parser.add_argument(
        "--max-pixels",
        type=argument_types.positive,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="refuse an image that declares more, before it takes memory (default: 50 million)",
    )


def preprocessing(options: argparse.Namespace) -> Preprocessing:
    return Preprocessing(options.resize, options.crop, options.resampling)


def read_pixels(path: str | os.PathLike[str], options: argparse.Namespace) -> Any:
    """One image as it is compared: 8-bit RGB (H, W, 3).

    Raises:
        ValueError: it cannot be read, or is smaller than the crop.
    """
    image = read_image_uint8(path, alpha=options.alpha, max_pixels=options.max_pixels)
    return preprocessing(options)(image)


def read_one_size(paths: Sequence[str], options: argparse.Namespace) -> list[torch.Tensor]:
    """Images that are to be compared with the first, each (1, 3, H, W)."""
    images = [image_to_tensor(read_pixels(path, options)) for path in paths]
    for path, image in zip(paths, images):
        if image.shape != images[0].shape:
            raise CommandError(
                f"the images differ in size: {paths[0]} is {size_text(images[0])} and "
                f"{path} is {size_text(image)} pixels; --resize or --crop brings them to one"
            )
    return images


def check_minimum(model: LPIPS, path: str, image: torch.Tensor, net: str) -> None:
    """The first of images of one size is large enough for the trunk."""
    if min(image.shape[-2:]) < model.minimum_size:
        raise CommandError(
            f"{path} has {size_text(image)} pixels, and trunk {net!r} needs at least "
            f"{model.minimum_size}x{model.minimum_size}; --resize enlarges it"
        )


def refuse_folders(paths: Sequence[str]) -> None:
    """Images are expected: of folders, the right command is named."""
    if all(Path(path).is_dir() for path in paths):
        raise UsageError(
            f"{paths[0]} is a folder: images of folders are compared by lpips-fast dirs A B "
            "-o scores.csv, and all images of one with each other by lpips-fast pairwise"
        )


def size_text(image: torch.Tensor) -> str:
    """Width and height."""
    return f"{image.shape[-1]}x{image.shape[-2]}"
