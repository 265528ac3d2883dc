"""``lpips-fast pair A B``: the distance between two images, and where they differ."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..images.heatmap import PICTURE_SUFFIXES, save_heatmap, save_map_numbers
from ..version import __version__
from .command import Command, CommandError, add_json_argument, print_to
from .image_files import add_alpha_argument, read_one_size, size_text
from .model import add_model_arguments, distance_name, layer_names, load_model, metric_name

if TYPE_CHECKING:
    from ..lpips import LPIPS


def _add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="A", help="an image file")
    parser.add_argument("image1", metavar="B", help="another, of the same size")
    add_model_arguments(parser)
    add_alpha_argument(parser)
    parser.add_argument(
        "--map",
        type=_picture_path,
        metavar="OUT",
        help="draw where the images differ, for example OUT.png, and write its numbers to OUT.npy",
    )
    parser.add_argument("--per-layer", action="store_true", help="list the layers' distances too")
    add_json_argument(parser)


def _picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURE_SUFFIXES)}")
    return path


def _run_pair(options: argparse.Namespace) -> None:
    if options.map:
        _check_map_target(options)
    in0, in1 = read_one_size((options.image0, options.image1), options.alpha)
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        model = load_model(options)
        distance, layers = _measure(model, in0.to(options.device), in1.to(options.device))
        map_report = _draw_map(model, options, in0, in1, distance) if options.map else None

    if options.json:
        report = _pair_report(options, in0, distance, layers, map_report)
        print(json.dumps(report, indent=2, allow_nan=False))
        return
    lines = [
        f"Distance: {_rounded(distance)}",
        f"  {options.image0}  vs  {options.image1}  ({size_text(in0)})",
        f"  {metric_name(options)}, {options.device}",
    ]
    if options.per_layer:
        named = zip(layer_names(options), layers, strict=True)
        lines += [f"  {name}: {_rounded(value)}" for name, value in named]
    if map_report:
        lines.append(f"  map: {map_report['picture']}, {map_report['numbers']}")
    print_to("\n".join(lines), sys.stdout)


def _check_map_target(options: argparse.Namespace) -> None:
    """Before any work: the map's folder is there, and no image is in its way."""
    if not options.map.parent.is_dir():
        raise CommandError(f"cannot write {options.map}: its folder does not exist")
    for image in (options.image0, options.image1):
        if options.map.exists() and os.path.exists(image) and options.map.samefile(image):
            raise CommandError(f"the map would overwrite {image}: name another file after --map")


def _measure(model: LPIPS, in0: torch.Tensor, in1: torch.Tensor) -> tuple[float, list[float]]:
    value, per_layer = model(in0, in1, retPerLayer=True)
    distance = float(value)
    if not math.isfinite(distance):
        raise CommandError(f"the distance is {distance}: the trunk's weights must be damaged")
    return distance, [float(layer) for layer in per_layer]


def _draw_map(
    model: LPIPS,
    options: argparse.Namespace,
    in0: torch.Tensor,
    in1: torch.Tensor,
    distance: float,
) -> dict[str, Any]:
    # A second run, for the map's mean is not quite the distance: its layers are enlarged first.
    model.spatial = True
    distance_map = model(in0.to(options.device), in1.to(options.device)).cpu()
    model.spatial = False
    names = (Path(options.image0).name, Path(options.image1).name)
    picture = save_heatmap(
        distance_map,
        options.map,
        title=f"{names[0]}  vs  {names[1]}",
        quantity=distance_name(options),
        label=metric_name(options),
        distance=distance,
        image0=in0,
        image1=in1,
        names=names,
    )
    numbers = save_map_numbers(distance_map, options.map)
    return {
        "picture": str(picture),
        "numbers": str(numbers),
        "mean": float(distance_map.mean()),
        "max": float(distance_map.max()),
    }


def _pair_report(
    options: argparse.Namespace,
    in0: torch.Tensor,
    distance: float,
    layers: list[float],
    map_report: dict[str, Any] | None,
) -> dict[str, Any]:
    height, width = in0.shape[-2:]
    return {
        "distance": distance,
        "layers": layers,
        "layer_names": layer_names(options),
        "metric": "baseline" if options.baseline else "lpips",
        "net": options.net,
        "version": options.version,
        "normalization": options.normalization,
        "trunk": "random" if options.random_trunk else "pretrained",
        "weights": options.weights,
        "images": [
            {"path": path, "width": width, "height": height}
            for path in (options.image0, options.image1)
        ],
        "alpha": options.alpha,
        "map": map_report,
        "device": str(options.device),
        "dtype": options.dtype,
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _rounded(distance: float) -> str:
    # Three decimals as the original prints, but small distances keep three digits.
    return f"{distance:.3f}" if distance == 0 or abs(distance) >= 0.1 else f"{distance:.3g}"


COMMAND = Command("print the distance between two images", _add_pair_arguments, _run_pair)
