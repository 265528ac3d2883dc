"""Where a command writes: checked before any work, and never over what it reads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from .command import CommandError, UsageError, tell


def add_output_argument(
    parser: argparse.ArgumentParser, convert: Callable[[str], Path], metavar: str, text: str
) -> None:
    """``-o``/``--output`` of a sub-command that cannot do without; see :func:`settle_output`.

    It was once the last of the names, and is understood there.
    """
    parser.add_argument(
        "-o", "--output", type=convert, metavar=metavar, help=f"{text} (to be given)"
    )
    parser.add_argument(
        "output_by_place", nargs="?", type=convert, metavar=metavar, help=argparse.SUPPRESS
    )


def settle_output(options: argparse.Namespace) -> None:
    """Put what is written into ``options.output``, wherever it was named.

    Raises:
        UsageError: it is named twice, or not at all.
    """
    by_place = options.output_by_place
    if (options.output is None) == (by_place is None):
        wrong = "is not named" if by_place is None else "is named twice"
        raise UsageError(f"what is written {wrong}: give it once, after -o")
    if by_place is not None:
        tell("note", f"what is written is named after -o now: -o {by_place}")
        options.output = by_place


def check_output(output: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """The folder of an output is there, and the output is none of the inputs, by whatever name.

    Raises:
        CommandError: it is, or the folder is not.
    """
    if not output.parent.is_dir():
        raise CommandError(f"cannot write {output}: its folder does not exist")
    identity = _identity(output)
    if identity is None:
        return
    for path in inputs:
        if _identity(path) == identity:
            raise CommandError(
                f"{output} would overwrite {os.fspath(path)}, which is read: name another file"
            )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Of the file that a path leads to, by links or not; ``None`` if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
