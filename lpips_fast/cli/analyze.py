"""``lpips-fast analyze REF IMG --report HTML``: what a distance is made of."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..analysis import figures as plots
from ..analysis.parts import (
    ChannelImportance,
    LayerContributions,
    NormalizationTable,
    channel_importance,
    compare_normalizations,
    layer_contributions,
    layer_maps,
    layer_names,
)
from ..folders.pairing import told_apart
from ..folders.summary import number_text
from ..version import __version__
from .command import Command, CommandError, UsageError, add_json_argument, print_to
from .image_files import (
    add_image_arguments,
    check_minimum,
    preprocessing,
    read_one_size,
    refuse_folders,
    size_text,
)
from .model import add_model_arguments, load_model, metric_name, random_trunk_warning, weights_text
from .report import add_report_argument, check_report, how_made, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..lpips import LPIPS

_DPI = 150


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help="an image file")
    parser.add_argument(
        "images", metavar="IMG", nargs="+", help="one or more of the same size, compared with it"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="a folder for the pictures, a file each"
    )
    add_report_argument(parser, "tables, maps of all layers, pictures")
    add_model_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument(
        "--shared-scale",
        action="store_true",
        help="one colour scale for the maps of all layers, instead of one each",
    )
    add_json_argument(parser)


def _run(options: argparse.Namespace) -> None:
    if options.output is None and options.report is None:
        raise UsageError("nothing to write: give --report HTML for a page, -o DIR for pictures")
    refuse_folders((options.reference, *options.images))
    plots.require_matplotlib()
    check_report(options, (options.reference, *options.images))
    _check_targets(options)
    reference, *images = read_one_size((options.reference, *options.images), options)
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        model = load_model(options)
        check_minimum(model, options.reference, reference, options.net)
        device = options.device
        target = model.encode(reference.to(device))
        others = model.encode(torch.cat(images).to(device))
        contributions = layer_contributions(model, target, others)
        for path, distance in zip(options.images, contributions.distances.tolist()):
            if not math.isfinite(distance):
                raise CommandError(
                    f"the distance of {path} is {distance}: the trunk's weights must be damaged"
                )
        table = compare_normalizations(model, [(target, others)])
        importance = channel_importance(model)
        maps = layer_maps(model, target, others)
        drawn = _Analysis(reference, images, contributions, table, importance, maps)
        files = _draw(options, model, drawn) if options.output else []
        if options.report:
            _write_page(options, model, drawn)

    if options.json:
        report = _report(options, reference, contributions, table, importance, files)
        print_to(json.dumps(report, indent=2, allow_nan=False), sys.stdout)
        return
    print_to(_words(options, reference, contributions, table, importance, files), sys.stdout)


def _maps_names(options: argparse.Namespace) -> list[str]:
    count = len(options.images)
    return ["maps.png"] if count == 1 else [f"maps_{k + 1}.png" for k in range(count)]


def _file_names(options: argparse.Namespace) -> list[str]:
    return [
        "activations.png",
        "normalizations.png",
        "layers.png",
        *_maps_names(options),
        "channels.png",
    ]


def _check_targets(options: argparse.Namespace) -> None:
    """Before any work: the folder can be made, and no image is in a picture's way."""
    folder: Path | None = options.output
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file, expected a folder for the pictures")
    if not folder.parent.is_dir():
        raise CommandError(f"cannot make {folder}: its parent folder does not exist")
    for name in _file_names(options):
        path = folder / name
        for image in (options.reference, *options.images):
            if path.exists() and os.path.exists(image) and path.samefile(image):
                raise CommandError(f"a picture would overwrite {image}: name another folder")


@dataclass(frozen=True, eq=False)
class _Analysis:
    """All that was found; images are (1, 3, H, W) on the CPU."""

    reference: torch.Tensor
    images: list[torch.Tensor]
    contributions: LayerContributions
    table: NormalizationTable
    importance: ChannelImportance
    maps: dict[str, torch.Tensor]


def _activations(options: argparse.Namespace, model: LPIPS, reference: torch.Tensor) -> Figure:
    return plots.plot_normalizations(
        model.encode(reference.to(options.device)),
        layers=layer_names(model),
        title=f"Features of {Path(options.reference).name}, trunk {options.net}",
    )


def _draw(options: argparse.Namespace, model: LPIPS, found: _Analysis) -> list[Path]:
    metric = metric_name(options)
    of, *names = told_apart([options.reference, *options.images])
    figures: dict[str, Figure] = {
        "activations.png": _activations(options, model, found.reference),
        "normalizations.png": plots.plot_normalization_table(found.table, names=names),
        "layers.png": plots.plot_layer_contributions(
            found.contributions, names=names, title=metric
        ),
        "channels.png": plots.plot_channel_importance(found.importance, title=metric),
    }
    for k, file in enumerate(_maps_names(options)):
        figures[file] = plots.plot_layer_maps(
            {name: map[k] for name, map in found.maps.items()},
            found.reference,
            found.images[k],
            names=(of, names[k]),
            title=f"{metric}: distance {number_text(float(found.contributions.distances[k]))}",
            shared_scale=options.shared_scale,
        )
    options.output.mkdir(exist_ok=True)
    files = []
    for file in _file_names(options):
        figures[file].savefig(options.output / file, dpi=_DPI, facecolor="white")
        files.append(options.output / file)
    return files


def _write_page(options: argparse.Namespace, model: LPIPS, found: _Analysis) -> None:
    from ..report.of_analysis import page_of_analysis

    names = told_apart([options.reference, *options.images])
    others = ", ".join(names[1:]) if len(names) < 5 else f"{len(names) - 1} images"
    metric = metric_name(options)
    drawings = {
        "Features before and after each normalisation": _activations(
            options, model, found.reference
        ),
        "How distances spread by each normalisation": plots.plot_normalization_table(
            found.table, names=names[1:]
        ),
        "Which channels the weights use": plots.plot_channel_importance(
            found.importance, title=metric
        ),
    }
    page = page_of_analysis(
        found.contributions,
        found.maps,
        found.table,
        found.importance,
        reference=found.reference,
        images=found.images,
        names=names,
        drawings=drawings,
        title=f"{names[0]}  vs  {others}",
        facts=how_made(
            options,
            {
                "lpips-fast": __version__,
                "torch": torch.__version__,
                "metric": metric,
                "weights": weights_text(options, options.net, model),
                "device": str(options.device),
                "size": size_text(found.reference),
                **preprocessing(options).words,
                "alpha": options.alpha,
            },
        ),
        shared_scale=options.shared_scale,
        warning=random_trunk_warning(options),
    )
    write_report(options.report, page)


def _words(
    options: argparse.Namespace,
    reference: torch.Tensor,
    contributions: LayerContributions,
    table: NormalizationTable,
    importance: ChannelImportance,
    files: list[Path],
) -> str:
    lines = [f"{metric_name(options)}, {options.device}"]
    lines.append(f"  {options.reference}  ({size_text(reference)})  against")
    lines += [
        f"  {path}: {distance:.6f}"
        for path, distance in zip(options.images, contributions.distances.tolist())
    ]
    lines += ["", str(contributions), "", str(table)]
    if len(options.images) == 1:
        lines.append("(with more images: deviation and rank correlation)")
    written = [*files, *([options.report] if options.report else [])]
    lines += ["", str(importance), "", "Written:", *(f"  {path}" for path in written)]
    return "\n".join(lines)


def _report(
    options: argparse.Namespace,
    reference: torch.Tensor,
    contributions: LayerContributions,
    table: NormalizationTable,
    importance: ChannelImportance,
    files: list[Path],
) -> dict[str, Any]:
    rows = zip(
        options.images,
        contributions.distances.tolist(),
        contributions.values.tolist(),
        contributions.shares.tolist(),
    )
    return {
        "metric": metric_name(options),
        "reference": options.reference,
        "width": reference.shape[-1],
        "height": reference.shape[-2],
        "alpha": options.alpha,
        "normalization": options.normalization,
        "layer_names": list(contributions.layers),
        "images": [
            {"path": path, "distance": distance, "layers": values, "shares": shares}
            for path, distance, values, shares in rows
        ],
        "normalizations": table.as_dict(),
        "channels": [
            {
                "layer": r.layer,
                "channels": len(r.weights),
                "of_weight_zero": r.unused_channels,
                "effective": r.effective_channels,
                "share_of_weight": r.share,
                "top": [
                    {"channel": channel, "weight": weight, "share": share}
                    for channel, weight, share in r.top
                ],
            }
            for r in importance
        ],
        "pictures": [str(path) for path in files],
        "report": None if options.report is None else str(options.report),
        "device": str(options.device),
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


COMMAND = Command(
    "show what a distance is made of: layers, places, channels",
    _add_arguments,
    _run,
)
