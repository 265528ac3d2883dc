"""From the text of an argument to its value, or argparse's error that says what was expected."""

from __future__ import annotations

import argparse
import re

import torch


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """Width and height: ``256x192``."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256x256")
    return int(match[1]), int(match[2])


def size_or_side(text: str) -> int | tuple[int, int]:
    """Width and height, or one number for the shorter side."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    try:
        return size(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256x256 or 256") from None


def device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: try cpu or cuda") from error


def layers(text: str) -> tuple[int, ...]:
    """Layers of a trunk, ascending: ``0,1,2``."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} are no layers: try 0 or 0,1,2")
    chosen = tuple(sorted(int(number) for number in numbers))
    if len(set(chosen)) < len(chosen):
        raise argparse.ArgumentTypeError(f"{text!r} names a layer twice")
    return chosen
