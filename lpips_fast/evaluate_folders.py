"""The images of two folders in one call, as rows that make a DataFrame.

``pandas.DataFrame(lpips_fast.evaluate("originals", "decoded"))``: what ``lpips-fast dirs`` writes
to a file, to the same bits.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch

from .compare_images import kept_model
from .comparison.masks import MaskMode
from .comparison.options import check_choice
from .folders.evaluating import Evaluation
from .folders.measures import METRIC_NAMES, PSNR, SSIM, Distance, Measure
from .folders.pairing import (
    FolderError,
    Match,
    Pairing,
    Patterns,
    pair_several,
    with_masks,
)
from .images.reading import Alpha
from .images.resizing import Preprocessing
from .lpips import LPIPS

__all__ = ["evaluate"]


def evaluate(
    folder_a: str | os.PathLike[str],
    folder_b: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    net: str = "alex",
    model: LPIPS | None = None,
    metrics: Sequence[str] = ("lpips",),
    per_layer: bool = False,
    match: Match | tuple[str, str] = "name",
    recursive: bool = False,
    resize: int | tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    alpha: Alpha = "white",
    max_pixels: int | None = None,
    device: str | torch.device | None = None,
    batch: int | None = None,
    workers: int | None = None,
    mask: str | os.PathLike[str] | None = None,
    mask_mode: MaskMode = "weighted",
    fill_value: float = 0.0,
) -> list[dict[str, Any]]:
    """Measure every pair of images in two folders, or in a folder and several others.

    Args:
        folder_a, folder_b: the folders; a list of folders adds a column ``folder``.
        net: the trunk of LPIPS.
        model: a model of your own instead, on its device.
        metrics: of ``"lpips"``, ``"psnr"`` and ``"ssim"`` some, in the order of the columns; see
            :mod:`lpips_fast.fidelity`.
        per_layer: a column for each layer of LPIPS too.
        match: ``"name"``, ``"stem"`` (the suffix does not count), or two patterns such as
            ``("{}_gt.png", "{}_pred.jpg")``.
        recursive: look into their folders too.
        resize, crop: as for :class:`lpips_fast.images.Preprocessing`.
        alpha, max_pixels: as for :func:`lpips_fast.images.read_image`.
        device: where to compute; by default on the CPU.
        batch, workers: as for :class:`lpips_fast.folders.Evaluation`.
        mask: a gray image file that says which part of all images counts, or a folder of masks that
            are called as the images of ``folder_a`` but for the suffix; see
            :func:`lpips_fast.images.read_mask`. Of ``"lpips"`` alone.
        mask_mode, fill_value: as for :meth:`LPIPS.forward`.

    Returns:
        One dictionary a pair, in natural order of the names: ``name``, ``distance``, ``psnr``,
        ``ssim`` as asked for, and ``error``, why one of them is ``None``.

    Raises:
        FolderError: a folder cannot be listed, no image has a partner, or an image has no mask.
        ValueError: an unknown metric, or masks for another than LPIPS.

    Warns:
        Of images without a partner.

    Example:
        >>> rows = evaluate("originals", "decoded", metrics=["lpips", "psnr"])   # doctest: +SKIP
        >>> pandas.DataFrame(rows)                                               # doctest: +SKIP
            name  distance   psnr error
        0  1.png    0.1234  31.21
    """
    unknown = [name for name in metrics if name not in METRIC_NAMES]
    if unknown or not metrics:
        raise ValueError(f"metrics are {list(metrics)}, expected some of {', '.join(METRIC_NAMES)}")
    if mask is not None and set(metrics) != {"lpips"}:
        raise ValueError(f"masks are of LPIPS alone, and metrics are {list(metrics)}")
    check_choice("mask_mode", mask_mode, get_args(MaskMode))
    folders = [folder_b] if isinstance(folder_b, (str, os.PathLike)) else list(folder_b)
    how = Patterns(*match) if isinstance(match, tuple) else match
    pairs, pairings = pair_several(folder_a, folders, match=how, recursive=recursive)
    _warn_of_partnerless(folder_a, folders, pairings)
    if not pairs:
        raise FolderError(f"{folder_a} and {folders[0]} have no image in common")
    if mask is not None:
        pairs = with_masks(pairs, mask, match=how, recursive=recursive)
    if model is not None:
        device = model.scaling_layer.shift.device
    place = torch.device(device or "cpu")
    measures: list[Measure] = []
    for name in metrics:
        if name == "lpips":
            model = kept_model(net, device=place) if model is None else model
            measures.append(
                Distance(model, per_layer=per_layer, mask_mode=mask_mode, fill_value=fill_value)
            )
        else:
            measures.append(PSNR() if name == "psnr" else SSIM())
    with Evaluation(
        measures,
        device=place,
        folders=[folder_a, *folders],
        alpha=alpha,
        max_pixels=max_pixels,
        preprocessing=Preprocessing(resize, crop),
        batch=batch or (16 if place.type == "cpu" else 64),
        workers=workers,
    ) as evaluation:
        columns = [column.name for column in evaluation.columns]
        return [
            {
                "name": row.name,
                **({"folder": row.folder} if len(folders) > 1 else {}),
                **dict(zip(columns, row.values)),
                "error": row.error,
            }
            for rows in evaluation.rows(pairs)
            for row in rows
        ]


def _warn_of_partnerless(
    folder_a: object, folders: Sequence[object], pairings: Sequence[Pairing]
) -> None:
    for folder, pairing in zip(folders, pairings):
        for own, other, names in (
            (folder_a, folder, pairing.only_in_0),
            (folder, folder_a, pairing.only_in_1),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                warnings.warn(
                    f"without a partner in {other}: {', '.join(names[:5])}{more} of {own}",
                    stacklevel=3,
                )
