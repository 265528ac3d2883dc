"""Files that appear whole or not at all, and what a killed process left of them."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".lpips_fast.partial"


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes its name `path` when the block ends without an error.

    It lies in the same folder, so that the renaming is atomic, under a name that no two processes
    share. Whoever writes it holds a lock on it, which ends with the process: what a killed one
    left is known by that, and removed here.

    Raises:
        OSError: the folder cannot be made or written to, the disk is full, or something that is
            no regular file has the name, which would be lost: a folder, a pipe, a device.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    partial, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)  # still locked: nobody takes it for abandoned
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def remove_abandoned(path: Path) -> None:
    """Remove what processes that are gone had written of `path`."""
    if fcntl is None:
        return
    for partial in path.parent.glob(f"{path.name}.*{_SUFFIX}"):
        with contextlib.suppress(OSError), open(partial, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where somebody writes it
            os.unlink(partial)


def _create(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_SUFFIX}")
        file = open(partial, "xb")  # noqa: SIM115
        if fcntl is not None:
            # A file system without locks lets all be written, and nothing be cleaned up.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink > 0:
            return partial, file
        file.close()  # taken for abandoned between its making and its lock
