"""The folder of a training run: one run writes to it, and its files are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..weights.whole_files import appearing

try:
    import fcntl
except ImportError:  # Windows, which cannot open folders either
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "TrainingError", "writing"]


class TrainingError(RuntimeError):
    """Training cannot begin or go on; the message says why and what to do."""


class RunFolder:
    """A folder that a run writes to, made if need be; a context manager.

    While it is open it is locked, as far as its file system knows locks.

    Raises:
        TrainingError: it cannot be made or written to, or another run writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Better known now than when the first epoch is over.
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            reason = "it is no folder" if path.exists() and not path.is_dir() else error.strerror
            raise TrainingError(f"cannot write to {path}: {reason or error}") from error
        self._lock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def restore(self) -> None:
        """Before files are written: a folder that was removed meanwhile is made again.

        Nothing is lost by that: every save writes all of the run's files.

        Raises:
            TrainingError: another folder has its name now, which may be another run's.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            now = self.path.stat()
        except OSError as error:
            raise TrainingError(f"cannot write to {self.path}: {error.strerror}") from error
        if self._descriptor < 0:
            return
        ours = os.fstat(self._descriptor)
        if (ours.st_dev, ours.st_ino) == (now.st_dev, now.st_ino):
            return
        if any(self.path.iterdir()):
            raise TrainingError(
                f"{self.path} was replaced by another folder while a run wrote to it: "
                "see what it holds, and begin again in a folder of its own"
            )
        self.close()
        self._lock()

    def _lock(self) -> None:
        if fcntl is None:
            return
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise TrainingError(
                f"another run writes to {self.path}: wait for it to end, or choose another folder"
            ) from error
        except OSError:  # a file system without locks
            self.close()


@contextlib.contextmanager
def writing(path: Path, *, kept: bool = False) -> Iterator[BinaryIO]:
    """A file of a run, which appears when it is complete.

    Args:
        path: where.
        kept: whether the run was saved before, for the message.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        with appearing(path) as file:
            yield file
    except OSError as error:
        rest = "; the run as it was saved before is whole, and can be resumed" if kept else ""
        raise TrainingError(f"cannot write {path}: {error.strerror or error}{rest}") from error
