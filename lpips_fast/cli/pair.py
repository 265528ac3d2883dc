"""``lpips-fast pair A B``: the distance between two images, and where they differ."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import fidelity
from ..folders.pairing import told_apart
from ..images.heatmap import PICTURE_SUFFIXES, save_heatmap, save_map_numbers
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, UsageError, add_json_argument, print_to
from .image_files import (
    add_image_arguments,
    add_mask_arguments,
    check_minimum,
    mask_text,
    masking,
    preprocessing,
    read_mask_of,
    read_one_size,
    refuse_folders,
    size_text,
)
from .model import (
    add_model_arguments,
    distance_name,
    layer_names,
    load_model,
    metric_name,
    weights_text,
)
from .outputs import check_output

if TYPE_CHECKING:
    from ..lpips import LPIPS


def _add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="A", help="an image file")
    parser.add_argument("image1", metavar="B", help="another, of the same size")
    add_model_arguments(parser)
    parser.add_argument(
        "--metrics",
        type=argument_types.metrics,
        default=("lpips",),
        metavar="lpips,psnr,ssim",
        help="what to measure (default: lpips)",
    )
    add_image_arguments(parser)
    add_mask_arguments(parser)
    parser.add_argument(
        "--map",
        type=picture_path,
        metavar="OUT",
        help="draw where the images differ, for example OUT.png, and write its numbers to OUT.npy",
    )
    parser.add_argument("--per-layer", action="store_true", help="list the layers' distances too")
    add_json_argument(parser)


def picture_path(text: str) -> Path:
    """A path with the suffix of a picture that can be drawn."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURE_SUFFIXES)}")
    return path


def _run_pair(options: argparse.Namespace) -> None:
    paths = (options.image0, options.image1)
    refuse_folders(paths)
    needs_model = "lpips" in options.metrics
    if not needs_model and (options.map or options.per_layer):
        wrong = "--map" if options.map else "--per-layer"
        raise UsageError(f"{wrong} is of lpips, which is not among --metrics")
    how = masking(options, has_masks=options.mask is not None)
    inputs = [*paths, *([options.mask] if how else [])]
    if options.map:
        for target in (options.map, options.map.with_suffix(".npy")):
            check_output(target, inputs)
    in0, in1 = read_one_size(paths, options)
    if how:
        size = (in0.shape[2], in0.shape[3])
        how["mask"] = read_mask_of(options, size).to(options.device)
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        fidelities = _fidelities(options, in0, in1)
        distance, weights, map_report = None, None, None
        layers: list[float] = []
        if needs_model:
            model = load_model(options)
            check_minimum(model, options.image0, in0, options.net)
            weights = weights_text(options, options.net, model)
            distance, layers = _measure(model, in0.to(options.device), in1.to(options.device), how)
            map_report = _draw_map(model, options, in0, in1, distance, how) if options.map else None

    if options.json:
        report = _pair_report(options, in0, distance, layers, fidelities, weights, map_report)
        if how:
            report["mask"] = {"path": options.mask, "meaning": mask_text(how)}
        print_to(json.dumps(report, indent=2, allow_nan=False), sys.stdout)
        return
    lines = []
    for metric in options.metrics:
        if distance is not None and metric == "lpips":
            lines.append(f"Distance: {_rounded(distance)}")
        else:
            lines.append(f"{metric.upper()}: {_rounded(fidelities[metric])}")
    lines.append(f"  {options.image0}  vs  {options.image1}  ({size_text(in0)})")
    if needs_model:
        lines.append(f"  {metric_name(options)}, {options.device}")
    if how:
        lines.append(f"  mask {options.mask}, {mask_text(how)}")
    if options.per_layer:
        named = zip(layer_names(options), layers, strict=True)
        lines += [f"  {name}: {_rounded(value)}" for name, value in named]
    if map_report:
        lines.append(f"  map: {map_report['picture']}, {map_report['numbers']}")
    print_to("\n".join(lines), sys.stdout)


def _fidelities(
    options: argparse.Namespace, in0: torch.Tensor, in1: torch.Tensor
) -> dict[str, float]:
    """PSNR and SSIM, of what is asked for."""
    # Back to 8-bit values: rounding takes away what the way to [-1, 1] added.
    values = [((image.double() + 1) * 127.5).round() for image in (in0, in1)]
    known = {"psnr": fidelity.psnr, "ssim": fidelity.ssim}
    return {
        name: float(measure(*values, data_range=255))
        for name, measure in known.items()
        if name in options.metrics
    }


def _measure(
    model: LPIPS, in0: torch.Tensor, in1: torch.Tensor, how: dict[str, Any]
) -> tuple[float, list[float]]:
    value, per_layer = model(in0, in1, retPerLayer=True, **how)
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
    how: dict[str, Any],
) -> dict[str, Any]:
    # A second run, for the map's mean is not quite the distance: its layers are enlarged first.
    model.spatial = True
    distance_map = model(in0.to(options.device), in1.to(options.device), **how).cpu()
    model.spatial = False
    names = told_apart([options.image0, options.image1])
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
    distance: float | None,
    layers: list[float],
    fidelities: dict[str, float],
    weights: str | None,
    map_report: dict[str, Any] | None,
) -> dict[str, Any]:
    height, width = in0.shape[-2:]
    return {
        "distance": distance,
        # Of identical images PSNR is infinite, which JSON has no number for.
        **{name: x if math.isfinite(x) else None for name, x in fidelities.items()},
        "layers": layers,
        "layer_names": layer_names(options),
        "metric": "baseline" if options.baseline else "lpips",
        "net": options.net,
        "version": options.version,
        "normalization": options.normalization,
        "trunk": "random" if options.random_trunk else "pretrained",
        "weights": weights,
        "checkpoint": options.checkpoint,
        "images": [
            {"path": path, "width": width, "height": height}
            for path in (options.image0, options.image1)
        ],
        **preprocessing(options).words,
        "alpha": options.alpha,
        "map": map_report,
        "device": str(options.device),
        "dtype": options.dtype,
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _rounded(number: float) -> str:
    """Six decimals, as the mean of a folder; small numbers keep six digits."""
    return f"{number:.6f}" if number == 0 or abs(number) >= 1e-3 else f"{number:.6g}"


COMMAND = Command("print the distance between two images", _add_pair_arguments, _run_pair)
