"""Where an export is written: looked at before any work, and never left in halves."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..weights.whole_files import appearing

__all__ = ["ExportError", "check_target", "copy_whole", "folder_in_its_place", "write_whole"]


class ExportError(RuntimeError):
    """A file could not be written, read, or trusted; the message is one sentence."""


def check_target(path: str | os.PathLike[str], suffix: str, *, is_folder: bool = False) -> Path:
    """The path, if a file of that suffix (or a folder) can be written there.

    Raises:
        ValueError: another suffix.
        ExportError: its folder is missing or takes no files, or something else has the name.
    """
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise ValueError(f"cannot write {target}: the file's name must end in {suffix}")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {target}: its folder does not exist")
    if target.exists() and (not target.is_dir() if is_folder else not target.is_file()):
        expected = "a folder" if is_folder else "a regular file"
        raise ExportError(f"cannot write {target}: what has this name is not {expected}")
    with _told(target):
        tempfile.TemporaryFile(dir=target.parent).close()
    return target


def write_whole(target: Path, content: bytes) -> None:
    """Write a file that appears when it is complete; where the name is a link, at its end.

    Raises:
        ExportError: the folder has gone, the disk is full, or whatever else the system says.
    """
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {target}: its folder has gone")
    with _told(target), appearing(Path(os.path.realpath(target))) as file:
        file.write(content)


def copy_whole(source: Path, target: Path) -> None:
    """:func:`write_whole` of what a runtime's own writer left elsewhere."""
    write_whole(target, source.read_bytes())


@contextlib.contextmanager
def folder_in_its_place(target: Path) -> Iterator[Path]:
    """A path for a folder that takes the place of `target` when the block ends without an error.

    Raises:
        ExportError: as :func:`write_whole`.
    """
    with _told(target), tempfile.TemporaryDirectory(dir=target.parent) as beside:
        made = Path(beside) / target.name
        yield made
        if target.exists():
            target.rename(Path(beside) / "before")
        made.rename(target)
        shutil.rmtree(Path(beside) / "before", ignore_errors=True)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
