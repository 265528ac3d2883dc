"""Many images by position: what :func:`pairwise` and its kin take, read when it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comparison.arguments import as_image
from ..comparison.calls import prepare_call
from ..composed import accumulator_dtype
from ..features import Features
from ..inputs import check_features

if TYPE_CHECKING:
    from ..lpips import LPIPS

#: A tensor (N, 3, H, W), features, or anything with a length and items by position.
Images = Tensor | Features | Sequence[Any]


class ImageSource:
    """Images of one size, of which any can be had at any time, and more than once.

    Args:
        name: of the argument, for messages.
        images: a tensor (N, 3, H, W) or (3, H, W), features, or a sequence or data set whose items
            are tensors of one image, paths of image files, or tuples that start with one.
        model: the model that is to look at them. They are moved to its device as they are read.
        normalize: tensors are in [0, 1]. Files are always read to what the model takes.

    Attributes:
        size: height and width.
        dtype: of distances between these images.
        is_encoded: they are features, and cost no trunk pass.
    """

    def __init__(self, name: str, images: Images, model: LPIPS, normalize: bool) -> None:
        if isinstance(images, (str, bytes, os.PathLike)):
            raise TypeError(f"{name} is one path, expected a list of paths")
        if not (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
            raise TypeError(
                f"{name} is a {type(images).__name__}, expected a tensor (N, 3, H, W), Features, "
                "or images by position (a list of tensors or paths, a data set): images are read "
                "more than once, so pass a loader's data set, or a list"
            )
        if isinstance(images, Tensor) and images.dim() == 3:
            images = images[None]
        if len(images) == 0:
            raise ValueError(f"{name} holds no images")
        tensors = images.taps if isinstance(images, Features) else (images,)
        if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors):
            raise ValueError(
                f"{name} wants a gradient, and none is kept here: detach it, or compare pairs by "
                "calling the model"
            )
        self.name, self.images, self.model = name, images, model
        self.device = model.scaling_layer.shift.device
        self.is_encoded = isinstance(images, Features)
        if isinstance(images, Features):
            check_features(
                name,
                images,
                net=model.net_name,
                layers=model.layers,
                channels=model.chns,
                device=None,  # they are moved as they are read
                look=bool(model.check_inputs),
            )
            self.size, dtype = images.image_size, images.taps[0].dtype
        else:
            item = self._item(0)
            self._are_files = isinstance(item, (str, os.PathLike))
            self.normalize = normalize and not self._are_files
            first, self._name_of_first = self._image(0, item)
            self.size, dtype = _size(first), model.dtype or model.scaling_layer.shift.dtype
        self.dtype = accumulator_dtype(dtype)

    def __len__(self) -> int:
        return len(self.images)

    def _item(self, position: int) -> Any:
        item: Any = self.images[position]  # type: ignore[index]
        if isinstance(item, (tuple, list)) and item:  # (image, label), as data sets have it
            item = item[0]
        return item

    def _image(self, position: int, item: Any) -> tuple[Tensor, str]:
        """An item as an image (1, 3, H, W) that the model takes, and its name for messages."""
        name = f"{self.name}[{position}]"
        if isinstance(item, (str, os.PathLike)) != self._are_files:
            raise TypeError(
                f"{name} is a {type(item).__name__}, but {self.name}[0] is "
                f"{'a path' if self._are_files else 'none'}: pass paths only, or tensors only"
            )
        if self._are_files:
            from ..images.reading import read_image

            name = f"{name} ({os.fspath(item)!r})"
            item = read_image(item)
        if isinstance(item, Tensor):
            item = item.to(self.device)
        image = as_image(self.model, name, item, self.normalize)
        if len(image) != 1:
            raise ValueError(f"{name} has shape {tuple(item.shape)}, expected one image")
        return image, name

    def _batch(self, positions: Sequence[int]) -> list[Tensor]:
        if isinstance(self.images, Tensor):
            batch = self.images[as_index(positions)].to(self.device)
            return [as_image(self.model, self.name, batch, self.normalize)]
        images = []
        for position in positions:
            image, name = self._image(position, self._item(position))
            if _size(image) != self.size:
                raise ValueError(
                    f"{name} has {_size(image)[0]}x{_size(image)[1]} pixels (height x width) and "
                    f"{self._name_of_first} has {self.size[0]}x{self.size[1]}: all must be of one "
                    "size; resize or crop them"
                )
            images.append(image)
        return images

    def taps(self, positions: Sequence[int]) -> Iterator[Tensor]:
        """The taps of some images, (n, C_l, H_l, W_l), one after the other."""
        if isinstance(self.images, Features):
            yield from (tap[as_index(positions)].to(self.device) for tap in self.images.taps)
        else:
            images = self._batch(positions)
            yield from prepare_call(self.model, images, self.normalize).taps(images)

    def part(self, positions: range) -> ImageSource:
        """A run of the images, as a source of its own; errors keep the positions in the whole."""
        return _Part(self, positions)


class _Part(ImageSource):
    def __init__(self, whole: ImageSource, positions: range) -> None:
        self.whole, self.positions = whole, positions
        self.is_encoded, self.device = whole.is_encoded, whole.device
        self.size, self.dtype = whole.size, whole.dtype

    def __len__(self) -> int:
        return len(self.positions)

    def taps(self, positions: Sequence[int]) -> Iterator[Tensor]:
        if isinstance(positions, range):
            return self.whole.taps(self.positions[positions.start : positions.stop])
        return self.whole.taps([self.positions[p] for p in positions])


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def as_index(positions: Sequence[int]) -> slice | list[int]:
    """A range as a slice, which copies nothing."""
    if isinstance(positions, range):
        return slice(positions.start, positions.stop)
    return list(positions)


def check_alike(source0: ImageSource, source1: ImageSource) -> None:
    """Refuses two sources whose images cannot be compared."""
    if source0.size != source1.size:
        raise ValueError(
            f"{source0.name} and {source1.name} differ in size, "
            f"{source0.size[0]}x{source0.size[1]} and {source1.size[0]}x{source1.size[1]} pixels "
            "(height x width); resize or crop one of them"
        )
    if source0.dtype != source1.dtype:
        raise TypeError(
            f"{source0.name} and {source1.name} differ in dtype, {source0.dtype} and "
            f"{source1.dtype}; convert one with .to()"
        )
