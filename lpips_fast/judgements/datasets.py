"""What people judged, on disk: the 2AFC and JND data sets in the folder layout of BAPPS.

Two questions were asked of people (Zhang et al. 2018, section 2):

- *Two alternatives, forced choice* (2AFC): which of two patches is closer to the reference?
  ``ref/ p0/ p1/`` hold images, ``judge/`` the fraction of people who chose ``p1``.
- *Just noticeable difference* (JND): are these two patches the same? ``p0/ p1/`` hold images,
  ``same/`` the fraction of people who said yes.

A judgement is one number in [0, 1] in a ``.npy`` file. What belongs together has one name
(``ref/000001.png``, ``judge/000001.npy``). A folder of this layout is a sub-set; BAPPS has several,
such as ``2afc/val/cnn``. Reading needs Pillow (``pip install "lpips-fast[images]"``).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..images.files import read_file
from ..images.reading import ImageError, image_to_tensor, read_image_uint8

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

__all__ = ["JNDDataset", "JudgementsError", "TwoAFCDataset", "load_batches"]

PATCH_SIZE = 64

# A file of one number has 128 bytes and the number; a long header may be wider.
_MAX_JUDGEMENT = 64 * 1024

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp", ".tif", ".tiff")


class JudgementsError(ValueError):
    """A data set is not as it should be; the message is one sentence that names the file."""


class JudgedImages(Dataset):
    """Images and what people judged of them; see :class:`TwoAFCDataset`, :class:`JNDDataset`.

    Args:
        folders: one sub-set, or several to be read as one.
        size: the shorter side is resized to so many pixels, as in the original (Pillow's bilinear
            filter); ``None`` leaves images as they are.

    Raises:
        JudgementsError: a folder is missing or empty, or a file has no partner of its name.
    """

    #: Names of the folders of images, and of the one of judgements.
    IMAGES: ClassVar[tuple[str, ...]]
    JUDGEMENT: ClassVar[str]

    def __init__(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        size: int | None = PATCH_SIZE,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size is {size}, expected at least 1 pixel, or None for no resizing")
        if isinstance(folders, (str, os.PathLike)):
            folders = [folders]
        if not folders:
            raise ValueError("expected at least one folder of judgements, got none")
        self.folders = [Path(folder) for folder in folders]
        self.size = size
        #: One name a judgement, such as ``cnn/000001``.
        self.names: list[str] = []
        self._paths: list[tuple[Path, ...]] = []  # images, then the judgement
        for folder in self.folders:
            for name, paths in self._items(folder):
                self.names.append(f"{folder.resolve().name}/{name}")
                self._paths.append(paths)

    def _items(self, folder: Path) -> Iterator[tuple[str, tuple[Path, ...]]]:
        parts = (*self.IMAGES, self.JUDGEMENT)
        files = [
            _files_by_name(folder / part, (".npy",) if part == self.JUDGEMENT else _IMAGE_SUFFIXES)
            for part in parts
        ]
        for part, found in zip(parts, files):
            # The first name that not all folders have, told from the side that misses it.
            for other, others in zip(parts, files):
                lacking = min(others.keys() - found.keys(), default=None)
                if lacking is not None:
                    raise JudgementsError(
                        f"{folder / part} has no partner for {others[lacking].name} of {other}/: "
                        f"expected one file of that name in each of {_listed(parts)}"
                    )
        if not files[0]:
            raise JudgementsError(
                f"{folder / parts[0]} holds no image; expected files ending in "
                f"{', '.join(_IMAGE_SUFFIXES)}"
            )
        for name in sorted(files[0]):
            yield name, tuple(found[name] for found in files)

    @property
    def fingerprint(self) -> str:
        """A digest of the names: tells whether a run goes on with the data that it began with."""
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One judgement: images (3, H, W) in [-1, 1] by folder name, and the judgement, a scalar.

        Raises:
            ImageError: an image cannot be read.
            JudgementsError: a judgement cannot, or images that belong together differ in size.
        """
        *images, judgement = self._paths[index]
        item = {part: _read_patch(path, self.size) for part, path in zip(self.IMAGES, images)}
        if len({tuple(image.shape) for image in item.values()}) > 1:
            sizes = ", ".join(f"{k} {v.shape[2]}x{v.shape[1]}" for k, v in item.items())
            raise JudgementsError(
                f"the images of {images[0]} and its partners differ in size ({sizes} pixels, "
                "width x height); images are compared position by position"
            )
        item[self.JUDGEMENT] = _read_judgement(judgement)
        return item

    @classmethod
    def find(cls, root: str | os.PathLike[str]) -> dict[str, Path]:
        """The sub-sets at or below a folder, by their names relative to it, sorted.

        Raises:
            JudgementsError: there is no such folder, or none in it.

        >>> TwoAFCDataset.find("dataset/2afc/val")   # doctest: +SKIP
        {'cnn': PosixPath('dataset/2afc/val/cnn'), 'color': …}
        """
        root = Path(root)
        if not root.is_dir():
            raise JudgementsError(f"{root} is no folder; expected one of {cls._layout()}")
        found: dict[str, Path] = {}
        visited = set()  # links may lead in a circle
        for folder, below, _ in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if cls.JUDGEMENT in below:
                path = Path(folder)
                relative = path.relative_to(root).as_posix()
                found[relative if relative != "." else path.resolve().name] = path
            if cls.JUDGEMENT in below or real in visited:
                below.clear()
            visited.add(real)
        if not found:
            raise JudgementsError(
                f"neither {root} nor a folder below it holds {cls.JUDGEMENT}/; "
                f"expected {cls._layout()}"
            )
        return dict(sorted(found.items()))

    @classmethod
    def open_all(
        cls, root: str | os.PathLike[str], size: int | None = PATCH_SIZE
    ) -> dict[str, Self]:
        """Every sub-set that :meth:`find` finds, opened."""
        return {name: cls(folder, size) for name, folder in cls.find(root).items()}

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        name: str,
        judgement: float,
        **images: NDArray[np.uint8],
    ) -> None:
        """Add one judgement to a sub-set, which is made if need be: PNG files and a ``.npy``.

        Args:
            folder: of the sub-set.
            name: of the files, without suffix.
            judgement: fraction of people, in [0, 1].
            images: 8-bit RGB (H, W, 3) for each of :attr:`IMAGES`.

        >>> gray = np.zeros((64, 64, 3), np.uint8)
        >>> JNDDataset.write("mine", "000000", 0.75, p0=gray, p1=gray)   # doctest: +SKIP
        """
        if sorted(images) != sorted(cls.IMAGES):
            raise ValueError(
                f"expected the images {_listed(cls.IMAGES)}, got {_listed(tuple(images))}"
            )
        fraction = _checked_fraction(judgement, f"the judgement of {name}")
        Image = _pillow()
        for part, pixels in images.items():
            path = Path(folder) / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        path = Path(folder) / cls.JUDGEMENT / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.array([fraction], np.float32))

    @classmethod
    def _layout(cls) -> str:
        parts = " ".join(f"{part}/" for part in (*cls.IMAGES, cls.JUDGEMENT))
        return f"the layout of BAPPS, a folder with {parts}"


class TwoAFCDataset(JudgedImages):
    """Which of two patches is closer to the reference? ``ref``, ``p0``, ``p1`` and ``judge``.

    ``judge`` is the fraction of people who chose ``p1``. Arguments are :class:`JudgedImages`'s.

    >>> dataset = TwoAFCDataset("dataset/2afc/val/cnn")         # doctest: +SKIP
    >>> dataset[0]["ref"].shape, dataset[0]["judge"]            # doctest: +SKIP
    (torch.Size([3, 64, 64]), tensor(0.6000))
    """

    IMAGES = ("ref", "p0", "p1")
    JUDGEMENT = "judge"


class JNDDataset(JudgedImages):
    """Are these two patches the same? ``p0``, ``p1`` and ``same``.

    ``same`` is the fraction of people who said yes. Arguments are :class:`JudgedImages`'s.
    """

    IMAGES = ("p0", "p1")
    JUDGEMENT = "same"


def load_batches(
    dataset: Any,
    batch_size: int,
    *,
    order: Sequence[int] | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """Batches of a data set, read in parallel: tensors of its items, stacked.

    Args:
        dataset: :class:`TwoAFCDataset`, :class:`JNDDataset`, or any sequence of such items.
        batch_size: the last batch may be smaller.
        order: indices in the order in which to read them; ``None``: as they come.
        workers: processes that read ahead; 0 reads in this one.
        device: where the batches go.

    Raises:
        JudgementsError, ImageError: as the data set does, or images of one batch differ in size.
    """
    device = torch.device(device)
    loader = DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=batch_size,
        sampler=range(len(dataset)) if order is None else order,
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the caller's
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield {part: value.to(device, non_blocking=True) for part, value in batch.items()}


class _ErrorsAsItems(Dataset):
    """Hands an error over as an item: raised in a worker, it would arrive inside a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Tensor] | Exception:
        try:
            return self.dataset[index]
        except (JudgementsError, ImageError, ImportError) as error:
            return error


def _stack(items: list[dict[str, Tensor] | Exception]) -> dict[str, Tensor] | Exception:
    batch: dict[str, list[Tensor]] = {}
    for item in items:
        if isinstance(item, Exception):
            return item
        for part, value in item.items():
            batch.setdefault(part, []).append(value)
    for part, values in batch.items():
        sizes = sorted({tuple(value.shape[1:]) for value in values})
        if len(sizes) > 1:
            (h0, w0), (h1, w1) = sizes[:2]
            return JudgementsError(
                f"images of one batch differ in size, {w0}x{h0} and {w1}x{h1} pixels in {part}/; "
                "crop them to one aspect ratio, or use batches of one"
            )
    return {part: torch.stack(values) for part, values in batch.items()}


def _files_by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise JudgementsError(
            f"{folder} is missing; expected a folder of {_listed(suffixes)} files"
        )
    files: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in suffixes or entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if stem in files:
                both = " and ".join(sorted((files[stem].name, path.name)))
                raise JudgementsError(f"{folder} holds two files of one name, {both}; remove one")
            files[stem] = path
    return files


def _read_patch(path: Path, size: int | None) -> Tensor:
    pixels = read_image_uint8(path, alpha="drop")  # as the original, whose patches are opaque
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if size is not None and shorter != size:
        # The longer side is cut off to whole pixels, as torchvision's Resize does.
        width, height = (int(size * side / shorter) for side in (width, height))
        Image = _pillow()
        patch = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(patch)
    return image_to_tensor(pixels)[0]


def _read_judgement(path: Path) -> Tensor:
    try:
        data, _ = read_file(
            path,
            max_bytes=_MAX_JUDGEMENT,
            expected="a NumPy array",
            limit="one number needs no more than",
        )
    except ImageError as error:
        raise JudgementsError(str(error)) from error
    try:
        _check_shape(data, path)
        value = np.load(io.BytesIO(data), allow_pickle=False)
    except JudgementsError:
        raise
    except Exception as error:  # a damaged header fails in NumPy's, Python's and tokenize's ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise JudgementsError(f"cannot read {path} as a NumPy array: {reason}") from error
    try:
        number = float(value.reshape(()).item())
    except (TypeError, ValueError) as error:
        raise JudgementsError(f"{path} holds {value.dtype}, expected a number in [0, 1]") from error
    return torch.tensor(_checked_fraction(number, str(path)), dtype=torch.float32)


def _check_shape(data: bytes, path: Path) -> None:
    """Before memory is taken for what a header declares."""
    file = io.BytesIO(data)
    if data.startswith(b"PK"):
        raise JudgementsError(f"{path} holds an archive, expected one number in [0, 1]")
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, _ = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"its format is version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    if math.prod(shape) != 1:
        raise JudgementsError(
            f"{path} holds an array of shape {shape}, expected one number in [0, 1]"
        )


def _checked_fraction(value: float, name: str) -> float:
    if not 0 <= value <= 1:  # false for NaN too
        raise JudgementsError(f"{name} is {value:g}, expected a fraction of people in [0, 1]")
    return value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'reading judgements needs Pillow: pip install "lpips-fast[images]"'
        ) from error
    return Image
