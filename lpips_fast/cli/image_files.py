"""The argument of every sub-command that reads images which may be transparent."""

from __future__ import annotations

import argparse
from typing import get_args

from ..images import Alpha


def add_alpha_argument(parser: argparse.ArgumentParser) -> None:
    """``--alpha``, for :func:`lpips_fast.images.read_image`."""
    parser.add_argument(
        "--alpha",
        choices=get_args(Alpha),
        default="white",
        help="transparent images: composite on white (default), ignore alpha, or refuse",
    )
