"""Image files that a sub-command compares: how they are read, and what is said of their sizes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ..comparison.masks import MaskMode
from ..images.masks import read_mask
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


def add_mask_arguments(parser: argparse.ArgumentParser, *, of_folders: bool = False) -> None:
    """Which part of the images counts."""
    masks = "DIR|FILE" if of_folders else "FILE"
    told = "a gray image that says which part of the images counts: black does not"
    if of_folders:
        told += "; or a folder of masks, called as the images of A but for the suffix"
    parser.add_argument("--mask", metavar=masks, help=told)
    parser.add_argument(
        "--mask-mode",
        choices=get_args(MaskMode),
        help="average distances with the mask as weights (weighted, the default), or give both "
        "images one value outside it (fill)",
    )
    parser.add_argument(
        "--fill-value",
        type=argument_types.fill_value,
        metavar="V",
        help="that value, from -1, black, to 1, white (default: 0)",
    )


def masking(options: argparse.Namespace, *, has_masks: bool) -> dict[str, Any]:
    """What masks mean, as ``LPIPS`` takes it; nothing without masks."""
    if not has_masks:
        if options.mask_mode is not None or options.fill_value is not None:
            wrong = "--mask-mode" if options.mask_mode is not None else "--fill-value"
            raise UsageError(f"{wrong} says what a mask means, and there is none: give --mask")
        return {}
    mode = options.mask_mode or "weighted"
    if mode != "fill" and options.fill_value is not None:
        raise UsageError("--fill-value is of --mask-mode fill alone")
    fidelities = [metric for metric in options.metrics if metric != "lpips"]
    if fidelities:
        raise UsageError(
            f"masks are of lpips alone: leave {' and '.join(fidelities)} out of --metrics"
        )
    return {"mask_mode": mode, "fill_value": options.fill_value or 0.0}


def mask_text(how: Mapping[str, Any]) -> str:
    """What :func:`masking` says, in words."""
    if how["mask_mode"] == "weighted":
        return "weighted"
    return f"filled with {how['fill_value']:g}"


def read_mask_of(options: argparse.Namespace, size: tuple[int, int]) -> torch.Tensor:
    """The mask (1, 1, H, W) of images of a height and width."""
    mask, _ = read_mask(
        options.mask, max_pixels=options.max_pixels, preprocessing=preprocessing(options)
    )
    found = torch.from_numpy(mask).float()[None, None]
    if tuple(found.shape[-2:]) != size:
        raise CommandError(
            f"the mask {options.mask} has {size_text(found)} pixels and the images have "
            f"{size[1]}x{size[0]}"
        )
    return found


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
