"""``lpips-fast nearest A --gallery B -k 5``: for each image of a folder the nearest of another."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..folders import csv_text
from ..folders.summary import number_text
from ..images.reading import image_to_tensor
from ..pairs.all_pairs import nearest, plan
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, UsageError, add_json_argument, print_to
from .image_files import add_image_arguments, preprocessing, read_pixels
from .model import add_model_arguments, load_model, metric_name, weights_text
from .outputs import check_output
from .pairwise import (
    add_memory_argument,
    check_comparable,
    memory_left,
    read_folder,
    refuse_unreadable,
    replacing,
)
from .progress import open_ended


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "queries", metavar="A", help="a folder of images, or one image, to find neighbours of"
    )
    parser.add_argument(
        "--gallery", required=True, metavar="B", help="the folder in which they are looked for"
    )
    parser.add_argument(
        "-k",
        type=argument_types.positive,
        default=1,
        metavar="K",
        help="how many of the nearest (default: 1)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=argument_types.csv_path,
        metavar="CSV",
        help="write a row for each neighbour: name, rank, neighbour, distance",
    )
    add_model_arguments(parser)
    parser.add_argument("--recursive", action="store_true", help="look into their folders too")
    add_image_arguments(parser)
    add_memory_argument(parser)
    add_json_argument(parser)


def _run(options: argparse.Namespace) -> None:
    if Path(options.gallery).is_file():
        raise UsageError(f"{options.gallery} is a file, expected the folder to look in")
    if options.output is not None:
        check_output(options.output, [options.checkpoint] if options.checkpoint else [])
    is_one = not Path(options.queries).is_dir()
    queries = None if is_one else read_folder(options.queries, options)
    gallery = read_folder(options.gallery, options)
    if options.k > len(gallery):
        raise CommandError(
            f"{options.gallery} holds {len(gallery)} readable images, fewer than -k {options.k}"
        )
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options)
        check_comparable(options, model, gallery, queries)
        images: Any = queries
        if queries is None:
            images = image_to_tensor(read_pixels(options.queries, options))
            size = tuple(images.shape[-2:])
            if size != gallery.size:
                raise CommandError(
                    f"{options.queries} has {size[1]}x{size[0]} pixels and the images of "
                    f"{options.gallery} {gallery.size[1]}x{gallery.size[0]}; --resize or --crop "
                    "brings them to one size"
                )
        limit = memory_left(options, gallery, queries)
        scheme = plan(model, len(images), gallery.size, len(gallery), memory_limit=limit)
        with open_ended(scheme.trunk_passes, "images", "comparing") as advance:
            found = nearest(model, images, gallery, options.k, memory_limit=limit, progress=advance)
    distances, positions = (x.cpu() for x in found)
    if not bool(torch.isfinite(distances).all()):
        raise CommandError("some distances are NaN: the trunk's weights must be damaged")
    names = [Path(options.queries).name] if queries is None else queries.names
    rows = [
        (name, rank, gallery.names[position], distance)
        for name, own, at in zip(names, distances.tolist(), positions.tolist())
        for rank, (distance, position) in enumerate(zip(own, at), start=1)
    ]
    if options.output is not None:
        with replacing(options.output) as file:
            file.write(_csv(rows).encode("utf-8"))
    if options.json:
        report = _report(options, weights_text(options, options.net, model), rows)
        print_to(json.dumps(report, indent=2, allow_nan=False), sys.stdout)
    elif options.output is None:
        print_to(_csv(rows).rstrip("\n"), sys.stdout)
    else:
        print_to(
            f"{len(names)} images, {options.k} nearest of {len(gallery)} each\n"
            f"  {metric_name(options)}, {options.device}\n  {options.output}",
            sys.stdout,
        )
    refuse_unreadable(queries, gallery)


def _csv(rows: list[tuple[str, int, str, float]]) -> str:
    lines = [csv_text.header_text(["name", "rank", "neighbour", "distance"])]
    for name, rank, neighbour, distance in rows:
        cells = [csv_text.disarmed(name), str(rank), csv_text.disarmed(neighbour)]
        lines.append(csv_text.line([*cells, number_text(distance)]))
    return "".join(lines)


def _report(
    options: argparse.Namespace, weights: str, rows: list[tuple[str, int, str, float]]
) -> dict[str, Any]:
    neighbours: dict[str, list[dict[str, Any]]] = {}
    for name, _, neighbour, distance in rows:
        neighbours.setdefault(name, []).append({"name": neighbour, "distance": distance})
    return {
        "neighbours": neighbours,
        "k": options.k,
        "queries": options.queries,
        "gallery": options.gallery,
        "metric": metric_name(options),
        "weights": weights,
        **preprocessing(options).words,
        "alpha": options.alpha,
        "device": str(options.device),
        "output": str(options.output) if options.output else None,
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


COMMAND = Command("find the nearest images of a folder for each of another", _add_arguments, _run)
