"""A run over folders as a page: its numbers all, pictures of the worst pairs.

The pictures are made after the run, of files that are read again: a run that goes on, or that finds
nothing to do, has the same page as one that measured everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..analysis.parts import layer_contributions, layer_maps, layer_names
from ..folders.evaluating import Evaluation, is_out_of_memory
from ..folders.measures import Batch, Distance
from ..folders.measures import Column as MeasuredColumn
from ..folders.pairing import Pair, told_apart
from ..folders.results import Results
from ..folders.summary import Statistics, number_text
from ..images.heatmap import plane_of
from .histogram import histograms
from .page import Card, Column, Entry, Page, Panel, Part, Spread, Table
from .pictures import map_picture, thumbnail

__all__ = ["PICTURED", "page_of_run", "parts_of"]

#: Of so many pairs, the worst, a page has pictures.
PICTURED = 200

_LONGEST_OF_MASK = 64

_Step = Callable[[int], object]


def page_of_run(
    results: Results,
    evaluation: Evaluation,
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
    called: Mapping[str, str] | None = None,
    warning: str = "",
    progress: _Step = lambda count: None,
) -> Page:
    """The page of a run that has come to its end.

    Args:
        results: its rows.
        evaluation: what measured them; it reads the images for the pictures.
        title, subtitle, facts, warning: as for :class:`Page`.
        called: what to call a folder, where its label is not it.
        progress: is called with the number of pairs of which pictures were made.

    Worst is what has the largest distance, or where LPIPS was not measured the worst number of the
    first column. Of pairs that could not be measured there are no pictures, but the reason.
    """
    columns = evaluation.columns
    distances = {m.columns[0].name: m for m in evaluation.measures if isinstance(m, Distance)}
    # Pictures and order are of one column: the first that is a distance.
    by = next((k for k, column in enumerate(columns) if column.name in distances), 0)
    distance = distances.get(columns[by].name)
    first = _worst(results.numbers[by], columns[by].higher_is_better)[:PICTURED]
    errors = {(row.name, row.folder): row.error for row in results.failed}
    entries = [
        Entry(
            pair.name,
            tuple(_text(numbers[k]) for numbers in results.numbers),
            pair.folder,
            errors.get((pair.name, pair.folder), ""),
        )
        for k, pair in enumerate(results.pairs)
    ]
    layers = [k for k, column in enumerate(columns) if column.part_of == columns[by].name]
    for k in first:
        if distance is not None and not math.isnan(results.numbers[by][k]):
            # Of the run, where it has them: measured alone, the last digit may be another.
            values = [results.numbers[layer][k] for layer in layers]
            entries[k] = _with_pictures(entries[k], results.pairs[k], evaluation, distance, values)
        progress(1)
    folders = results.folders()
    names = {folder: (called or {}).get(folder, folder) for folder in folders}
    tables = [_statistics(results, columns, names)]
    if len(folders) > 1:
        tables.insert(0, _differences(results, columns, names))
    return Page(
        title=title,
        subtitle=subtitle,
        facts=facts,
        columns=[Column(c.name, c.title, c.higher_is_better) for c in columns],
        entries=entries,
        first=first,
        sorted_by=by,
        cards=[_card(results, column, names) for column in columns if not column.part_of],
        tables=tables,
        warning=warning,
    )


def _worst(numbers: Sequence[float], higher_is_better: bool) -> list[int]:
    """All rows, the worst first; what has no number comes last."""
    sign = 1 if higher_is_better else -1

    def key(row: int) -> tuple[bool, float]:
        number = numbers[row]
        return math.isnan(number), 0.0 if math.isnan(number) else sign * number

    return sorted(range(len(numbers)), key=key)


def _text(number: float) -> str:
    return "" if math.isnan(number) else number_text(number)


# ------------------------------------------------------------------------------ pictures


def _with_pictures(
    entry: Entry, pair: Pair, evaluation: Evaluation, distance: Distance, values: list[float]
) -> Entry:
    try:
        batch = evaluation.read(pair)
        with torch.inference_mode():
            layers, map = _layers_and_map(distance, batch)
        plane = plane_of(map)
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        return _noted(entry, str(error) or "there is no memory to draw it")
    names = told_apart([pair.path0, pair.path1])
    return Entry(
        entry.name,
        entry.numbers,
        entry.folder,
        entry.error,
        panels=(
            Panel(names[0], thumbnail(batch.pixels0[0])),
            Panel(names[1], thumbnail(batch.pixels1[0])),
            *(
                # A fourth picture, and small: the page's size is bounded for three.
                Panel("mask", thumbnail(np.stack([mask] * 3, axis=2), _LONGEST_OF_MASK))
                for mask in batch.masks
            ),
            Panel("where they differ", map_picture(plane), number_text(float(plane.max()))),
        ),
        parts=parts_of(layer_names(distance.model), values or layers),
    )


def _layers_and_map(distance: Distance, batch: Batch) -> tuple[list[float], torch.Tensor]:
    """Of one pair: each layer's part, and where the images differ."""
    model, masking = distance.model, {}
    if batch.mask is None:
        features = model.encode(torch.cat(batch.images))  # the trunk runs once, for both
        both: Any = (features[:1], features[1:])
    else:  # which may fill the images themselves
        both, masking = batch.images, {"mask": batch.mask, **distance.masking}
    layers = layer_contributions(model, *both, **masking).values[0].tolist()
    return layers, torch.stack(list(layer_maps(model, *both, **masking).values())).sum(dim=0)


def _noted(entry: Entry, reason: str) -> Entry:
    note = f"no pictures: {' '.join(reason.split())}"
    return Entry(entry.name, entry.numbers, entry.folder, entry.error, note=note)


def parts_of(layers: Sequence[str], values: Sequence[float]) -> tuple[Part, ...]:
    """Each layer's number and its bar."""
    longest = max([*map(abs, values), 0.0]) or 1.0
    return tuple(
        Part(layer, number_text(value), round(100 * max(value, 0.0) / longest, 1))
        for layer, value in zip(layers, values, strict=True)
    )


# ------------------------------------------------------------------------------ the summary


def _card(results: Results, column: MeasuredColumn, names: Mapping[str, str]) -> Card:
    statistics = {folder: results.statistics(folder)[column.name] for folder in names}
    drawn = histograms([list(s.values) for s in statistics.values()])
    spreads = []
    for (folder, of_folder), histogram in zip(statistics.items(), drawn):
        ends = ("", "")
        if histogram is not None:
            ends = number_text(histogram.low), number_text(histogram.high)
        label = names[folder] if len(names) > 1 else ""
        spreads.append(Spread(label, _words(of_folder), histogram, *ends))
    return Card(column.title, spreads, column.higher_is_better)


def _words(statistics: Statistics) -> str:
    if statistics.mean is None:
        return "none could be measured"
    error = statistics.standard_error
    words = f"mean {statistics.mean:.6f}"
    words += "" if error is None else f" ± {error:.6f} (standard error)"
    words += f", median {statistics.median:.6f}, {statistics.count:,} pairs"
    if statistics.infinite:
        words += f", of which {statistics.infinite:,} are identical"
    return words


def _known(number: float | None) -> str:
    return "–" if number is None else number_text(number)


_HEAD = ("mean", "standard error", "median", "5 %", "25 %", "75 %", "95 %", "pairs")


def _row(statistics: Statistics) -> list[str]:
    low, quarter, median, three_quarters, high = statistics.percentiles(5, 25, 50, 75, 95)
    numbers = (statistics.mean, statistics.standard_error, median, low, quarter, three_quarters)
    return [*map(_known, (*numbers, high)), f"{statistics.count:,}"]


def _statistics(
    results: Results, columns: Sequence[MeasuredColumn], names: Mapping[str, str]
) -> Table:
    rows = []
    for folder, name in names.items():
        of_folder = results.statistics(folder)
        for column in columns:
            label = f"{name}: {column.title}" if len(names) > 1 else column.title
            rows.append([label, *_row(of_folder[column.name])])
    return Table("All columns: mean and percentiles", ("", *_HEAD), rows, is_open=False)


def _differences(
    results: Results, columns: Sequence[MeasuredColumn], names: Mapping[str, str]
) -> Table:
    reference, *others = names
    rows = []
    for folder in others:
        of_folder = results.differences(folder, reference)
        for column in columns:
            if not column.part_of:
                label = f"{names[folder]} − {names[reference]}: {column.title}"
                rows.append([label, *_row(of_folder[column.name])])
    return Table(
        "Paired differences",
        ("", *_HEAD),
        rows,
        note="Of every image that both folders have, one number less the other. Their standard "
        "error says whether two folders differ.",
    )
