"""Images that are compared: of two folders or several, paired by name, or listed in a CSV file.

Nothing is dropped without a word: what has no partner is in the :class:`Pairing`, and so is what
was passed over because its suffix is not an image's or its name does not fit the pattern. Hidden
files and folders (``.DS_Store``, ``._photo.png``) are not looked at. What has an image's suffix and
is none, a pipe or a folder, is listed as one: reading it says what is wrong.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

__all__ = [
    "IMAGE_SUFFIXES",
    "FolderError",
    "Listing",
    "Match",
    "Pair",
    "Pairing",
    "Patterns",
    "list_folder",
    "list_images",
    "natural_key",
    "pair_folders",
    "pair_several",
    "read_pairs",
    "short_names",
    "told_apart",
    "with_masks",
]

#: Suffixes, in lower case, of the formats that :mod:`lpips_fast.images` reads.
IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"]
) | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif"}

#: Equal names, or names that are equal but for the suffix.
Match = Literal["name", "stem"]


class FolderError(ValueError):
    """A folder cannot be listed or paired; the message is one sentence that names it."""


@dataclass(frozen=True)
class Patterns:
    """Names that belong together because ``{}`` stands for the same text in both.

    Raises:
        ValueError: a pattern that does not hold ``{}`` exactly once.

    >>> Patterns("{}_gt.png", "{}_pred.jpg").keys("a/7_gt.png")
    ('a/7', None)
    """

    pattern0: str
    pattern1: str

    def __post_init__(self) -> None:
        for pattern in (self.pattern0, self.pattern1):
            if pattern.count("{}") != 1:
                raise ValueError(
                    f"the pattern {pattern!r} holds {{}} {pattern.count('{}')} times, expected "
                    "once: it stands for what two names have in common, as in {}_gt.png"
                )

    def keys(self, name: str) -> tuple[str | None, str | None]:
        """What ``{}`` stands for in a name, by the first and by the second pattern."""
        return _between(self.pattern0, name), _between(self.pattern1, name)


@dataclass(frozen=True)
class Pair:
    """Two files to compare.

    Attributes:
        name: of the first, relative to its folder, with ``/`` between folders.
        path0, path1: the files.
        folder: which of several folders the second is of; empty if there is but one.
        mask: the file that says which part of them counts, if there is one.
    """

    name: str
    path0: Path
    path1: Path
    folder: str = ""
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All that its numbers depend on."""
        both = (self.path0, self.path1)
        return both if self.mask is None else (*both, self.mask)


@dataclass(frozen=True)
class Pairing:
    """Two folders' images.

    Attributes:
        pairs: what has a partner, in natural order of the first folder's names.
        only_in_0, only_in_1: names, relative to their folder, that have none.
        passed_over: names of files without an image's suffix, or that do not fit the pattern, of
            both folders.
        pairs_by_stem: how many of the partnerless would pair if suffixes were ignored.
        not_listed: folders within them that could not be looked into, and why.
    """

    pairs: list[Pair]
    only_in_0: list[str] = field(default_factory=list)
    only_in_1: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    pairs_by_stem: int = 0
    not_listed: list[str] = field(default_factory=list)


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
    return list_folder(folder, recursive=recursive).images


def pair_folders(
    folder0: str | os.PathLike[str],
    folder1: str | os.PathLike[str],
    *,
    match: Match | Patterns = "name",
    recursive: bool = False,
) -> Pairing:
    """Pair the images of two folders.

    Args:
        folder0, folder1: the folders.
        match: ``"name"`` pairs equal names; ``"stem"`` ignores the suffix, so that ``1.jpg`` meets
            ``1.png``; :class:`Patterns` pair names by what they have in common. Names are compared
            as text: an é that one file system stores as one character and the other as two is the
            same é.
        recursive: look into their folders too; names are then relative paths.

    Raises:
        FolderError: one is not a folder, or holds two files that match the same partner.

    Example:
        >>> pairing = pair_folders("originals", "decoded")      # doctest: +SKIP
        >>> len(pairing.pairs), pairing.only_in_0                # doctest: +SKIP
        (99, ['100.png'])
    """
    if isinstance(match, str) and match not in get_args(Match):
        raise ValueError(f"match is {match!r}, expected 'name', 'stem' or Patterns")
    root0, root1 = Path(folder0), Path(folder1)
    listed0, listed1 = (list_folder(root, recursive=recursive) for root in (root0, root1))
    key0, key1 = _key_functions(match)
    by_key0, unfit0 = _keyed(listed0.images, key0, root0)
    by_key1, unfit1 = _keyed(listed1.images, key1, root1)
    pairs = [
        Pair(name, root0 / name, root1 / by_key1[key])
        for key, name in by_key0.items()
        if key in by_key1
    ]
    only_in_0 = [name for key, name in by_key0.items() if key not in by_key1]
    only_in_1 = [name for key, name in by_key1.items() if key not in by_key0]
    stems = [{_stem(name) for name in names} for names in (only_in_0, only_in_1)]
    return Pairing(
        pairs,
        only_in_0,
        only_in_1,
        passed_over=[*listed0.others, *unfit0, *listed1.others, *unfit1],
        pairs_by_stem=len(stems[0] & stems[1]),
        not_listed=[*listed0.not_listed, *listed1.not_listed],
    )


def pair_several(
    folder0: str | os.PathLike[str],
    folders: Sequence[str | os.PathLike[str]],
    *,
    match: Match | Patterns = "name",
    recursive: bool = False,
) -> tuple[list[Pair], list[Pairing]]:
    """Pair the images of a folder with those of one folder or several.

    Args:
        folder0: the folder that all are compared with.
        folders: the others.
        match, recursive: as for :func:`pair_folders`.

    Returns:
        All pairs, by name and then in the order of the folders, which each pair names if there are
        several (:func:`short_names`); and each folder's pairing.

    Raises:
        FolderError: as :func:`pair_folders`, and for a folder that is named twice.
    """
    paths = [Path(folder) for folder in folders]
    pairings = [pair_folders(folder0, path, match=match, recursive=recursive) for path in paths]
    labels = [""] if len(paths) == 1 else short_names(paths)
    order = {name: k for k, name in enumerate(list_images(folder0, recursive=recursive))}
    pairs = [
        Pair(pair.name, pair.path0, pair.path1, label)
        for label, pairing in zip(labels, pairings)
        for pair in pairing.pairs
    ]
    return sorted(pairs, key=lambda pair: order[pair.name]), pairings  # stable: folders in order


def with_masks(
    pairs: Sequence[Pair],
    masks: str | os.PathLike[str],
    *,
    match: Match | Patterns = "name",
    recursive: bool = False,
) -> list[Pair]:
    """The same pairs, each with its mask.

    Args:
        pairs: of folders.
        masks: a file, for all pairs; or a folder, in which a mask is called as the first image of
            its pair but for the suffix, or as the text that ``{}`` stands for in the patterns.
        match, recursive: by which the images were paired.

    Raises:
        FolderError: the folder cannot be listed, or has no mask for some pair, or two for one.
    """
    place = Path(masks)
    if not place.is_dir():
        return [replace(pair, mask=place) for pair in pairs]
    names, _ = _keyed(list_images(place, recursive=recursive), _stem, place)

    def mask_of(name: str) -> str | None:
        if isinstance(match, Patterns):
            return names.get(match.keys(name)[0] or "") or names.get(_stem(name))
        return names.get(_stem(name))

    found = [mask_of(pair.name) for pair in pairs]
    without = list(dict.fromkeys(p.name for p, name in zip(pairs, found) if name is None))
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise FolderError(
            f"{place} has no mask for {', '.join(without[:5])}{more}: a mask is called as the "
            "image, but for the suffix; leave out images without one"
        )
    return [replace(pair, mask=place / str(name)) for pair, name in zip(pairs, found)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others.

    Raises:
        FolderError: two are the same.

    >>> short_names([Path("/runs/a/out"), Path("/runs/b/out")])
    ['a/out', 'b/out']
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(f for k, f in enumerate(folders) if parts[k] in parts[:k])
        raise FolderError(f"{twice} is named twice; name each folder once")
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths that differ have ends that differ")


def told_apart(files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """As much of the end of each file's path as tells it from the others: mostly its name.

    >>> told_apart(["runs/a/1.png", "runs/b/1.png"]), told_apart(["a/1.png", "b/2.png"])
    (['a/1.png', 'b/1.png'], ['1.png', '2.png'])
    """
    parts = [Path(file).parts for file in files]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    raise AssertionError("paths that differ have ends that differ")


# ------------------------------------------------------------------------------ a list of pairs

_COLUMNS_OF_PAIRS = (("a", "b"), ("image0", "image1"))


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """The pairs of a CSV file that has a header row with the columns ``a`` and ``b``.

    Both are paths of images, relative to the file's folder, and so is that of a mask in a column
    ``mask``. A column ``name`` names the pairs;
    without it the name is the cell of ``a``, or both cells where one image has several partners.
    Other columns are not looked at.

    Raises:
        FolderError: the file cannot be read, has no such columns or no rows, a row lacks a cell, or
            two pairs have one name.

    Example:
        >>> read_pairs("pairs.csv")      # doctest: +SKIP
        [Pair(name='x/1.png', path0=PosixPath('x/1.png'), path1=PosixPath('y/1.jpg'), folder='')]
    """
    file = Path(path)
    try:
        # The bytes of a name that is no text are kept, as in a listing of a folder.
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, csv.Error) as error:
        raise FolderError(
            f"cannot read {path}: {getattr(error, 'strerror', '') or error}"
        ) from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    columns = next((c for c in _COLUMNS_OF_PAIRS if set(c) <= set(header)), None)
    if columns is None:
        raise FolderError(
            f"{path} has the columns {', '.join(header) or 'of an empty file'}; expected a header "
            "row with a and b, the paths of the images, and if you like name"
        )
    positions = [header.index(column) for column in columns]
    cells: list[tuple[str, str]] = []
    names: list[str] = []
    masks: list[str] = []
    has_masks = "mask" in header
    for number, row in enumerate(rows[1:], start=1):
        if not row:
            continue
        found = [row[p] if p < len(row) else "" for p in positions]
        if not all(found):
            raise FolderError(f"row {number} of {path} does not name two images")
        cells.append((found[0], found[1]))
        at = header.index("mask") if has_masks else len(row)
        masks.append(row[at] if at < len(row) else "")
        if has_masks and not masks[-1]:
            raise FolderError(f"row {number} of {path} names no mask, and others do")
        if "name" in header:
            at = header.index("name")
            names.append(row[at] if at < len(row) else "")
    if not cells:
        raise FolderError(f"{path} lists no pairs")
    if not names:
        firsts = [a for a, _ in cells]
        is_one_each = len(set(firsts)) == len(firsts)
        names = firsts if is_one_each else [f"{a} vs {b}" for a, b in cells]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if seen.setdefault(name, number) != number:
            raise FolderError(
                f"{path} has two pairs that are called {name!r}, rows {seen[name]} and {number}; "
                "a column name with a name for each tells them apart"
            )
    return [
        Pair(name, file.parent / a, file.parent / b, mask=file.parent / mask if mask else None)
        for name, (a, b), mask in zip(names, cells, masks)
    ]


# ------------------------------------------------------------------------------ a folder


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        images: names that have an image's suffix, in natural order.
        others: names of other files.
        not_listed: folders within it that could not be looked into, and why.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    not_listed: list[str] = field(default_factory=list)


def list_folder(folder_: str | os.PathLike[str], *, recursive: bool = False) -> Listing:
    """All that is in a folder, but for what is hidden; see :func:`list_images`."""
    folder = Path(folder_)
    listed = Listing()
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
            has_suffix = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
            if recursive and _is_folder(entry):
                try:
                    visit(path / entry.name, f"{name}/")
                except OSError as error:
                    listed.not_listed.append(f"{path / entry.name}: {error.strerror or error}")
            elif has_suffix:
                listed.images.append(name)
            elif not _is_folder(entry):
                listed.others.append(name)

    try:
        if not folder.exists():
            raise FolderError(f"{folder} does not exist, expected a folder of images")
        if not folder.is_dir():
            raise FolderError(
                f"{folder} is not a folder; two files are compared by lpips-fast pair"
            )
        visit(folder, "")
    except OSError as error:
        reason = error.strerror or error
        raise FolderError(f"cannot list {error.filename or folder}: {reason}") from error
    for names in (listed.images, listed.others, listed.not_listed):
        names.sort(key=natural_key)
    return listed


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _entry_name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _between(pattern: str, name: str) -> str | None:
    """What ``{}`` stands for: in the last part of the path, or of all of it."""
    before, after = _text(pattern).split("{}")
    folders, slash, last = _text(name).rpartition("/")
    if "/" in pattern:
        folders, slash, last = "", "", _text(name)
    length = len(last) - len(before) - len(after)
    if length < 1 or not (last.startswith(before) and last.endswith(after)):
        return None
    return folders + slash + last[len(before) : len(before) + length]


def _text(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return str(PurePosixPath(_text(name)).with_suffix(""))


_KeyFunction = Callable[[str], "str | None"]


def _key_functions(match: Match | Patterns) -> tuple[_KeyFunction, _KeyFunction]:
    if isinstance(match, Patterns):
        return (lambda name: match.keys(name)[0]), (lambda name: match.keys(name)[1])
    return (_text, _text) if match == "name" else (_stem, _stem)


def _keyed(names: list[str], key: _KeyFunction, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Names by what they are matched by, and those that have nothing of the kind."""
    keyed: dict[str, str] = {}
    unfit = []
    for name in names:
        own = key(name)
        if own is None:
            unfit.append(name)
            continue
        other = keyed.setdefault(own, name)
        if other != name:
            raise FolderError(
                f"{folder} holds both {other!r} and {name!r}, which match the same partner; "
                "rename or remove one of them"
            )
    return keyed, unfit
