"""``lpips-fast map A B OUT.png``: where two images differ. It is ``pair --map`` in fewer words."""

from __future__ import annotations

import argparse

from . import pair
from .command import Command, add_json_argument
from .image_files import add_image_arguments, add_mask_arguments
from .model import add_model_arguments


def _add_map_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="A", help="an image file")
    parser.add_argument("image1", metavar="B", help="another, of the same size")
    parser.add_argument(
        "map",
        metavar="OUT",
        type=pair._picture_path,
        help="the picture, for example OUT.png; its numbers go to OUT.npy",
    )
    add_model_arguments(parser)
    add_image_arguments(parser)
    add_mask_arguments(parser)
    add_json_argument(parser)
    parser.set_defaults(per_layer=False, metrics=("lpips",))


COMMAND = Command("draw where two images differ", _add_map_arguments, pair.COMMAND.run)
