"""``lpips-fast pairwise DIR [DIR]``: every image of a folder with every other, or of two."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from ..folders import csv_text
from ..folders.folder_images import FolderImages, Reading
from ..folders.ranks import Ranks
from ..images.heatmap import drawable
from ..pairs.all_pairs import (
    DEFAULT_MEMORY_LIMIT,
    mean_diversity,
    pairwise,
    plan,
    serve_pairwise,
)
from ..pairs.embedding import euclidean_weights
from ..pairs.trunk_share import TrunkShare
from ..version import __version__
from ..weights.whole_files import appearing
from .command import Command, CommandError, UsageError, add_json_argument, print_to, tell
from .image_files import add_image_arguments, preprocessing
from .model import (
    add_model_arguments,
    distance_name,
    layer_names,
    load_model,
    metric_name,
    weights_text,
)
from .outputs import check_output
from .progress import open_ended

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..lpips import LPIPS

_MATRIX_SUFFIXES = (".npy", ".csv")
# One part in so many of the memory keeps decoded images.
_CACHE_SHARE = 8
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder of images, all of one size")
    parser.add_argument(
        "other", metavar="DIR", nargs="?", help="another: all of the first with all of this one"
    )
    add_model_arguments(parser)
    parser.add_argument("--recursive", action="store_true", help="look into their folders too")
    add_image_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=_matrix_path,
        metavar="OUT",
        help="write the matrix: OUT.csv with file names in it, or OUT.npy; beside it OUT.json says "
        "how it was made, and OUT.png shows it",
    )
    parser.add_argument("--no-picture", action="store_true", help="do not draw the matrix")
    add_memory_argument(parser)
    parser.add_argument(
        "--plan", action="store_true", help="say what would be held and computed, and end there"
    )
    add_json_argument(parser)


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-limit",
        type=_bytes,
        default=DEFAULT_MEMORY_LIMIT,
        metavar="SIZE",
        help="memory to take beside the model, for example 8G (default: 4G); less takes longer",
    )


def _matrix_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _MATRIX_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .npy or .csv")
    return path


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: try 8G or 512M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _run(options: argparse.Namespace) -> None:
    with Ranks() as ranks:
        options.device = ranks.device(options.device)
        if ranks.rank > 0:
            _help(options, ranks)
        else:
            _lead(options, ranks)


def _help(options: argparse.Namespace, ranks: Ranks) -> None:
    """Another process: part of the trunk passes, of the images that rank 0 found readable."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # rank 0 speaks
        found: tuple[FolderImages, FolderImages | None, int] | None = ranks.broadcast(None)
        if found is None:  # rank 0 has said why, or needs no help
            return
        rows, columns, limit = found
        serve_pairwise(
            load_model(options),
            rows,
            columns,
            share=TrunkShare(ranks.rank, ranks.size),
            memory_limit=limit,
        )


def _lead(options: argparse.Namespace, ranks: Ranks) -> None:
    with _told_at_last(ranks) as tell_all:
        _compare(options, ranks, tell_all)


@contextlib.contextmanager
def _told_at_last(ranks: Ranks) -> Iterator[Callable[[Any], None]]:
    """Broadcasts once: what it is called with, or nothing where it is not called, for an error."""
    is_told = False

    def tell_all(value: Any) -> None:
        nonlocal is_told
        is_told = True
        ranks.broadcast(value)

    try:
        yield tell_all
    finally:
        if not is_told:
            ranks.broadcast(None)


def _compare(options: argparse.Namespace, ranks: Ranks, tell_all: Callable[[Any], None]) -> None:
    _check_targets(options)
    rows = read_folder(options.folder, options)
    columns = None if options.other is None else read_folder(options.other, options)
    if columns is None and len(rows) < 2:
        count = f"{len(rows)} readable image{'' if len(rows) == 1 else 's'}"
        raise CommandError(f"{options.folder} holds {count}, and at least 2 are needed")
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options)
        check_comparable(options, model, rows, columns)
        limit = memory_left(options, rows, columns)
        others = None if columns is None else len(columns)
        scheme = plan(model, len(rows), rows.size, others, memory_limit=limit)
        if not options.plan:
            share = None
            if ranks.size > 1:
                share = TrunkShare(0, ranks.size)
                tell_all((rows.without_pixels(), columns and columns.without_pixels(), limit))
            with open_ended(scheme.trunk_passes, "images", "comparing") as advance:
                matrix = pairwise(
                    model, rows, columns, memory_limit=limit, progress=advance, share=share
                ).cpu()
            if not bool(torch.isfinite(matrix).all()):
                raise CommandError("some distances are NaN: the trunk's weights must be damaged")
    if options.plan:
        print_to(str(scheme), sys.stdout)
        return

    report = _report(options, model, rows, columns, matrix)
    if options.output:
        _write_matrix(options, rows, columns or rows, matrix.numpy(), report)
    if options.json:
        print_to(json.dumps(report, indent=2, allow_nan=False), sys.stdout)
    else:
        print_to(_words(options, rows, columns, report), sys.stdout)
    refuse_unreadable(rows, columns)


def read_folder(folder: str, options: argparse.Namespace) -> FolderImages:
    """The images of a folder, of which those that cannot be read are told."""
    if Path(folder).is_file():
        raise UsageError(f"{folder} is a file: two images are compared by lpips-fast pair A B")
    with contextlib.ExitStack() as stack:
        images = FolderImages.read(
            folder,
            Reading(options.alpha, options.max_pixels, preprocessing(options)),
            recursive=options.recursive,
            memory=options.memory_limit // _CACHE_SHARE,
            started=lambda count: stack.enter_context(open_ended(count, "images", "reading")),
        )
    others = len(images.listing.others)
    if others:
        tell("note", f"{others} files of {folder} are no images by their names")
    for reason in images.listing.not_listed:
        tell("warning", f"cannot look into {reason}")
    for message in images.unreadable.values():
        tell("warning", f"{message}; it is left out")
    return images


def refuse_unreadable(*folders: FolderImages | None) -> None:
    """At the end: what could not be read is not part of the result."""
    known = [images for images in folders if images is not None]
    lost = sum(len(images.unreadable) for images in known)
    if lost:
        count = lost + sum(map(len, known))
        raise CommandError(
            f"{lost} of {count} images could not be read and {'is' if lost == 1 else 'are'} "
            "not part of the result"
        )


def check_comparable(
    options: argparse.Namespace, model: LPIPS, rows: FolderImages, columns: FolderImages | None
) -> None:
    """Before any work, and before a plan: is there a matrix to be had."""
    euclidean_weights(model)
    for images in (rows, rows if columns is None else columns):
        size = f"{images.size[1]}x{images.size[0]}"
        if not len(images):
            raise CommandError(f"{images.folder} holds no readable image")
        if min(images.size) < model.minimum_size:
            raise CommandError(
                f"the images of {images.folder} have {size} pixels, and trunk {options.net!r} "
                f"needs at least {model.minimum_size}x{model.minimum_size}; --resize enlarges them"
            )
        if images.size != rows.size:
            raise CommandError(
                f"the images of {rows.folder} have {rows.size[1]}x{rows.size[0]} pixels and those "
                f"of {images.folder} {size}; --resize or --crop brings them to one size"
            )


def memory_left(
    options: argparse.Namespace, rows: FolderImages, columns: FolderImages | None
) -> int:
    """What decoded images leave of the memory."""
    taken = rows.nbytes() + (0 if columns is None else columns.nbytes())
    left: int = options.memory_limit - taken
    return left


def _check_targets(options: argparse.Namespace) -> None:
    """Before any work: where the output goes can be written to, and is not among the images."""
    if not options.output:
        return
    for target in _targets(options):
        check_output(target, [options.checkpoint] if options.checkpoint else [])
    if options.no_picture:
        return
    parent = options.output.parent.resolve()
    for folder in (options.folder, options.other):
        if folder is None:
            continue
        root = Path(folder).resolve()
        if parent == root or (options.recursive and parent.is_relative_to(root)):
            raise CommandError(
                f"the picture {_picture_path(options)} would be among the images of {folder}: "
                "name another folder after --output, or pass --no-picture"
            )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'drawing the matrix needs Matplotlib: pip install "lpips-fast[plots]", '
            "or pass --no-picture"
        ) from error


def _targets(options: argparse.Namespace) -> list[Path]:
    output: Path = options.output
    picture = [] if options.no_picture else [_picture_path(options)]
    return [output, output.with_suffix(".json"), *picture]


def _picture_path(options: argparse.Namespace) -> Path:
    output: Path = options.output
    return output.with_suffix(".png")


# ---------------------------------------------------------------------------------- the result


def _report(
    options: argparse.Namespace,
    model: LPIPS,
    rows: FolderImages,
    columns: FolderImages | None,
    matrix: torch.Tensor,
) -> dict[str, Any]:
    if columns is None:
        mean, error = mean_diversity(matrix)
        pairs = len(rows) * (len(rows) - 1) // 2
        apart = matrix.clone().fill_diagonal_(math.inf)
    else:
        # Rows and columns share images: no simple standard error is right.
        mean, error = float(matrix.double().mean()), math.nan
        pairs = matrix.numel()
        apart = matrix
    i, j = divmod(int(apart.argmin()), matrix.shape[1])
    others = rows if columns is None else columns
    return {
        "mean": mean,
        "standard_error": None if math.isnan(error) else error,
        "images": len(rows),
        **({} if columns is None else {"others": len(columns)}),
        "pairs": pairs,
        "closest": {"names": [rows.names[i], others.names[j]], "distance": float(matrix[i, j])},
        "metric": "baseline" if options.baseline else "lpips",
        "net": options.net,
        "version": options.version,
        "normalization": options.normalization,
        "trunk": "random" if options.random_trunk else "pretrained",
        "weights": weights_text(options, options.net, model),
        "folder": options.folder,
        **({} if columns is None else {"other_folder": options.other}),
        "width": rows.size[1],
        "height": rows.size[0],
        **preprocessing(options).words,
        "alpha": options.alpha,
        "names": rows.names,
        **({} if columns is None else {"other_names": columns.names}),
        "unreadable": {**rows.unreadable, **(columns.unreadable if columns else {})},
        "matrix": str(options.output) if options.output else None,
        "picture": _picture(options),
        "device": str(options.device),
        "layer_names": layer_names(options),
        "dtype": options.dtype,
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _picture(options: argparse.Namespace) -> str | None:
    return str(_picture_path(options)) if options.output and not options.no_picture else None


def _mean_text(report: dict[str, Any]) -> str:
    error = report["standard_error"]
    return f"{report['mean']:.6f}" + ("" if error is None else f" ± {error:.6f}")


def _words(
    options: argparse.Namespace,
    rows: FolderImages,
    columns: FolderImages | None,
    report: dict[str, Any],
) -> str:
    size = f"{rows.size[1]}x{rows.size[0]}"
    of = f"{options.folder}: {report['images']:,} images of {size}"
    if columns is not None:
        of += f", with {options.other}: {len(columns):,}"
    lines = [
        f"Mean distance: {_mean_text(report)}",
        f"  {of}, {report['pairs']:,} pairs",
        f"  {metric_name(options)}, {options.device}",
        f"  closest: {report['closest']['names'][0]}  and  {report['closest']['names'][1]}, "
        f"{report['closest']['distance']:.6f}",
    ]
    if report["standard_error"] is not None:
        lines.insert(1, "  (± standard error, by the jackknife over images)")
    if options.output:
        lines.append(f"  written: {', '.join(map(str, _targets(options)))}")
    return "\n".join(lines)


def _write_matrix(
    options: argparse.Namespace,
    rows: FolderImages,
    columns: FolderImages,
    matrix: NDArray[np.floating[Any]],
    report: dict[str, Any],
) -> None:
    with replacing(options.output) as file:
        if options.output.suffix.lower() == ".csv":
            file.write(_csv_text(rows.names, columns.names, matrix))
        else:
            np.save(file, matrix)
    with replacing(options.output.with_suffix(".json")) as file:
        file.write(json.dumps(report, indent=2, allow_nan=False).encode())
    if not options.no_picture:
        with replacing(_picture_path(options)) as file:
            _draw(options, rows, columns, matrix, report, file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is complete: a full disk leaves no half of it."""
    try:
        with appearing(path) as file:
            yield file
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error


def _csv_text(rows: list[str], columns: list[str], matrix: NDArray[np.floating[Any]]) -> bytes:
    """A header row with the names of the columns' images, and a row for each of the others."""
    # So many digits give float32, or float64, back to the bit.
    digits = 17 if matrix.dtype == np.float64 else 9
    lines = [csv_text.line(["name", *map(csv_text.disarmed, columns)])]
    for name, numbers in zip(rows, matrix.tolist()):
        cells = [csv_text.disarmed(name), *(f"{number:.{digits}g}" for number in numbers)]
        lines.append(csv_text.line(cells))
    return "".join(lines).encode("utf-8")


# ---------------------------------------------------------------------------------- the picture

_NAMES_UP_TO = 40  # images; with more, names cannot be read
_NUMBERS_UP_TO = 12
_DPI = 150


def _draw(
    options: argparse.Namespace,
    rows: FolderImages,
    columns: FolderImages,
    matrix: NDArray[np.floating[Any]],
    report: dict[str, Any],
    file: BinaryIO,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = len(columns), len(rows)  # across, down
    named, numbered = max(counts) <= _NAMES_UP_TO, max(counts) <= _NUMBERS_UP_TO
    width, height = (
        max(3.6, 0.52 * count) if numbered else max(6.2, 0.21 * count) if named else 7.0
        for count in counts
    )
    figure = Figure(figsize=(width + 3.0, height + 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Images that are alike are dark. The diagonal of one folder is 0 and says nothing of the scale.
    picture = axes.imshow(
        matrix, cmap="magma", vmin=0, vmax=max(float(matrix.max()), 1e-12), aspect="auto"
    )
    bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(distance_name(options), fontsize=10)
    bar.ax.tick_params(labelsize=9)
    if named:
        # File names hold dollar signs; parse_math=False keeps them from being read as formulas.
        across, down = (list(map(_shortened, images.names)) for images in (columns, rows))
        axes.set_xticks(range(counts[0]), across, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(counts[1]), down, fontsize=8, parse_math=False)
    else:
        axes.set_xlabel("image, in the order of the names", fontsize=9)
        axes.set_ylabel("image", fontsize=9)
    if numbered:
        bright = 0.6 * float(matrix.max())
        for i, j in np.ndindex(*matrix.shape):
            value = float(matrix[i, j])
            axes.text(
                *(j, i, f"{value:.6f}" if value else "0"),
                ha="center",
                va="center",
                fontsize=6,
                color="black" if value > bright else "white",
            )
    compared = f"{len(rows):,}" if options.other is None else f"{len(rows):,} by {len(columns):,}"
    figure.suptitle(
        f"Mean distance {_mean_text(report)} of {compared} images\n{metric_name(options)}",
        fontsize=11,
        parse_math=False,
    )
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white")


def _shortened(name: str) -> str:
    name = drawable(name)
    # The end of a path tells more than its start.
    return name if len(name) <= 24 else "…" + name[-23:]


COMMAND = Command(
    "compare all images of a folder with each other, or with another's", _add_arguments, _run
)
