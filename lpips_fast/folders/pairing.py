"""Two folders of images, paired by name.

Nothing is dropped without a word: what has no partner is in the :class:`Pairing`, and so is what
was passed over because its suffix is not an image's. Hidden files and folders (``.DS_Store``,
``._photo.png``) are not looked at.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

__all__ = [
    "IMAGE_SUFFIXES",
    "FolderError",
    "Match",
    "Pair",
    "Pairing",
    "list_images",
    "natural_key",
    "pair_folders",
]

#: Suffixes, in lower case, of the formats that :mod:`lpips_fast.images` reads.
IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"]
) | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif"}

Match = Literal["name", "stem"]


class FolderError(ValueError):
    """A folder cannot be listed or paired; the message is one sentence that names it."""


@dataclass(frozen=True)
class Pair:
    """Two files to compare.

    Attributes:
        name: of the first, relative to its folder, with ``/`` between folders.
        path0, path1: the files.
    """

    name: str
    path0: Path
    path1: Path


@dataclass(frozen=True)
class Pairing:
    """Two folders' images.

    Attributes:
        pairs: what has a partner, in natural order of the first folder's names.
        only_in_0, only_in_1: names, relative to their folder, that have none.
        passed_over: names of files without an image's suffix, of both folders.
        pairs_by_stem: how many of the partnerless would pair if suffixes were ignored.
    """

    pairs: list[Pair]
    only_in_0: list[str] = field(default_factory=list)
    only_in_1: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    pairs_by_stem: int = 0


def natural_key(name: str) -> tuple[list[list[str | int]], str]:
    """A sort key that puts ``frame2`` before ``frame10``, folder by folder.

    >>> sorted(["b10.png", "b9.png", "a/1.png", "b09.png"], key=natural_key)
    ['a/1.png', 'b09.png', 'b9.png', 'b10.png']
    """
    # Text and numbers alternate, text first, so that two keys never compare a number with text.
    parts: list[list[str | int]] = [
        [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"([0-9]+)", part))]
        for part in name.split("/")
    ]
    return parts, name


def list_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[str]:
    """Names of the images in a folder, relative to it, in natural order.

    Args:
        folder: where to look.
        recursive: look into its folders too; links to folders are followed, each folder once.

    Raises:
        FolderError: it is not a folder, or cannot be read.

    Example:
        >>> list_images("photos", recursive=True)      # doctest: +SKIP
        ['2.png', '10.png', 'summer/1.jpg']
    """
    return _list(Path(folder), recursive)[0]


def pair_folders(
    folder0: str | os.PathLike[str],
    folder1: str | os.PathLike[str],
    *,
    match: Match = "name",
    recursive: bool = False,
) -> Pairing:
    """Pair the images of two folders.

    Args:
        folder0, folder1: the folders.
        match: ``"name"`` pairs equal names; ``"stem"`` ignores the suffix, so that ``1.jpg`` meets
            ``1.png``. Names are compared as text: an é that one file system stores as one
            character and the other as two is the same é.
        recursive: look into their folders too; names are then relative paths.

    Raises:
        FolderError: one is not a folder, or holds two files that match the same partner.

    Example:
        >>> pairing = pair_folders("originals", "decoded")      # doctest: +SKIP
        >>> len(pairing.pairs), pairing.only_in_0                # doctest: +SKIP
        (99, ['100.png'])
    """
    if match not in get_args(Match):
        raise ValueError(f"match is {match!r}, expected 'name' or 'stem'")
    root0, root1 = Path(folder0), Path(folder1)
    names0, others0 = _list(root0, recursive)
    names1, others1 = _list(root1, recursive)
    by_key0, by_key1 = _keyed(names0, match, root0), _keyed(names1, match, root1)
    pairs = [
        Pair(name, root0 / name, root1 / by_key1[key])
        for key, name in by_key0.items()
        if key in by_key1
    ]
    only_in_0 = [name for key, name in by_key0.items() if key not in by_key1]
    only_in_1 = [name for key, name in by_key1.items() if key not in by_key0]
    stems = [{_key(name, "stem") for name in names} for names in (only_in_0, only_in_1)]
    return Pairing(pairs, only_in_0, only_in_1, others0 + others1, len(stems[0] & stems[1]))


def _list(folder: Path, recursive: bool) -> tuple[list[str], list[str]]:
    """Images and other files, each in natural order."""
    images: list[str] = []
    others: list[str] = []
    visited: set[tuple[int, int]] = set()

    def visit(path: Path, prefix: str) -> None:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in visited:  # a link to a folder that holds it
            return
        visited.add(identity)
        with os.scandir(path) as entries:
            # Sorted, so that of two links to one folder always the same one is followed.
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=_entry_name)
        for entry in visible:
            name = prefix + entry.name
            if entry.is_dir():
                if recursive:
                    visit(path / entry.name, f"{name}/")
            elif not (entry.is_file() or entry.is_symlink()):
                others.append(name)  # a pipe or a device: reading it might never end
            elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                images.append(name)  # a dangling link too: reading it says what is wrong
            else:
                others.append(name)

    if not folder.exists():
        raise FolderError(f"{folder} does not exist, expected a folder of images")
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder; two files are compared by lpips-fast pair")
    try:
        visit(folder, "")
    except OSError as error:
        reason = error.strerror or error
        raise FolderError(f"cannot list {error.filename or folder}: {reason}") from error
    return sorted(images, key=natural_key), sorted(others, key=natural_key)


def _entry_name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _key(name: str, match: Match) -> str:
    text = unicodedata.normalize("NFC", name)
    return text if match == "name" else str(PurePosixPath(text).with_suffix(""))


def _keyed(names: list[str], match: Match, folder: Path) -> dict[str, str]:
    keyed: dict[str, str] = {}
    for name in names:
        other = keyed.setdefault(_key(name, match), name)
        if other != name:
            raise FolderError(
                f"{folder} holds both {other!r} and {name!r}, which match the same partner by "
                f"{match}; rename or remove one of them"
            )
    return keyed
