"""A distance map as a picture that a person can read, and as the numbers behind it.

The picture has a perceptually uniform colour map, a colour bar with its unit, the mean in the
title, and on request the two images beside it. It is drawn with Matplotlib's object interface on
an Agg canvas: no window, no display, no ``pyplot`` state, safe beside the caller's own figures.
Matplotlib is the extra ``plots`` (``pip install "lpips-fast[plots]"``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = [
    "COLOUR_MAP",
    "PICTURE_SUFFIXES",
    "drawable",
    "plane_of",
    "rgb_of",
    "save_heatmap",
    "save_map_numbers",
]

#: What :func:`save_heatmap` writes, by the suffix of the path.
PICTURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")

#: Of distance maps. Dark is alike and bright is different, in equal perceived steps, in grayscale
#: print and to people who are colour-blind as well.
COLOUR_MAP = "magma"

# Inches. Pictures of any size become panels of one area, so that text stays readable beside them;
# no side gets longer than a screen, and a panel's place is never narrower than its title.
_PANEL_AREA = 16.0
_PANEL_LONGEST = 9.0
_PLACE_NARROWEST = 1.9
_FIGURE_NARROWEST = 6.2  # the summary under the title
_GAP = 0.12
_MARGIN = 0.15
_HEADING = 0.7
_PANEL_TITLE = 0.28
_BAR_THICKNESS = 0.18
_BAR_LONGEST = 5.0
_BAR_TEXT_BESIDE, _BAR_TEXT_BELOW = 0.8, 0.45  # ticks and label
_WIDE = 2.5  # wider pictures than this ratio are stacked, narrower ones stand side by side
_DPI = 150


def save_heatmap(
    map: torch.Tensor | NDArray[Any],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    quantity: str = "LPIPS distance",
    label: str | None = None,
    distance: float | None = None,
    image0: torch.Tensor | NDArray[Any] | None = None,
    image1: torch.Tensor | NDArray[Any] | None = None,
    names: Sequence[str] = ("first image", "second image"),
    vmin: float = 0.0,
    vmax: float | None = None,
) -> Path:
    """Write a distance map as a picture.

    Args:
        map: (H, W), (1, H, W) or (1, 1, H, W), as ``LPIPS(spatial=True)`` returns it for one pair.
        path: where to; its suffix (:data:`PICTURE_SUFFIXES`) names the format. An existing file is
            replaced.
        title: the first line above the panels; ``None``: "LPIPS distance map", by ``quantity``.
        quantity: what the colours are of, beside the colour bar: something else for the baseline,
            for another normalisation, or for some of the layers.
        label: which model it is, for example ``"alex, version 0.1"``; part of the second line.
        distance: the averaged distance of the pair, where it is known; part of the second line. It
            is not quite the mean of the map, which is averaged after each layer was enlarged.
        image0: the first image, drawn to the left: float (3, H, W) or (1, 3, H, W) in [-1, 1], or
            uint8 (H, W, 3).
        image1: the second image, likewise.
        names: what stands above the two images.
        vmin: the distance at the dark end of the colour bar.
        vmax: the distance at its bright end; ``None``: the map's largest. Give the same number to
            several pictures to make them comparable. Values outside get the colour of that end,
            and the colour bar then ends in an arrow.

    Returns:
        The path written to.

    Raises:
        ValueError: a wrong shape, a map with NaN or infinity, an unknown suffix, ``vmax <= vmin``.
        OSError: the file cannot be written.
        ImportError: Matplotlib is not installed.

    Example:
        >>> save_heatmap(torch.rand(1, 1, 64, 64), "map.png")     # doctest: +SKIP
        PosixPath('map.png')
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(
            f"cannot tell the picture's format from {path.name!r}: "
            f"expected a name that ends in {', '.join(PICTURE_SUFFIXES)}"
        )
    values = plane_of(map)
    if vmax is not None and not vmax > vmin:
        raise ValueError(f"vmax is {vmax} and vmin is {vmin}: expected vmax to be the larger")
    images = [
        (name, rgb_of(image))
        for name, image in zip(names, (image0, image1), strict=True)
        if image is not None
    ]

    figure = _draw(values, images, f"{quantity} per position", vmin, vmax)
    # File names hold dollar signs; parse_math=False keeps them from being read as formulas.
    width, height = figure.get_size_inches()
    heading = _shortened(title or f"{quantity} map", width * 0.8)
    for text, size, inches in ((heading, 12, 0.3), (_summary(values, label, distance), 9.5, 0.53)):
        figure.text(
            0.5, 1 - inches / height, text, size=size, ha="center", va="center", parse_math=False
        )
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return path


def save_map_numbers(map: torch.Tensor | NDArray[Any], path: str | os.PathLike[str]) -> Path:
    """Write the numbers of a distance map beside its picture, as a float32 (H, W) ``.npy`` file.

    Args:
        map: as for :func:`save_heatmap`.
        path: the picture's path or any other; its suffix is replaced by ``.npy``.

    Returns:
        The path written to; read it with ``numpy.load``.

    Raises:
        ValueError: a wrong shape, or a map with NaN or infinity.
        OSError: the file cannot be written.

    Example:
        >>> save_map_numbers(torch.rand(64, 64), "map.png")       # doctest: +SKIP
        PosixPath('map.npy')
    """
    path = Path(path).with_suffix(".npy")
    np.save(path, plane_of(map))
    return path


def plane_of(map: torch.Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """The map of one pair as (H, W).

    Raises:
        ValueError: another shape, or NaN or infinity in it.
    """
    array = _to_numpy(map)
    if array.ndim < 2 or 0 in array.shape or any(size != 1 for size in array.shape[:-2]):
        raise ValueError(
            f"expected the map of one pair, of shape (H, W) or (1, 1, H, W), got {array.shape}"
        )
    plane = array.reshape(array.shape[-2:]).astype(np.float32)
    if not np.isfinite(plane).all():
        bad = int((~np.isfinite(plane)).sum())
        raise ValueError(
            f"the map holds NaN or infinity at {bad} of {plane.size} positions: "
            f"look at the images that it was made from"
        )
    return plane


def rgb_of(image: torch.Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """An image, float (3, H, W) or (1, 3, H, W) in [-1, 1] or uint8 (H, W, 3), as the latter.

    Raises:
        ValueError: another shape or type.
    """
    array = _to_numpy(image)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return array
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[0] != 3 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"expected an image as float (3, H, W) in [-1, 1] or as uint8 (H, W, 3), "
            f"got {array.dtype} {array.shape}"
        )
    scaled = np.clip((array.astype(np.float32) + 1.0) * 127.5, 0.0, 255.0)
    return np.rint(scaled).astype(np.uint8).transpose(1, 2, 0)


def _to_numpy(values: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        return values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def drawable(name: str) -> str:
    """A file's name as Matplotlib takes it: the bytes of one that is no text as ``\\udcXX``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _summary(values: NDArray[np.float32], label: str | None, distance: float | None) -> str:
    parts = [] if label is None else [label]
    if distance is not None:
        parts.append(f"distance {distance:.8f}")  # as a CSV of distances has it
    parts.append(f"map mean {values.mean(dtype=np.float64):.6f}, max {values.max():.6f}")
    return "   ·   ".join(parts)


def _draw(
    values: NDArray[np.float32],
    images: list[tuple[str, NDArray[np.uint8]]],
    bar_label: str,
    vmin: float,
    vmax: float | None,
) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'drawing a distance map needs Matplotlib: pip install "lpips-fast[plots]"'
        ) from error

    vmax, extend = _bright_end(values, vmin, vmax)
    map_title = "where they differ" if images else ""  # alone, it has the heading
    panels: list[tuple[str, NDArray[Any]]] = [*images, (map_title, values)]

    # Placed by hand: Matplotlib's layout engines leave a colour bar of no use beside a panel that
    # is very wide or very narrow, and let titles run into each other.
    height, width = _panel_inches(*values.shape)
    stacked = width > _WIDE * height
    title_room = _PANEL_TITLE if images else 0.0
    place_width, place_height = max(width, _PLACE_NARROWEST), title_room + height
    if stacked:
        content_width = place_width
        content_height = len(panels) * (place_height + _GAP) + _BAR_THICKNESS + _BAR_TEXT_BELOW
    else:
        content_width = len(panels) * (place_width + _GAP) + _BAR_THICKNESS + _BAR_TEXT_BESIDE
        content_height = place_height
    figure_width = max(content_width + 2 * _MARGIN, _FIGURE_NARROWEST)
    figure_height = _HEADING + content_height + _MARGIN
    figure = Figure(figsize=(figure_width, figure_height))
    FigureCanvasAgg(figure)

    def axes_at(left: float, top: float, width: float, height: float) -> Axes:
        """Axes placed in inches, with `top` counted downwards from the figure's upper edge."""
        bottom = figure_height - top - height
        return figure.add_axes(
            (
                left / figure_width,
                bottom / figure_height,
                width / figure_width,
                height / figure_height,
            )
        )

    left, top = (figure_width - content_width) / 2, _HEADING
    for name, picture in panels:
        axes = axes_at(left + (place_width - width) / 2, top + title_room, width, height)
        # "antialiased" shows positions as sharp squares where the picture is enlarged, and does
        # not alias where it is reduced. The colour map and its ends do nothing to an RGB picture.
        drawn = axes.imshow(
            picture, cmap=COLOUR_MAP, vmin=vmin, vmax=vmax, interpolation="antialiased"
        )
        axes.set_axis_off()
        axes.set_title(_shortened(name, place_width), fontsize=10, parse_math=False)
        if stacked:
            top += place_height + _GAP
        else:
            left += place_width + _GAP

    if stacked:
        length = min(width, _BAR_LONGEST)
        bar_axes = axes_at((figure_width - length) / 2, top, length, _BAR_THICKNESS)
    else:
        length = min(height, _BAR_LONGEST)
        bar_left = left - (place_width - width) / 2
        bar_top = top + title_room + (height - length) / 2
        bar_axes = axes_at(bar_left, bar_top, _BAR_THICKNESS, length)
    bar = figure.colorbar(
        drawn, cax=bar_axes, extend=extend, orientation="horizontal" if stacked else "vertical"
    )
    # A long name gets smaller rather than longer than the bar: about 12 characters an inch.
    size = min(10.0, 10 * 12 * length / len(bar_label))
    bar.set_label(bar_label, fontsize=size, parse_math=False)
    bar.ax.tick_params(labelsize=9)
    return figure


def _bright_end(
    values: NDArray[np.float32], vmin: float, vmax: float | None
) -> tuple[float, Literal["neither", "min", "max", "both"]]:
    """The distance at the bright end, and the ends beyond which the map has values."""
    lowest, highest = float(values.min()), float(values.max())
    if vmax is None:
        # Two equal images have no largest difference: any scale will do, as long as 0 is dark.
        vmax = highest if highest > vmin else vmin + 1.0
    if lowest < vmin:
        return vmax, "both" if highest > vmax else "min"
    return vmax, "max" if highest > vmax else "neither"


def _panel_inches(height: int, width: int) -> tuple[float, float]:
    scale = min((_PANEL_AREA / (height * width)) ** 0.5, _PANEL_LONGEST / max(height, width))
    return height * scale, width * scale


def _shortened(name: str, inches: float) -> str:
    # About 12 characters an inch at 10 points. The end of a path tells more than its start.
    name, room = drawable(name), int(inches * 12)
    return name if len(name) <= room else "…" + name[-(room - 1) :]
