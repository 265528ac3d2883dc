"""What is measured of a pair of images: LPIPS with its layers, PSNR, SSIM. A measure is columns.

Images come as a :class:`Batch` of one size, 8-bit as they were decoded, so that PSNR and SSIM are
of the very pixels; what LPIPS takes is made of them once for all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from .. import fidelity
from ..comparison.masks import MaskMode
from ..images.reading import image_to_tensor
from ..normalization import depends_on_batch
from ..trunk.table import trunk_spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..lpips import LPIPS

__all__ = ["METRIC_NAMES", "PSNR", "SSIM", "Batch", "Column", "Distance", "Measure", "MetricName"]

#: The names of what :class:`Distance`, :class:`PSNR` and :class:`SSIM` measure.
MetricName = Literal["lpips", "psnr", "ssim"]

METRIC_NAMES: tuple[str, ...] = get_args(MetricName)


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs of images of one size.

    Attributes:
        pixels0, pixels1: 8-bit RGB, each (H, W, 3).
        device: where they are measured.
        masks: of each pair (H, W), or none at all.
    """

    pixels0: Sequence[NDArray[np.uint8]]
    pixels1: Sequence[NDArray[np.uint8]]
    device: torch.device
    masks: Sequence[NDArray[np.uint8]] = ()

    def __len__(self) -> int:
        return len(self.pixels0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.pixels0[0].shape[:2]
        return height, width

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """Both as (N, 3, H, W) float32 in [-1, 1]."""
        in0, in1 = (
            torch.cat([image_to_tensor(image) for image in images]).to(self.device)
            for images in (self.pixels0, self.pixels1)
        )
        return in0, in1

    @cached_property
    def mask(self) -> Tensor | None:
        """(N, 1, H, W) float32, or none."""
        if not self.masks:
            return None
        together = torch.stack([torch.from_numpy(mask) for mask in self.masks])
        return together.unsqueeze(1).to(self.device).float()

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """Both as (N, 3, H, W) float32 from 0 to 255."""
        in0, in1 = (
            torch.stack([torch.from_numpy(image) for image in images])
            .to(self.device)
            .permute(0, 3, 1, 2)
            .to(torch.float32, memory_format=torch.contiguous_format)
            for images in (self.pixels0, self.pixels1)
        )
        return in0, in1


@dataclass(frozen=True)
class Column:
    """One number of a pair.

    Attributes:
        name: in the CSV.
        title: in a table.
        decimals: in a table.
        higher_is_better: else lower is.
        part_of: the column of which it is one layer's part; empty of all others.
    """

    name: str
    title: str
    decimals: int = 4
    higher_is_better: bool = False
    part_of: str = ""


class Measure(Protocol):
    """What a run measures.

    Attributes:
        columns: of its numbers.
        minimum_size: the smallest height and width that it takes.
        name: for the sentence that says that an image is too small for it.
        may_be_infinite: of two images of which nothing is wrong.
    """

    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def minimum_size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def may_be_infinite(self) -> bool: ...

    def __call__(self, batch: Batch) -> list[list[float]]:
        """Of each pair one number a column."""
        ...


class Distance:
    """LPIPS of one model; with ``per_layer`` also each layer's part, of which it is the sum.

    Args:
        mask_mode, fill_value: what masks mean, where there are some.

    Raises:
        ValueError: a model that does not return one distance a pair.
    """

    may_be_infinite = False

    def __init__(
        self,
        model: LPIPS,
        name: str = "distance",
        title: str = "LPIPS",
        *,
        per_layer: bool = False,
        mask_mode: MaskMode = "weighted",
        fill_value: float = 0.0,
    ) -> None:
        if model.spatial or model.reduction != "none":
            raise ValueError(
                "an evaluation needs one distance a pair: models with spatial=False and "
                "reduction='none'"
            )
        if depends_on_batch(model.normalization):
            raise ValueError(
                f"with normalization={model.normalization!r} a pair's distance depends on the "
                "pairs beside it, which are here together as it happens: measure with 'instance'"
            )
        self.model = model
        self.per_layer = per_layer
        self.masking: dict[str, Any] = {"mask_mode": mask_mode, "fill_value": fill_value}
        self.columns: tuple[Column, ...] = (Column(name, title),)
        if per_layer:
            taps = list(trunk_spec(model.net_name).taps)
            self.columns += tuple(
                Column(f"{name}_{taps[layer]}", f"{title} {taps[layer]}", part_of=name)
                for layer in model.layers
            )
        self.minimum_size = model.minimum_size
        self.name = f"trunk {model.pnet_type!r}"

    def __call__(self, batch: Batch) -> list[list[float]]:
        in0, in1 = batch.images
        masking = {} if batch.mask is None else {"mask": batch.mask, **self.masking}
        if not self.per_layer:
            return [[value] for value in self.model(in0, in1, **masking).flatten().tolist()]
        distance, layers = self.model(in0, in1, retPerLayer=True, **masking)
        columns = torch.cat([part.reshape(len(batch), 1) for part in (distance, *layers)], dim=1)
        return columns.tolist()


def _refuse_masks(batch: Batch) -> None:
    if batch.masks:
        raise ValueError("masks are of LPIPS alone: PSNR and SSIM take none")


class PSNR:
    """Peak signal-to-noise ratio; see :mod:`lpips_fast.fidelity`."""

    columns = (Column("psnr", "PSNR", decimals=2, higher_is_better=True),)
    minimum_size = 1
    name = "PSNR"
    may_be_infinite = True  # of identical images

    def __call__(self, batch: Batch) -> list[list[float]]:
        _refuse_masks(batch)
        return [[value] for value in fidelity.psnr(*batch.values, data_range=255).tolist()]


class SSIM:
    """Structural similarity; see :mod:`lpips_fast.fidelity`."""

    columns = (Column("ssim", "SSIM", higher_is_better=True),)
    minimum_size = fidelity.SSIM_WINDOW
    name = "SSIM"
    may_be_infinite = False

    def __call__(self, batch: Batch) -> list[list[float]]:
        _refuse_masks(batch)
        return [[value] for value in fidelity.ssim(*batch.values, data_range=255).tolist()]
