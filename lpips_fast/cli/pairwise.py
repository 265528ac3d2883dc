"""``lpips-fast pairwise DIR``: every image of a folder with every other, and their diversity."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from ..folders.pairing import list_images
from ..images.reading import ImageError, image_to_tensor, read_image_uint8
from ..pairs.all_pairs import DEFAULT_MEMORY_LIMIT, mean_diversity, pairwise, plan
from ..pairs.embedding import euclidean_weights
from ..version import __version__
from .command import PROGRAM, Command, CommandError, add_json_argument, print_to, tell
from .image_files import add_alpha_argument
from .model import add_model_arguments, distance_name, layer_names, load_model, metric_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MATRIX_SUFFIXES = (".npy", ".csv")
# One part in so many of the memory keeps decoded images.
_CACHE_SHARE = 8
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder of images, all of one size")
    add_model_arguments(parser)
    parser.add_argument("--recursive", action="store_true", help="look into its folders too")
    add_alpha_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=_matrix_path,
        metavar="OUT",
        help="write the matrix: OUT.csv with file names in it, or OUT.npy with OUT.json beside it; "
        "and draw it as OUT.png",
    )
    parser.add_argument("--no-picture", action="store_true", help="do not draw the matrix")
    parser.add_argument(
        "--memory-limit",
        type=_bytes,
        default=DEFAULT_MEMORY_LIMIT,
        metavar="SIZE",
        help="memory to take beside the model, for example 8G (default: 4G); less takes longer",
    )
    parser.add_argument(
        "--plan", action="store_true", help="say what would be held and computed, and end there"
    )
    add_json_argument(parser)


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
    _check_targets(options)
    names = _list(options)
    images = _Images.read(options, names)
    if len(images) < 2:
        count = f"{len(images)} readable image{'' if len(images) == 1 else 's'}"
        raise CommandError(f"{options.folder} holds {count}, and at least 2 are needed")
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options)
        euclidean_weights(model)  # before any work, and before a plan: is there a matrix to be had
        if min(images.size) < model.minimum_size:
            raise CommandError(
                f"the images of {options.folder} have {images.size[1]}x{images.size[0]} pixels, "
                f"and trunk {options.net!r} needs at least {model.minimum_size}x"
                f"{model.minimum_size}; resize or pad them"
            )
        limit = options.memory_limit - images.nbytes()
        scheme = plan(model, len(images), images.size, memory_limit=limit)
        if not options.plan:
            with _bar("comparing", scheme.trunk_passes) as advance:
                matrix = pairwise(model, images, memory_limit=limit, progress=advance).cpu()
            if not bool(torch.isfinite(matrix).all()):
                raise CommandError("some distances are NaN: the trunk's weights must be damaged")
    if options.plan:
        print_to(str(scheme), sys.stdout)
        return

    report = _report(options, images, matrix)
    if options.output:
        _write_matrix(options, images, matrix.numpy(), report)
    if options.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_to(_words(options, images, report), sys.stdout)
    if images.unreadable:
        lost = len(images.unreadable)
        raise CommandError(
            f"{lost} of {len(names)} images could not be read and {'is' if lost == 1 else 'are'} "
            "not part of the result"
        )


def _check_targets(options: argparse.Namespace) -> None:
    """Before any work: where the output goes can be written to, and is not among the images."""
    if not options.output:
        return
    parent = options.output.parent
    if not parent.is_dir():
        raise CommandError(f"cannot write {options.output}: its folder does not exist")
    if options.no_picture:
        return
    parent, folder = parent.resolve(), Path(options.folder).resolve()
    if parent == folder or (options.recursive and parent.is_relative_to(folder)):
        raise CommandError(
            f"the picture {_picture_path(options)} would be among the images of {options.folder}: "
            "name another folder after --output, or pass --no-picture"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'drawing the matrix needs Matplotlib: pip install "lpips-fast[plots]", '
            "or pass --no-picture"
        ) from error


def _picture_path(options: argparse.Namespace) -> Path:
    output: Path = options.output
    return output.with_suffix(".png")


def _list(options: argparse.Namespace) -> list[str]:
    names = list_images(options.folder, recursive=options.recursive)
    if not options.recursive:
        files = [p for p in Path(options.folder).iterdir() if p.is_file() and p.name[0] != "."]
        others = len(files) - len(names)
        if others > 0:
            tell("note", f"{others} files of {options.folder} are no images by their names")
    return names


# ---------------------------------------------------------------------------------- the images


@dataclass
class _Images(Sequence[torch.Tensor]):
    """The readable images of a folder; decoded once as long as memory allows, else when needed."""

    folder: Path
    alpha: Any
    names: list[str]
    size: tuple[int, int]
    decoded: dict[str, NDArray[np.uint8]]
    unreadable: dict[str, str]

    @classmethod
    def read(cls, options: argparse.Namespace, names: list[str]) -> _Images:
        """Read every image once, which finds the damaged ones before the work begins."""
        folder = Path(options.folder)
        room = options.memory_limit // _CACHE_SHARE
        decoded: dict[str, NDArray[np.uint8]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        unreadable: dict[str, str] = {}

        def read(name: str) -> NDArray[np.uint8] | str:
            try:
                return read_image_uint8(folder / name, alpha=options.alpha)
            except ImageError as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool, _bar("reading", len(names)) as advance:
            for name, image in zip(names, _in_order(pool, read, names)):
                advance(1)
                if isinstance(image, str):
                    unreadable[name] = image
                    continue
                sizes[name] = (image.shape[0], image.shape[1])
                if image.nbytes <= room:
                    decoded[name] = image
                    room -= image.nbytes
        for message in unreadable.values():
            tell("warning", f"{message}; it is left out")
        size = _common_size(folder, sizes)
        return cls(folder, options.alpha, list(sizes), size, decoded, unreadable)

    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.decoded.values())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: Any) -> Any:
        name = self.names[position]
        image = self.decoded.get(name)
        if image is None:
            image = read_image_uint8(self.folder / name, alpha=self.alpha)
        return image_to_tensor(image)


def _in_order(
    pool: ThreadPoolExecutor,
    read: Callable[[str], NDArray[np.uint8] | str],
    names: list[str],
) -> Iterator[NDArray[np.uint8] | str]:
    """What ``pool.map`` yields, but some images ahead instead of all: memory stays bounded."""
    ahead = 2 * (os.cpu_count() or 1)
    pending = [pool.submit(read, name) for name in names[:ahead]]
    for position in range(len(names)):
        result = pending.pop(0).result()
        if position + ahead < len(names):
            pending.append(pool.submit(read, names[position + ahead]))
        yield result


def _common_size(folder: Path, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    first: dict[tuple[int, int], str] = {}
    for name, size in sizes.items():
        first.setdefault(size, name)
    if len(first) > 1:
        some = ", ".join(f"{name} is {size[1]}x{size[0]}" for size, name in list(first.items())[:3])
        raise CommandError(
            f"the images of {folder} have {len(first)} different sizes ({some} pixels): "
            "resize or crop them to one size first"
        )
    return next(iter(first), (0, 0))


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    # On standard error, and only where somebody looks at it.
    with tqdm(total=total, desc=what, unit=" images", file=sys.stderr, disable=None) as bar:

        def advance(count: int) -> None:
            if not bar.disable:
                bar.total = max(bar.total, bar.n + count)  # near pairs are computed again
            bar.update(count)

        yield advance


# ---------------------------------------------------------------------------------- the result


def _report(options: argparse.Namespace, images: _Images, matrix: torch.Tensor) -> dict[str, Any]:
    mean, error = mean_diversity(matrix)
    count = len(images)
    apart = matrix.clone().fill_diagonal_(math.inf)
    i, j = divmod(int(apart.argmin()), count)
    return {
        "mean": mean,
        "standard_error": None if math.isnan(error) else error,
        "images": count,
        "pairs": count * (count - 1) // 2,
        "closest": {"names": [images.names[i], images.names[j]], "distance": float(matrix[i, j])},
        "metric": "baseline" if options.baseline else "lpips",
        "net": options.net,
        "version": options.version,
        "trunk": "random" if options.random_trunk else "pretrained",
        "weights": options.weights,
        "folder": options.folder,
        "width": images.size[1],
        "height": images.size[0],
        "alpha": options.alpha,
        "names": images.names,
        "unreadable": images.unreadable,
        "matrix": str(options.output) if options.output else None,
        "picture": _picture(options),
        "device": str(options.device),
        "layer_names": layer_names(options),
        "dtype": options.dtype,
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _names_path(options: argparse.Namespace) -> Path | None:
    """Where the names go that a .npy file has no place for."""
    output: Path = options.output
    return output.with_suffix(".json") if output.suffix.lower() == ".npy" else None


def _picture(options: argparse.Namespace) -> str | None:
    return str(_picture_path(options)) if options.output and not options.no_picture else None


def _mean_text(report: dict[str, Any]) -> str:
    error = report["standard_error"]
    return f"{report['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _words(options: argparse.Namespace, images: _Images, report: dict[str, Any]) -> str:
    lines = [
        f"Mean distance: {_mean_text(report)}",
        f"  {options.folder}: {report['images']:,} images of {images.size[1]}x{images.size[0]}, "
        f"{report['pairs']:,} pairs",
        f"  {metric_name(options)}, {options.device}",
        f"  closest: {report['closest']['names'][0]}  and  {report['closest']['names'][1]}, "
        f"{report['closest']['distance']:.4g}",
    ]
    if report["standard_error"] is not None:
        lines.insert(1, "  (± standard error, by the jackknife over images)")
    if options.output:
        written = [report["matrix"], _names_path(options), report["picture"]]
        lines.append(f"  written: {', '.join(str(path) for path in written if path)}")
    return "\n".join(lines)


def _write_matrix(
    options: argparse.Namespace,
    images: _Images,
    matrix: NDArray[np.floating[Any]],
    report: dict[str, Any],
) -> None:
    names_path = _names_path(options)
    with _replacing(options.output) as file:
        if names_path is None:
            file.write(_csv_text(options, images, matrix, report))
        else:
            np.save(file, matrix)
    if names_path is not None:
        with _replacing(names_path) as file:
            file.write(json.dumps(report, indent=2, allow_nan=False).encode())
    if not options.no_picture:
        with _replacing(_picture_path(options)) as file:
            _draw(options, images, matrix, report, file)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is complete: a full disk leaves no half of it."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _csv_text(
    options: argparse.Namespace,
    images: _Images,
    matrix: NDArray[np.floating[Any]],
    report: dict[str, Any],
) -> bytes:
    error = report["standard_error"]
    facts = {
        PROGRAM: __version__,
        "metric": metric_name(options),
        "dtype": report["dtype"],
        "image size": f"{images.size[1]}x{images.size[0]}",
        "alpha": options.alpha,
        "images": len(images),
        "images that could not be read": len(images.unreadable),
        "mean of different images": f"{report['mean']:.8f}",
        "standard error": "none" if error is None else f"{error:.8f}",
    }
    lines = [f"# {key}: {value}" for key, value in facts.items()]
    lines.append(",".join(["name", *map(_quoted, images.names)]))
    # So many digits give float32, or float64, back to the bit.
    digits = 17 if matrix.dtype == np.float64 else 9
    for name, row in zip(images.names, matrix.tolist()):
        lines.append(",".join([_quoted(name), *(f"{value:.{digits}g}" for value in row)]))
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _quoted(name: str) -> str:
    # Quoted whatever it holds: to readers that know comments, a bare # would begin one.
    return '"' + name.replace('"', '""') + '"'


# ---------------------------------------------------------------------------------- the picture

_NAMES_UP_TO = 40  # images; with more, names cannot be read
_NUMBERS_UP_TO = 12
_DPI = 150


def _draw(
    options: argparse.Namespace,
    images: _Images,
    matrix: NDArray[np.floating[Any]],
    report: dict[str, Any],
    file: BinaryIO,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(images)
    named, numbered = count <= _NAMES_UP_TO, count <= _NUMBERS_UP_TO
    side = max(3.6, 0.52 * count) if numbered else max(6.2, 0.21 * count) if named else 7.0
    figure = Figure(figsize=(side + 3.0, side + 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Images that are alike are dark. The diagonal is 0 and says nothing of the scale.
    picture = axes.imshow(matrix, cmap="magma", vmin=0, vmax=max(float(matrix.max()), 1e-12))
    bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(distance_name(options), fontsize=10)
    bar.ax.tick_params(labelsize=9)
    if named:
        labels = [_shortened(name) for name in images.names]
        # File names hold dollar signs; parse_math=False keeps them from being read as formulas.
        axes.set_xticks(range(count), labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), labels, fontsize=8, parse_math=False)
    else:
        axes.set_xlabel("image, in the order of the names", fontsize=9)
        axes.set_ylabel("image", fontsize=9)
    if numbered:
        bright = 0.6 * float(matrix.max())
        for i, j in np.ndindex(count, count):
            value = float(matrix[i, j])
            axes.text(
                *(j, i, f"{value:.2f}" if value else "0"),
                ha="center",
                va="center",
                fontsize=7.5,
                color="black" if value > bright else "white",
            )
    figure.suptitle(
        f"Mean distance {_mean_text(report)} of {count:,} images\n{metric_name(options)}",
        fontsize=11,
        parse_math=False,
    )
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white")


def _shortened(name: str) -> str:
    # The end of a path tells more than its start.
    return name if len(name) <= 24 else "…" + name[-23:]


COMMAND = Command("compare all images of a folder with each other", _add_arguments, _run)
