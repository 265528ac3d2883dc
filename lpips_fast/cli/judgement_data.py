"""The arguments of every sub-command that reads human judgements."""

from __future__ import annotations

import argparse
import os

from ..judgements.datasets import PATCH_SIZE


def add_judgement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resize",
        type=_pixels,
        default=PATCH_SIZE,
        metavar="N",
        help=f"resize the shorter side of images to this (default: {PATCH_SIZE}, as the paper); "
        "0 leaves them as they are",
    )
    parser.add_argument(
        "--workers",
        type=_count,
        default=min(8, _cores()),
        metavar="N",
        help="processes that read images (default: one a core, at most 8; 0: this one)",
    )


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pixels(text: str) -> int | None:
    return _count(text) or None


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number
