"""Masks: which part of the images counts, and how much.

Two meanings:

- *weighted*: the network sees the whole images, and every layer's distance is averaged over its
  positions with weights: ``sum(w d) / sum(w)``. The weight of a position is the mean of the mask
  over its cell. A layer of h x w positions divides the image of H x W pixels into as many cells,
  cell i from ``i H / h`` to ``(i + 1) H / h``, and a pixel on a border counts in both by its area.
- *fill*: both images have the same value wherever the mask is 0, before the network sees them, and
  the distance is the plain one.

:class:`Mask` has the weights of any grid, :func:`fill_outside` the filled image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..composed import accumulator_dtype

MaskMode = Literal["weighted", "fill"]


def check_mask(mask: Tensor, size: tuple[int, int], batch: int, device: torch.device) -> Tensor:
    """A mask as (1, 1, H, W) or (N, 1, H, W), or an error that says what is wrong with it.

    Args:
        mask: bool or floating point, (H, W) or (1 or N, 1, H, W).
        size: of the images.
        batch: N.
        device: the model's.

    Its values are looked at by :func:`check_values`.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask must be a torch.Tensor of the images' height and width, got "
            f"{type(mask).__name__}; torch.from_numpy converts an array"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask is {mask.dtype}, expected bool or floating point; mask > 0 makes it bool, "
            "mask.float() takes its values for weights"
        )
    height, width = size
    shape = tuple(mask.shape)
    if mask.dim() == 2:
        mask = mask[None, None]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"mask has shape {shape}, expected ({height}, {width}), (1, 1, {height}, {width})"
            + (f" or ({batch}, 1, {height}, {width})" if batch != 1 else "")
        )
    if tuple(mask.shape[2:]) != (height, width):
        raise ValueError(
            f"mask is of {mask.shape[2]}x{mask.shape[3]} pixels but the images are of "
            f"{height}x{width} (height x width); resize one of them"
        )
    if mask.device != device:
        raise ValueError(
            f"mask is on {mask.device} but the model is on {device}; move one of them with .to()"
        )
    return mask


def may_look(mask: object, check_inputs: bool | None) -> bool:
    """Whether a mask's values are looked at: in eager calls, and not where a GPU captures a graph.

    ``check_inputs=False`` spares GPUs the synchronisation. Where nobody looks, a mask that is
    empty, negative or not finite makes its image's distance NaN.
    """
    if not kernels.is_eager() or not isinstance(mask, Tensor) or mask.is_meta:
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return mask.device.type == "cpu" or check_inputs is not False


def check_values(mask: Tensor) -> None:
    """Refuses masks that have no weights; costs a synchronisation on GPUs."""
    if mask.numel() == 0:
        return
    of_images = mask.detach().flatten(1)
    if mask.dtype == torch.bool:
        least, most = 0.0, of_images.any(dim=1).float()
    else:
        low, most = torch.aminmax(of_images, dim=1)
        least = low.min().item()  # NaN if anything is
    largest = most.max().item()
    if not (least >= 0 and largest < float("inf")):
        problem = f"has values from {least:.4g} to {largest:.4g}"
        if least != least:
            problem = "holds NaN"
        raise ValueError(f"mask {problem}, expected finite weights that are not negative")
    empty = (most == 0).nonzero().flatten().tolist()
    if empty:
        which = "" if len(mask) == 1 else f" for image {empty[0]}"
        raise ValueError(
            f"mask is empty{which}: no pixel of it is above 0, and there is nothing to average; "
            "leave such images out"
        )


def fill_outside(image: Tensor, mask: Tensor, fill_value: float, unit_range: bool) -> Tensor:
    """An image (N, 3, H, W) that has one value in all channels wherever a mask is 0.

    Args:
        mask: as :func:`check_mask` returns it; what is above 0 is inside, whatever the value.
        fill_value: in [-1, 1], whatever the image's range.
        unit_range: the image is in [0, 1].
    """
    value = (fill_value + 1) / 2 if unit_range else fill_value
    inside = mask if mask.dtype == torch.bool else mask > 0
    # Chosen, not blended: what lies outside, NaN too, leaves no trace.
    return torch.where(inside, image, image.new_full((), value))


def check_fill(mask: Tensor, fill_value: float) -> None:
    """Refuses what filling cannot do."""
    if not -1 <= fill_value <= 1:
        raise ValueError(
            f"fill_value is {fill_value}, expected a value in [-1, 1], the range of LPIPS, also "
            "with normalize=True; 0.0 is middle gray"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "mask wants a gradient, which mask_mode='fill' does not have: a pixel is in or out; "
            "detach it, or use mask_mode='weighted'"
        )


class Mask:
    """A mask that weights positions: the weights for grids of any size, all from one pass over it.

    The weights of a grid have the mean 1, so that ``mean(weights * d)`` is ``sum(w d) / sum(w)``,
    and of a mask that is one number everywhere they are all exactly 1: then the distance is the
    plain one to the bit. Sums are float64, and of whole numbers, as of bool masks, exact.

    Args:
        mask: as :func:`check_mask` returns it.

    >>> mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    >>> mask[..., :6] = True
    >>> Mask(mask).weights([(2, 2)], torch.float32)[0].flatten().tolist()
    [1.3333333730697632, 0.6666666865348816, 1.3333333730697632, 0.6666666865348816]
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._weights: dict[tuple[int, int], Tensor] = {}

    def check(self) -> None:
        """:func:`check_values`, by a look at the weights that have been asked for."""
        first = next(iter(self._weights.values()))[:, 0, 0, 0]
        if first.isnan().any():
            check_values(self.mask)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, images: slice) -> Mask:
        """That of some images; one mask is for all."""
        if len(self.mask) == 1:
            return self
        part = Mask(self.mask[images])
        part._weights = {grid: weights[images] for grid, weights in self._weights.items()}
        return part

    @property
    def wants_gradient(self) -> bool:
        return self.mask.requires_grad and torch.is_grad_enabled()

    def weights(self, grids: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
        """(N or 1, 1, h, w) of every grid, in the accumulator's dtype of features of ``dtype``."""
        missing = [grid for grid in dict.fromkeys(grids) if grid not in self._weights]
        if missing:
            made = position_weights(self.mask, missing, accumulator_dtype(dtype))
            self._weights.update(zip(missing, made))
        return [self._weights[grid] for grid in grids]


def position_weights(
    mask: Tensor, grids: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[Tensor]:
    """Of every cell of a grid the mean of the mask, over the mean of the whole mask.

    On the CPU by a kernel; a mask that learns, and everything that is not just run, by
    :func:`composed_position_weights`.
    """
    learns = mask.requires_grad and torch.is_grad_enabled()
    if mask.device.type == "cpu" and kernels.is_eager() and not learns:
        with kernels.below_autograd():
            return torch.ops.lpips_fast.position_weights(
                mask, [h for h, _ in grids], [w for _, w in grids], dtype
            )
    return composed_position_weights(mask, grids, dtype)


def composed_position_weights(
    mask: Tensor, grids: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[Tensor]:
    """:func:`position_weights` in plain torch, differentiable."""
    # A device without float64 makes do with less.
    values = mask.to(torch.float32 if mask.device.type == "mps" else torch.float64)
    # One number everywhere becomes 1, and nothing overflows.
    values = values / values.detach().amax(dim=(2, 3), keepdim=True)
    total = values.sum(dim=(2, 3), keepdim=True)
    # A mask that has no weights and that nobody looked at: NaN, never a number.
    least = values.detach().amin(dim=(2, 3), keepdim=True)
    total = torch.where(least >= 0, total, torch.nan)
    of_rows = _sums_over_cells(values, [h for h, _ in grids])
    of_cells = [
        _sums_over_cells(rows.transpose(2, 3), [w])[0].transpose(2, 3)
        for rows, (_, w) in zip(of_rows, grids)
    ]
    # Of a mask of ones a cell's sum and the total are both H W.
    return [(cells / total).clamp(min=0).to(dtype).contiguous() for cells in of_cells]


def _sums_over_cells(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The integral over each of ``count`` equal cells along the rows, times ``count``.

    As the difference of sums from the start to a cell's ends. Of n pixels in m cells, end k lies in
    pixel k n // m, at (k n % m) / m of it; the factor m keeps whole numbers whole.
    """
    size = values.shape[2]
    sums = F.pad(_cumulative(values), (0, 0, 1, 0))
    cells = []
    for count in counts:
        ends = torch.arange(count + 1, device=values.device) * size
        pixel, part = ends // count, (ends % count).to(values.dtype)
        # The last end lies behind the last pixel, of which it takes nothing.
        inside = values.index_select(2, pixel.clamp(max=size - 1)) * part[:, None]
        to_end = inside + count * sums.index_select(2, pixel)
        cells.append(to_end[:, :, 1:] - to_end[:, :, :-1])
    return cells


def _cumulative(values: Tensor) -> Tensor:
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return cumulative_by_doubling(values)
    return values.cumsum(2)


def cumulative_by_doubling(values: Tensor) -> Tensor:
    """``values.cumsum(2)``, which torch refuses on CUDA where all must be deterministic."""
    size, step = values.shape[2], 1
    while step < size:
        values = values + F.pad(values[:, :, : size - step], (0, 0, step, 0))
        step *= 2
    return values
