"""Files as they are on disk: read whole if they are regular, and known again by a fingerprint.

A folder of images holds what people put there: pipes, devices, sockets, loops of links, folders
with a picture's name, files of a terabyte. None of them may make a reader wait or take the memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass

__all__ = ["Fingerprint", "ImageError", "ImageMemoryError", "fingerprint_of", "quoted", "read_file"]

# Both ends of a file are digested, so many bytes of each.
_END = 64 * 1024

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class ImageError(ValueError):
    """An image file could not be read as asked; the message is one sentence that names the file."""


class ImageMemoryError(ImageError, MemoryError):
    """There is not the memory to read this file."""


@dataclass(frozen=True)
class Fingerprint:
    """By which a file is known again: any change of it is a change of one of these.

    But for one: same size, same modification time, other bytes more than 64 KiB from both ends.

    Attributes:
        size: in bytes.
        modified: the time of the last modification, in nanoseconds.
        digest: SHA-256 of the first and the last 64 KiB, of which 128 bits are kept, as text.
    """

    size: int
    modified: int
    digest: str


def read_file(
    path: str | os.PathLike[str],
    *,
    max_bytes: int,
    expected: str = "an image file",
    limit: str = "no image within the limit of pixels needs more than",
) -> tuple[bytes, Fingerprint]:
    """The bytes of a regular file and the fingerprint of these very bytes.

    Args:
        path: the file.
        max_bytes: a larger one is refused before it is read.
        expected, limit: what is read here, and why it is no larger, for messages.

    Raises:
        ImageError: no such file, not a regular file, empty, too large, or unreadable.
    """
    name = quoted(path)
    descriptor = _open_regular(path, name, expected)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if status.st_size > max_bytes:
            raise ImageError(
                f"refusing to read {name}: the file has {status.st_size:,} bytes, and "
                f"{limit} {max_bytes:,}"
            )
        try:
            data = _read(file, status.st_size + 1)
        except OSError as error:
            raise ImageError(f"cannot read {name}: {error.strerror or error}") from error
        except MemoryError as error:
            raise ImageMemoryError(
                f"cannot read {name}: there is no memory for its {status.st_size:,} bytes"
            ) from error
    if not data:
        raise ImageError(f"cannot read {name}: the file is empty")
    digest = _digest(data[:_END], data[-_END:])
    return data, Fingerprint(len(data), status.st_mtime_ns, digest)


def fingerprint_of(path: str | os.PathLike[str]) -> Fingerprint | None:
    """The fingerprint of a regular file that can be read, else ``None``; at most 128 KiB are read.

    >>> fingerprint_of("/no/such/file") is None
    True
    """
    try:
        descriptor = _open_regular(path, "")
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            first = _read(file, _END)
            file.seek(max(0, status.st_size - _END))
            last = _read(file, _END)
    except (ImageError, OSError):
        return None
    return Fingerprint(status.st_size, status.st_mtime_ns, _digest(first, last))


def quoted(path: str | os.PathLike[str]) -> str:
    """A path in a message: a name on disk need not be valid text, a message has to be."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return f"'{text}'"


def _open_regular(path: str | os.PathLike[str], name: str, expected: str = "a file") -> int:
    # Without O_NONBLOCK, opening a pipe waits for somebody to write to it. What is opened is looked
    # at, not the path: between the two another file might take its place.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOCTTY", 0)
    try:
        if os.path.isdir(path):  # which Windows cannot open
            raise IsADirectoryError
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        reason = "no such file, only a link to one" if os.path.islink(path) else "no such file"
        raise ImageError(f"cannot read {name}: {reason}") from error
    except IsADirectoryError as error:
        raise ImageError(f"cannot read {name}: it is a folder, expected {expected}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        kind = _kind_at(path)
        reason = f"it is {kind}, expected {expected}" if kind else _reason(error)
        raise ImageError(f"cannot read {name}: {reason}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = _kind(status.st_mode) or "no regular file"
        raise ImageError(f"cannot read {name}: it is {kind}, expected {expected}")
    return descriptor


def _kind_at(path: str | os.PathLike[str]) -> str:
    """Of what cannot even be opened, a socket for example."""
    try:
        return _kind(os.stat(path).st_mode)
    except (OSError, ValueError):
        return ""


def _kind(mode: int) -> str:
    return next((words for matches, words in _KINDS if matches(mode)), "")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read(file: object, count: int) -> bytes:
    """Up to ``count`` bytes: one call to the system may return fewer."""
    parts = []
    while count > 0:
        part = file.read(count)  # type: ignore[attr-defined]
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _digest(first: bytes, last: bytes) -> str:
    digest = hashlib.sha256(first)
    digest.update(last)
    return digest.hexdigest()[:32]
