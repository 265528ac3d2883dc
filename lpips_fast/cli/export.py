"""``lpips-fast export -o OUT``: the model as a file that other runtimes run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from ..export.exporters import FORMATS, Dynamic, check_size, export_model, format_of
from ..folders.pairing import list_images
from ..images.reading import image_to_tensor, read_image_uint8
from ..images.resizing import Preprocessing
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, print_to, tell
from .image_files import add_reading_arguments
from .model import add_model_arguments, load_model, metric_name
from .outputs import add_output_argument, check_output, settle_output

if TYPE_CHECKING:
    from ..export.exporters import Record
    from ..lpips import LPIPS

_INT8_FORMATS = ("onnx", "openvino")

# More would not change the ranges, and reading them takes time.
_CALIBRATION_IMAGES = 128


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    suffixes = ", ".join(f"{kind.suffix} ({name})" for name, kind in FORMATS.items())
    add_output_argument(parser, Path, "OUT", f"the file to write: {suffixes}")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), help="default: what the file's suffix says"
    )
    # The file is the same wherever the model lies; what calibrates and checks it is a few images.
    add_model_arguments(parser, dtype=False, device="cpu")
    parser.add_argument(
        "--size",
        type=argument_types.image_size,
        default=(64, 64),
        metavar="N|WxH",
        help="of the images; with --dynamic all only an example (default: 64)",
    )
    parser.add_argument(
        "--batch",
        type=argument_types.positive,
        default=1,
        metavar="N",
        help="pairs, with --dynamic none (default: 1)",
    )
    parser.add_argument(
        "--dynamic",
        choices=get_args(Dynamic),
        default="all",
        help="what may change from call to call: nothing, the batch, or batch, height and width "
        "(default)",
    )
    parser.add_argument(
        "--unit-range", action="store_true", help="the file takes images in [0, 1], not [-1, 1]"
    )
    parser.add_argument("--spatial", action="store_true", help="distance maps instead of distances")
    parser.add_argument(
        "--check", action="store_true", help="run the file beside the model; fail if they differ"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="E",
        help="largest error that --check allows (default: 1e-5)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="the trunk in 8-bit integers (onnx, openvino); its errors are measured and printed",
    )
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        help=f"images like those to be compared, for --int8; the first {_CALIBRATION_IMAGES} are "
        "read, resized and cropped to --size",
    )
    add_reading_arguments(parser)


def _run_export(options: argparse.Namespace) -> None:
    settle_output(options)
    name = format_of(options.output, options.format)
    if options.int8 and name not in _INT8_FORMATS:
        raise CommandError(
            f"--int8 writes {' and '.join(_INT8_FORMATS)}, not {name}: name another file or format"
        )
    if options.int8 != (options.calibration is not None):
        raise CommandError("--int8 and --calibration FOLDER go together: give both or neither")
    if options.check and name == "coreml":
        raise CommandError("--check cannot run a Core ML package: it runs on Apple devices alone")
    given = [options.checkpoint, options.weights]
    check_output(options.output, [path for path in given if path is not None])
    names = list_images(options.calibration) if options.int8 else []
    if options.int8 and not names:
        raise CommandError(f"{options.calibration} holds no images to calibrate on")
    model = load_model(options)
    model.spatial = options.spatial
    width, height = options.size
    size = check_size(model, (height, width))
    lines = (
        _quantize(model, size, names, options) if options.int8 else _export(model, size, options)
    )
    print_to("\n".join(lines), sys.stdout)


def _export(model: LPIPS, size: tuple[int, int], options: argparse.Namespace) -> list[str]:
    record = export_model(
        model,
        options.output,
        options.format,
        image_size=size,
        batch=options.batch,
        dynamic=options.dynamic,
        normalize=options.unit_range,
    )
    lines = _head(record, options)
    if options.check:
        from ..export.exported import check_exported

        error = check_exported(model, options.output, tolerance=options.tolerance)
        lines.append(f"  checked: at most {error:.2g} from the model")
    return lines


def _quantize(
    model: LPIPS, size: tuple[int, int], names: list[str], options: argparse.Namespace
) -> list[str]:
    from ..export.quantization import quantize

    report = quantize(
        model,
        options.output,
        _calibration_images(names, size, options),
        dynamic=options.dynamic,
        normalize=options.unit_range,
    )
    head = _head(report.record, options)
    return head + [f"  {line}" for line in str(report).splitlines()]


def _calibration_images(
    names: list[str], size: tuple[int, int], options: argparse.Namespace
) -> torch.Tensor:
    if len(names) > _CALIBRATION_IMAGES:
        tell("note", f"calibrating on the first {_CALIBRATION_IMAGES} of {len(names)} images")
    height, width = size
    fitted = Preprocessing(resize=max(size), crop=(width, height))
    images = []
    for name in names[:_CALIBRATION_IMAGES]:
        image = read_image_uint8(
            Path(options.calibration) / name, alpha=options.alpha, max_pixels=options.max_pixels
        )
        if image.shape[:2] != size:
            image = fitted(image)
        images.append(image_to_tensor(image))
    return torch.cat(images)


def _head(record: Record, options: argparse.Namespace) -> list[str]:
    kind = FORMATS[format_of(options.output, options.format)]
    return [
        f"{options.output}: {kind.title}, {_bytes(options.output) / 1e6:.2f} MB",
        f"  {metric_name(options)}, lpips_fast {__version__}",
        f"  {record}",
    ]


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    weights = path.with_suffix(".bin")  # beside OpenVINO's graph
    beside = weights.stat().st_size if path.suffix == ".xml" and weights.exists() else 0
    return path.stat().st_size + beside


COMMAND = Command(
    "write the model for ONNX Runtime, OpenVINO, Core ML, torch",
    _add_export_arguments,
    _run_export,
)
