"""The arguments of every sub-command that measures with a model, and the model they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from .command import CommandError, sentence, tell

if TYPE_CHECKING:
    from ..lpips import LPIPS


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for every sub-command that measures with a model; see :func:`load_model`."""
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


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: try cpu or cuda") from error


def load_model(options: argparse.Namespace) -> LPIPS:
    from ..lpips import LPIPS

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(
            f"the device {str(options.device)!r} cannot be used here with torch "
            f"{torch.__version__}: {sentence(RuntimeError(str(error)))}"
        ) from error
    if options.random_trunk:
        tell("warning", "the trunk is random (--random-trunk): these numbers are not LPIPS")
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


def metric_name(options: argparse.Namespace) -> str:
    metric = "baseline (no linear layers)" if options.baseline else "LPIPS"
    trunk = "random trunk, not LPIPS: " if options.random_trunk else ""
    return f"{trunk}{metric} {options.net}, version {options.version}"
