"""The images of a folder by position, as all pairs and nearest neighbours take them.

Every image is read once before the work begins, which finds the damaged ones; decoded images stay
in memory as long as there is room, the others are read again when they are needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..images.reading import Alpha, image_to_tensor, read_image_uint8
from ..images.resizing import Preprocessing
from .pairing import FolderError, Listing, list_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FolderImages", "Reading"]


@dataclass(frozen=True)
class Reading:
    """How image files are read, and changed before they are compared."""

    alpha: Alpha = "white"
    max_pixels: int | None = None
    preprocessing: Preprocessing = Preprocessing()  # noqa: RUF009 (it cannot be changed)

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        image = read_image_uint8(path, alpha=self.alpha, max_pixels=self.max_pixels)
        return self.preprocessing(image)


@dataclass
class FolderImages(Sequence[torch.Tensor]):
    """The readable images of a folder, all of one size; each is (1, 3, H, W) in [-1, 1].

    Attributes:
        names: of the readable ones, relative to the folder, in natural order.
        size: height and width.
        unreadable: names, and why.
        listing: all that the folder holds.
    """

    folder: Path
    reading: Reading
    names: list[str]
    size: tuple[int, int]
    decoded: dict[str, NDArray[np.uint8]]
    unreadable: dict[str, str]
    listing: Listing

    @classmethod
    def read(
        cls,
        folder: str | os.PathLike[str],
        reading: Reading,
        *,
        recursive: bool = False,
        memory: int = 0,
        started: Callable[[int], Callable[[int], object]] | None = None,
    ) -> FolderImages:
        """Read every image once.

        Args:
            folder: where they are.
            reading: how.
            recursive: look into its folders too.
            memory: bytes that decoded images may take.
            started: called with the number of images; what it returns is called with 1 for each.

        Raises:
            FolderError: no folder, no readable image, or images of several sizes.
        """
        root = Path(folder)
        listing = list_folder(root, recursive=recursive)
        names = listing.images
        advance = started(len(names)) if started else None
        decoded: dict[str, NDArray[np.uint8]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        unreadable: dict[str, str] = {}

        def read(name: str) -> NDArray[np.uint8] | str:
            try:
                return reading(root / name)
            except (ValueError, MemoryError) as error:  # ImageError is one
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, image in zip(names, _in_order(pool, read, names)):
                if advance is not None:
                    advance(1)
                if isinstance(image, str):
                    unreadable[name] = image
                    continue
                sizes[name] = (image.shape[0], image.shape[1])
                if image.nbytes <= memory:
                    decoded[name] = image
                    memory -= image.nbytes
        size = _common_size(root, sizes)
        return cls(root, reading, list(sizes), size, decoded, unreadable, listing)

    def nbytes(self) -> int:
        """Of the decoded images in memory."""
        return sum(image.nbytes for image in self.decoded.values())

    def without_pixels(self) -> FolderImages:
        """The same images, none of which is in memory: for another process."""
        return replace(self, decoded={})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: Any) -> Any:
        name = self.names[position]
        image = self.decoded.get(name)
        if image is None:
            image = self.reading(self.folder / name)
        return image_to_tensor(image)


def _in_order(
    pool: ThreadPoolExecutor,
    read: Callable[[str], NDArray[np.uint8] | str],
    names: list[str],
) -> Iterator[NDArray[np.uint8] | str]:
    """What ``pool.map`` yields, but some images ahead instead of all: memory stays bounded."""
    ahead = 2 * (os.cpu_count() or 1)
    pending = [pool.submit(read, name) for name in names[:ahead]]
    for position in range(len(names)):
        result = pending.pop(0).result()
        if position + ahead < len(names):
            pending.append(pool.submit(read, names[position + ahead]))
        yield result


def _common_size(folder: Path, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    first: dict[tuple[int, int], str] = {}
    for name, size in sizes.items():
        first.setdefault(size, name)
    if len(first) > 1:
        some = ", ".join(f"{name} is {size[1]}x{size[0]}" for size, name in list(first.items())[:3])
        raise FolderError(
            f"the images of {folder} have {len(first)} different sizes ({some} pixels): "
            "--resize or --crop brings them to one"
        )
    return next(iter(first), (0, 0))
