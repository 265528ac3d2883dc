"""What distances are made of as a page: each image's layers and their maps, tables and drawings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..analysis.parts import ChannelImportance, LayerContributions, NormalizationTable
from ..folders.summary import number_text
from ..images.heatmap import plane_of, rgb_of
from .of_folders import parts_of
from .page import Column, Entry, Figure, Page, Panel, Table
from .pictures import embedded, map_picture, thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from torch import Tensor

__all__ = ["page_of_analysis"]

_DPI = 100


def page_of_analysis(
    contributions: LayerContributions,
    maps: Mapping[str, Tensor],
    table: NormalizationTable,
    importance: ChannelImportance,
    *,
    reference: Tensor,
    images: Sequence[Tensor],
    names: Sequence[str],
    drawings: Mapping[str, Drawing],
    title: str,
    facts: Mapping[str, str],
    shared_scale: bool = False,
    warning: str = "",
) -> Page:
    """The page of one reference and the images that are compared with it.

    Args:
        contributions, maps, table, importance: of all images, as :mod:`lpips_fast.analysis` makes
            them.
        reference, images: each (1, 3, H, W) in [-1, 1].
        names: of the reference, and of each image.
        drawings: what is shown below, by its heading.
        title, facts, warning: as for :class:`Page`.
        shared_scale: one colour scale for the maps of all layers.
    """
    of_reference = Panel(names[0], thumbnail(rgb_of(reference)))
    entries = []
    for k, (name, image) in enumerate(zip(names[1:], images, strict=True)):
        values = contributions.values[k].tolist()
        planes = {layer: plane_of(of_layer[k]) for layer, of_layer in maps.items()}
        panels = [of_reference, Panel(name, thumbnail(rgb_of(image)))]
        total = np.sum(list(planes.values()), axis=0)
        brightest = max(float(plane.max()) for plane in planes.values())
        for heading, plane in {"sum of layers": total, **planes}.items():
            is_shared = shared_scale and plane is not total
            end = brightest if is_shared else float(plane.max())
            panels.append(Panel(heading, map_picture(plane, end), number_text(end)))
        entries.append(
            Entry(
                name,
                (number_text(float(contributions.distances[k])),),
                panels=tuple(panels),
                parts=parts_of(contributions.layers, values),
            )
        )
    distances = contributions.distances.tolist()
    return Page(
        title=title,
        subtitle=contributions.metric,
        facts=facts,
        columns=[Column("distance", "distance")],
        entries=entries,
        first=sorted(range(len(entries)), key=lambda k: -distances[k]),
        tables_below=[_normalizations(table), _channels(importance)],
        figures=[_figure(heading, drawing) for heading, drawing in drawings.items()],
        warning=warning,
    )


def _normalizations(table: NormalizationTable) -> Table:
    rows = [
        [
            result.name,
            number_text(result.mean),
            *(f"{100 * x / (sum(result.layer_means) or 1):.1f} %" for x in result.layer_means),
        ]
        for result in table
    ]
    head = ("normalisation", "mean distance", *(f"share of {layer}" for layer in table.layers))
    return Table(
        "Normalisations side by side",
        head,
        rows,
        note="LPIPS is l2. Distances of two normalisations share no unit.",
    )


def _channels(importance: ChannelImportance) -> Table:
    rows = [
        [
            of_layer.layer,
            f"{len(of_layer.weights)}",
            f"{of_layer.unused_channels}",
            f"{of_layer.effective_channels:.1f}",
            f"{100 * of_layer.share:.1f} %",
        ]
        for of_layer in importance
    ]
    head = ("layer", "channels", "of weight 0", "effective: (Σw)² / Σw²", "share of all weight")
    return Table("Channels and their learned weights", head, rows)


def _figure(heading: str, drawing: Drawing) -> Figure:
    file = io.BytesIO()
    drawing.savefig(file, format="png", dpi=_DPI, facecolor="white")
    width, height = (round(inches * _DPI) for inches in drawing.get_size_inches())
    return Figure(heading, embedded(file.getvalue(), "png"), width, height)
