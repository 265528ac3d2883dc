"""Features: the taps of a batch of images, to be compared as often as wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """What :meth:`lpips_fast.LPIPS.encode` returns and :meth:`~lpips_fast.LPIPS.distance` takes.

    Attributes:
        taps: one tensor (N, C_l, H_l, W_l) per layer.
        image_size: height and width of the images, to which distance maps are upsampled.
        net: the trunk that made them, ``None`` if it is not known. A model refuses another's.
        layers: of which layers they are, ``None`` if it is not known.
    """

    taps: tuple[Tensor, ...]
    image_size: tuple[int, int]
    net: str | None = None
    layers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.taps[0])

    def __getitem__(self, images: slice | Tensor) -> Features:
        """Some of the images: a slice or an index tensor; always a batch."""
        if isinstance(images, int):
            raise TypeError(f"features are sliced as a batch: use [{images}:{images + 1}]")
        return self._map(lambda tap: tap[images])

    def to(self, *args, **kwargs) -> Features:
        """Like ``Tensor.to``, for all taps."""
        return self._map(lambda tap: tap.to(*args, **kwargs))

    def detach(self) -> Features:
        return self._map(torch.Tensor.detach)

    def expand(self, batch: int) -> Features:
        """One image as a batch of ``batch``, without a copy."""
        return self._map(lambda tap: tap.expand(batch, -1, -1, -1))

    def nbytes(self) -> int:
        """Bytes of memory that the taps take."""
        return sum(tap.numel() * tap.element_size() for tap in self.taps)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Features:
        return replace(self, taps=tuple(change(tap) for tap in self.taps))
