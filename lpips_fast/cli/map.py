"""``lpips-fast map A B -o OUT.png``: where two images differ, as ``pair --map`` draws it."""

from __future__ import annotations

import argparse

from . import pair
from .command import Command, add_json_argument
from .image_files import add_image_arguments, add_mask_arguments
from .model import add_model_arguments
from .outputs import add_output_argument, settle_output


def _add_map_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="A", help="an image file")
    parser.add_argument("image1", metavar="B", help="another, of the same size")
    text = "the picture, for example OUT.png; its numbers go to OUT.npy"
    add_output_argument(parser, pair.picture_path, "OUT", text)
    add_model_arguments(parser)
    add_image_arguments(parser)
    add_mask_arguments(parser)
    add_json_argument(parser)
    parser.set_defaults(per_layer=False, metrics=("lpips",))


def _run_map(options: argparse.Namespace) -> None:
    settle_output(options)
    options.map = options.output
    pair.COMMAND.run(options)


COMMAND = Command("draw where two images differ", _add_map_arguments, _run_map)
