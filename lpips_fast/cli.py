"""The command line: ``lpips-fast``, also ``python -m lpips_fast``.

A sub-command is an entry in :data:`COMMANDS`: one function that adds its arguments, one that runs
it. A command line that starts with an image is ``pair``; an image that is named like a sub-command
is ``./info``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the work
failed, 2 the command line was wrong. A failure is told in one sentence; ``--debug`` shows where.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from . import __version__
from .heatmap import PICTURE_SUFFIXES, save_heatmap, save_map_numbers
from .images import read_image
from .trunk import trunk_spec
from .weights import WeightsError

if TYPE_CHECKING:
    from .lpips import LPIPS

__all__ = ["COMMANDS", "Command", "CommandError", "main"]

_PROGRAM = "lpips-fast"


class CommandError(Exception):
    """The work cannot be done; the message is one sentence for the user."""


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        summary: one line for the list of sub-commands.
        add_arguments: adds its arguments to its own parser.
        run: does the work and writes the result to standard output.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; ``None``: those of the process.

    Raises:
        SystemExit: by argparse, after ``--help`` (0) and for a wrong command line (2).

    Example:
        >>> main(["pair", "a.png", "b.png", "--net", "vgg"])      # doctest: +SKIP
        Distance: 0.569
        …
        0
    """
    arguments = _name_the_command(sys.argv[1:] if argv is None else list(argv))
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        return 130  # what a shell expects of a program ended by Ctrl-C
    except Exception as error:
        if options.debug:
            raise
        _tell("error", _sentence(error))
        return 1
    return 0


# ------------------------------------------------------------------------------ the parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="LPIPS: how different two images look to people.",
        epilog=f"{_PROGRAM} A.png B.png is short for {_PROGRAM} pair A.png B.png.",
        allow_abbrev=False,
    )
    parser.add_argument("--package-version", action="version", version=f"{_PROGRAM} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        # Without SUPPRESS the sub-parser's default would undo a --debug before the sub-command.
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of a failure",
        )
        command.add_arguments(sub)
    return parser


def _name_the_command(arguments: list[str]) -> list[str]:
    """Put ``pair`` where a command line starts with an image, or with an option of ``pair``."""
    start = 0
    while start < len(arguments) and arguments[start] == "--debug":
        start += 1
    rest = arguments[start:]
    if rest == ["--version"]:  # elsewhere it is LPIPS's version and takes a value
        return ["--package-version"]
    if not rest or rest[0] in COMMANDS or rest[0] in ("-h", "--help", "--package-version"):
        return arguments
    first = rest[0]
    looks_like_a_file = first.startswith("-") or Path(first).suffix or os.path.exists(first)
    if not looks_like_a_file:  # a mistyped sub-command: argparse lists the right ones
        return arguments
    return [*arguments[:start], "pair", *rest]


# ------------------------------------------------------------------------------ messages


def _tell(kind: str, message: str) -> None:
    _print(f"{_PROGRAM}: {kind}: {message}", sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    # A file name may hold what the terminal's encoding, or any encoding, cannot express.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _tell("warning", " ".join(str(message).split()))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, WeightsError):
        return str(error)  # lists the ways to supply them, one a line
    # Torch's messages go on for paragraphs; the first says what happened.
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    if isinstance(error, (CommandError, ValueError, RuntimeError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (this is a bug; --debug shows where)"


# ------------------------------------------------------------------------------ pair


def _add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="A", help="an image file")
    parser.add_argument("image1", metavar="B", help="another, of the same size")
    _add_model_arguments(parser)
    parser.add_argument(
        "--alpha",
        choices=("white", "drop", "refuse"),
        default="white",
        help="transparent images: composite on white (default), ignore alpha, or refuse",
    )
    parser.add_argument(
        "--map",
        type=_picture_path,
        metavar="OUT",
        help="draw where the images differ, for example OUT.png, and write its numbers to OUT.npy",
    )
    parser.add_argument("--per-layer", action="store_true", help="list the layers' distances too")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else"
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for every sub-command that measures with a model; see :func:`_load_model`."""
    parser.add_argument(
        "--net", choices=("alex", "vgg", "squeeze"), default="alex", help="trunk (default: alex)"
    )
    parser.add_argument(
        "--version",
        choices=("0.1", "0.0"),
        default="0.1",
        help="version of LPIPS, not of this package (default: 0.1)",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="unweighted features, no linear layers"
    )
    trunk = parser.add_mutually_exclusive_group()
    trunk.add_argument(
        "--weights", metavar="PATH", help="trunk weights: a file, or a folder that holds one"
    )
    trunk.add_argument(
        "--random-trunk",
        action="store_true",
        help="a random trunk, always the same: for trying things out, its numbers are not LPIPS",
    )
    parser.add_argument(
        "--device", type=_device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1 …"
    )


def _picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURE_SUFFIXES)}")
    return path


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: try cpu or cuda") from error


def _run_pair(options: argparse.Namespace) -> None:
    if options.map:
        _check_map_target(options)
    in0 = read_image(options.image0, alpha=options.alpha)
    in1 = read_image(options.image1, alpha=options.alpha)
    if in0.shape != in1.shape:
        raise CommandError(
            f"the images differ in size: {options.image0} is {_size(in0)} and "
            f"{options.image1} is {_size(in1)} pixels; crop or resize one of them"
        )
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        model = _load_model(options)
        distance, layers = _measure(model, in0.to(options.device), in1.to(options.device))
        map_report = _draw_map(model, options, in0, in1, distance) if options.map else None

    if options.json:
        report = _pair_report(options, in0, distance, layers, map_report)
        print(json.dumps(report, indent=2, allow_nan=False))
        return
    lines = [
        f"Distance: {_rounded(distance)}",
        f"  {options.image0}  vs  {options.image1}  ({_size(in0)})",
        f"  {_metric_name(options)}, {options.device}",
    ]
    if options.per_layer:
        named = zip(_layer_names(options), layers, strict=True)
        lines += [f"  {name}: {_rounded(value)}" for name, value in named]
    if map_report:
        lines.append(f"  map: {map_report['picture']}, {map_report['numbers']}")
    _print("\n".join(lines), sys.stdout)


def _check_map_target(options: argparse.Namespace) -> None:
    """Before any work: the map's folder is there, and no image is in its way."""
    if not options.map.parent.is_dir():
        raise CommandError(f"cannot write {options.map}: its folder does not exist")
    for image in (options.image0, options.image1):
        if options.map.exists() and os.path.exists(image) and options.map.samefile(image):
            raise CommandError(f"the map would overwrite {image}: name another file after --map")


def _load_model(options: argparse.Namespace) -> LPIPS:
    from .lpips import LPIPS

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(
            f"the device {str(options.device)!r} cannot be used here with torch "
            f"{torch.__version__}: {_sentence(RuntimeError(str(error)))}"
        ) from error
    if options.random_trunk:
        _tell("warning", "the trunk is random (--random-trunk): these numbers are not LPIPS")
        torch.manual_seed(0)
    model = LPIPS(
        net=options.net,
        version=options.version,
        lpips=not options.baseline,
        pnet_rand=options.random_trunk,
        weights=options.weights,
        verbose=False,
    )
    return model.to(options.device)


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
        label=_metric_name(options),
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
        "layer_names": _layer_names(options),
        "metric": "baseline" if options.baseline else "lpips",
        "net": options.net,
        "version": options.version,
        "trunk": "random" if options.random_trunk else "pretrained",
        "weights": options.weights,
        "images": [
            {"path": path, "width": width, "height": height}
            for path in (options.image0, options.image1)
        ],
        "alpha": options.alpha,
        "map": map_report,
        "device": str(options.device),
        "dtype": "float32",
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _metric_name(options: argparse.Namespace) -> str:
    metric = "baseline (no linear layers)" if options.baseline else "LPIPS"
    trunk = "random trunk, not LPIPS: " if options.random_trunk else ""
    return f"{trunk}{metric} {options.net}, version {options.version}"


def _layer_names(options: argparse.Namespace) -> list[str]:
    return list(trunk_spec(options.net).taps)


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"


def _rounded(distance: float) -> str:
    # Three decimals as the original prints, but small distances keep three digits.
    return f"{distance:.3f}" if distance == 0 or abs(distance) >= 0.1 else f"{distance:.3g}"


# ------------------------------------------------------------------------------ info


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # it has none


def _run_info(options: argparse.Namespace) -> None:
    from .info import report

    _print(str(report()), sys.stdout)


# ------------------------------------------------------------------------------ the table

#: Every sub-command by name, in the order in which ``--help`` lists them.
COMMANDS: dict[str, Command] = {
    "pair": Command("print the distance between two images", _add_pair_arguments, _run_pair),
    "info": Command(
        "print versions, build and devices, for a bug report", _add_info_arguments, _run_info
    ),
}
