"""From the text of an argument to its value, or argparse's error that says what was expected."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from ..folders.measures import METRIC_NAMES
from ..folders.pairing import Match, Patterns


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """Width and height: ``256x192``."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256x256")
    return int(match[1]), int(match[2])


def image_size(text: str) -> tuple[int, int]:
    """Width and height of images that are made up; one number for a square."""
    found = size_or_side(text)
    return (found, found) if isinstance(found, int) else found


def size_or_side(text: str) -> int | tuple[int, int]:
    """Width and height, or one number for the shorter side."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    try:
        return size(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256x256 or 256") from None


def fill_value(text: str) -> float:
    """A value of LPIPS's range."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1, black, to 1, white")
    return value


def layers(text: str) -> tuple[int, ...]:
    """Layers of a trunk, ascending: ``0,1,2``."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} are no layers: try 0 or 0,1,2")
    chosen = tuple(sorted(int(number) for number in numbers))
    if len(set(chosen)) < len(chosen):
        raise argparse.ArgumentTypeError(f"{text!r} names a layer twice")
    return chosen


def match(text: str) -> Match | Patterns:
    """``name``, ``stem``, or two patterns as :func:`join_patterns` makes them one argument."""
    if text in ("name", "stem"):
        return text  # type: ignore[return-value]
    patterns = text.split(_BETWEEN_PATTERNS)
    if len(patterns) != 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not name, stem or two patterns such as {{}}_gt.png {{}}_pred.jpg"
        )
    try:
        return Patterns(*patterns)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# No argument of a process can hold it.
_BETWEEN_PATTERNS = "\0"


def join_patterns(arguments: Sequence[str]) -> list[str]:
    """``--match PATTERN PATTERN`` as one argument: argparse does not know one value or two.

    >>> join_patterns(["--match", "{}.png", "{}.jpg", "A"])
    ['--match', '{}.png\\x00{}.jpg', 'A']
    """
    joined = list(arguments)
    for k in range(len(joined) - 3, -1, -1):
        if joined[k] == "--match" and all("{}" in text for text in joined[k + 1 : k + 3]):
            joined[k + 1 : k + 3] = [_BETWEEN_PATTERNS.join(joined[k + 1 : k + 3])]
    return joined


def metrics(text: str) -> tuple[str, ...]:
    """Of ``lpips,psnr,ssim`` some, in the order in which they are written."""
    names = tuple(name.strip().lower() for name in text.split(","))
    unknown = [name for name in names if name not in METRIC_NAMES]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no metrics: choose from {','.join(METRIC_NAMES)}, each once"
        )
    return names


def csv_path(text: str) -> Path | None:
    """A path that ends in ``.csv``; ``None`` for ``-``, standard output."""
    if text == "-":
        return None
    path = Path(text)
    if path.suffix.lower() != ".csv":
        raise argparse.ArgumentTypeError(
            f"{text!r} does not end in .csv, which is what is written; - is standard output, and "
            "the summary as JSON is what --json prints"
        )
    return path
