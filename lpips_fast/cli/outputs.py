"""Where a command writes: checked before any work, and never over what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .command import CommandError


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
