"""Where to compute: ``--device``, and moving a model or a tensor there, or saying why not."""

from __future__ import annotations

import argparse
from typing import TypeVar

import torch

from .command import CommandError, sentence

_Movable = TypeVar("_Movable", bound=torch.nn.Module | torch.Tensor)


_A_GPU_IF_THERE_IS_ONE = "auto"


def add_device_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--device``, with one default for all sub-commands but where there is a reason."""
    parser.add_argument(
        "--device",
        type=device,
        # A text: argparse asks `device` what it is, and only where the option is not given.
        default=default or _A_GPU_IF_THERE_IS_ONE,
        metavar="DEVICE",
        help="where to compute: cpu, cuda, cuda:1 … "
        f"(default: {default or 'a GPU if there is one'})",
    )


def device(text: str) -> torch.device:
    """The device of that name, of an argument."""
    if text == _A_GPU_IF_THERE_IS_ONE:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: try cpu or cuda") from error


def to_device(what: _Movable, device: torch.device) -> _Movable:
    try:
        return what.to(device)  # type: ignore[return-value]
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(
            f"the device {str(device)!r} cannot be used here with torch {torch.__version__}: "
            f"{sentence(RuntimeError(str(error)))}"
        ) from error
