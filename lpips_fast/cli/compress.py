"""``lpips-fast compress DIR -o OUT``: a lighter trunk, fitted to the whole metric on images."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..compression import Triplets, agreement, distill, distorted_triplets, prune, time_ratio
from ..compression.agreement import size_in_bytes
from ..folders.pairing import list_images
from ..images.reading import read_image
from ..weights.whole_files import appearing
from . import argument_types
from .command import Command, CommandError, add_json_argument, is_quiet, print_to
from .device import to_device
from .image_files import add_reading_arguments
from .model import add_model_arguments, load_model, metric_name
from .outputs import check_output

if TYPE_CHECKING:
    from ..lpips import LPIPS

# Of a folder's images, every fourth is judged on where no others are given.
_HELD_OUT_OF = 4
_TIMED_AT = (64, 256)


def _add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="DIR", help="images like those to be compared")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help="the checkpoint to write, such as narrow.pth",
    )
    parser.add_argument(
        "--held-out",
        metavar="DIR",
        help="other images to judge by (default: every fourth of the first)",
    )
    add_model_arguments(parser, dtype=False)
    parser.add_argument(
        "--keep",
        type=float,
        default=0.5,
        metavar="P",
        help="the part of every layer's channels that stays (default: 0.5)",
    )
    numbers = (
        ("--steps", argument_types.whole, 300, "of distillation; 0: the channels as they are"),
        ("--crop", argument_types.positive, 64, "side of the images' crops, in pixels"),
        ("--triplets", argument_types.positive, 600, "crops with two distortions each"),
        ("--seed", int, 0, "of crops, distortions and their order"),
    )
    for flag, kind, default, text in numbers:
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_reading_arguments(parser)
    add_json_argument(parser)


def _run_compress(options: argparse.Namespace) -> None:
    fitted_on, judged_on = _paths(options)
    check_output(options.output, [*fitted_on, *judged_on])
    full = load_model(options)
    fitted, judged = (
        _triplets(paths, count, seed, options)
        for paths, count, seed in (
            (fitted_on, options.triplets, options.seed),
            (judged_on, max(2, options.triplets // 3), options.seed + 1),
        )
    )
    model = prune(full, fitted[:96], options.keep)
    if options.steps:
        distill(
            model, full, fitted, steps=options.steps, seed=options.seed, progress=not is_quiet()
        )
    content = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, content)
    with appearing(options.output) as file:
        file.write(content.getvalue())
    report = _report(options, model, full, judged) | {"fitted_on": len(fitted_on)}
    report["judged_on"] = len(judged_on)
    if options.json:
        print_to(json.dumps(report, indent=2, allow_nan=False), sys.stdout)
    else:
        print_to(_words(options, report), sys.stdout)


def _paths(options: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    paths = [Path(options.images) / name for name in list_images(options.images)]
    if options.held_out is None:
        fitted_on = [path for k, path in enumerate(paths) if (k + 1) % _HELD_OUT_OF]
        judged_on = paths[_HELD_OUT_OF - 1 :: _HELD_OUT_OF]
        if not judged_on:
            raise CommandError(
                f"{options.images} holds {len(paths)} images, of which every fourth is held out to "
                "judge by: give more, or others with --held-out"
            )
        return fitted_on, judged_on
    judged_on = [Path(options.held_out) / name for name in list_images(options.held_out)]
    for folder, found in ((options.images, paths), (options.held_out, judged_on)):
        if not found:
            raise CommandError(f"{folder} holds no images")
    return paths, judged_on


def _triplets(paths: list[Path], count: int, seed: int, options: argparse.Namespace) -> Triplets:
    how = {"alpha": options.alpha, "max_pixels": options.max_pixels}
    images = [read_image(path, **how)[0] for path in paths]
    found = distorted_triplets(images, options.crop, count, seed=seed)
    return Triplets(*(to_device(x, options.device) for x in (found.ref, found.p0, found.p1)))


def _report(
    options: argparse.Namespace, model: LPIPS, full: LPIPS, judged: Triplets
) -> dict[str, Any]:
    of = agreement(model, full, judged)
    return {
        "metric": metric_name(options),
        "checkpoint": str(options.output),
        "trunk": model.net_name,
        "bytes": size_in_bytes(model),
        "full_bytes": size_in_bytes(full),
        "time_over_full": {str(side): time_ratio(model, full, side) for side in _TIMED_AT},
        "spearman": of.spearman,
        "same_nearer": of.same_nearer,
        "mean_error": of.error,
        "pairs": of.pairs,
    }


def _words(options: argparse.Namespace, report: dict[str, Any]) -> str:
    times = ", ".join(f"{ratio:.2f} at {side}²" for side, ratio in report["time_over_full"].items())
    return "\n".join(
        (
            f"{options.output}: {report['trunk']}, fitted to {report['metric']}",
            f"  size  {report['bytes'] / 1e6:.1f} MB of {report['full_bytes'] / 1e6:.1f}",
            f"  time  {times}, of the full metric's",
            f"  on {report['pairs']} pairs from {report['judged_on']} images held out: Spearman "
            f"{report['spearman']:.4f}, same nearer {report['same_nearer']:.1%}, mean error "
            f"{report['mean_error']:.1%} of the mean distance",
            f"  load it with --net {options.net} --checkpoint {options.output}, or "
            f"LPIPS(net={options.net!r}, model_path={str(options.output)!r})",
        )
    )


COMMAND = Command("make a lighter trunk", _add_compress_arguments, _run_compress)
