"""Pictures of :mod:`lpips_fast.analysis`: each function takes a result and returns a Figure.

    figure = plot_layer_contributions(layer_contributions(model, in0, in1))
    figure.savefig("layers.png", dpi=150)

Matplotlib is the extra ``plots`` (``pip install "lpips-fast[plots]"``). It is used through its
object interface: no window, no display, no ``pyplot`` state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..features import Features
from ..images.heatmap import COLOUR_MAP, _shortened, drawable, plane_of, rgb_of
from ..normalization import (
    NORMALIZATIONS,
    accumulator_dtype,
    channel_norms,
    check_normalization,
    normalize_features,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .parts import (
        ChannelImportance,
        LayerContributions,
        NormalizationResult,
        NormalizationTable,
    )

__all__ = [
    "plot_channel_importance",
    "plot_layer_contributions",
    "plot_layer_maps",
    "plot_normalization_table",
    "plot_normalizations",
    "require_matplotlib",
]

# Paul Tol's bright palette, which readers with any colour vision can tell apart.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_INK, _PALE = "#333333", "#dddddd"

_PAIRS_SHOWN = 16  # more are summed up: their names and bars could not be read
_BINS = 40


def require_matplotlib() -> None:
    """Raises an ImportError that says what to install, before any work and not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('drawing needs Matplotlib: pip install "lpips-fast[plots]"') from error


def _new_figure(width: float, height: float, title: str | None) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        # File names hold dollar signs; parse_math=False keeps them from being read as formulas.
        figure.suptitle(drawable(title), fontsize=11, parse_math=False)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _layer_colours(count: int) -> list[Any]:
    """From the first layer, dark, to the last, bright."""
    require_matplotlib()
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.05, 0.92, count)]


# --------------------------------------------------------------------------------- normalisations


def plot_normalizations(
    features: Features | Sequence[Tensor] | Tensor,
    *,
    normalizations: Sequence[str] = tuple(NORMALIZATIONS),
    layers: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Activations and channel norms before and after each normalisation, as histograms.

    Args:
        features: of one image or more: what :meth:`LPIPS.encode` returns, or tensors (N, C, H, W),
            one a layer.
        normalizations: which ones; the features as they are always come first.
        layers: their names; ``None``: numbered from 1.
        title: over all panels.

    Returns:
        A figure of two rows. Above: how often an activation has a value, over all channels and
        positions, on a logarithmic scale, for most are 0. Below: the L2 norms of the channel
        vectors, from the least to the largest, with the middle half and the median; ``l2`` makes
        them 1, ``std`` the root of the number of channels.

    Raises:
        ValueError: no features, features with NaN or infinity, an unknown normalisation, or as
            many names as there are not layers.
        ImportError: Matplotlib is not installed.
    """
    taps = _taps(features)
    if layers is None:
        layers = [f"layer {k + 1}" for k in range(len(taps))]
    if len(layers) != len(taps):
        raise ValueError(f"expected the names of {len(taps)} layers, got {len(layers)}")
    kinds = [check_normalization(name) for name in normalizations if name != "none"]
    figure = _new_figure(2.9 * (1 + len(kinds)) + 0.6, 3.7 + 0.3 * len(taps), title)
    ratios = {"height_ratios": (2.5, 0.7 + 0.3 * len(taps))}
    grid = figure.subplots(2, 1 + len(kinds), squeeze=False, gridspec_kw=ratios)
    colours = _layer_colours(len(taps))

    for column, kind in enumerate(("none", *kinds)):
        values, norms = [], []
        for tap in taps:
            normal = normalize_features(tap, kind)  # type: ignore[arg-type]
            values.append(_to_numpy(normal))
            norms.append(_to_numpy(channel_norms(normal)))
        above, below = grid[:, column]
        heading = "before" if kind == "none" else f"{kind}: {NORMALIZATIONS[kind].formula}"
        above.set_title(heading, fontsize=9, parse_math=False)
        above.set_xlabel("activation" if kind == "none" else "normalised activation", fontsize=9)
        _histograms(above, values, colours, layers)
        below.set_xlabel("L2 norm of the channel vector", fontsize=9)
        _ranges(below, norms, colours)
        below.set_yticks(range(len(taps)), layers if column == 0 else [])
    grid[0, 0].set_ylabel("share of activations per bin, %", fontsize=9)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(taps),
        frameon=False,
        fontsize=9,
    )
    return figure


def _taps(features: Features | Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(features, Features):
        features = features.taps
    taps = [features] if isinstance(features, Tensor) else list(features)
    if not taps or any(tap.dim() != 4 or tap.numel() == 0 for tap in taps):
        shapes = [tuple(tap.shape) for tap in taps]
        raise ValueError(f"expected features (N, C, H, W), one a layer, got {shapes}")
    if not all(bool(torch.isfinite(tap).all()) for tap in taps):
        raise ValueError("the features hold NaN or infinity: look at the images they are of")
    return [tap.detach().to(accumulator_dtype(tap.dtype)) for tap in taps]


def _to_numpy(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().flatten().numpy()


def _histograms(
    axes: Axes, samples: Sequence[NDArray[Any]], colours: Sequence[Any], labels: Sequence[str]
) -> None:
    low, high = min(s.min() for s in samples), max(s.max() for s in samples)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    for sample, colour, label in zip(samples, colours, labels):
        counts, _ = np.histogram(sample, edges)
        axes.stairs(100 * counts / sample.size, edges, color=colour, label=label, linewidth=1.3)
    axes.set_xlim(low, high)
    axes.set_yscale("log")
    _tidy(axes)


def _ranges(axes: Axes, samples: Sequence[NDArray[Any]], colours: Sequence[Any]) -> None:
    """A row a sample: from the least to the largest, the middle half, the median."""
    for row, (sample, colour) in enumerate(zip(samples, colours)):
        low, first, middle, third, high = np.percentile(sample, (0, 25, 50, 75, 100))
        axes.plot([low, high], [row, row], color=colour, linewidth=1.3)
        axes.plot([first, third], [row, row], color=colour, linewidth=7, solid_capstyle="butt")
        axes.plot(middle, row, "o", color="white", markeredgecolor=colour, markersize=5)
    largest = max(float(sample.max()) for sample in samples)
    axes.set_xlim(0, 1.06 * largest if largest > 0 else 1.0)
    axes.set_ylim(len(samples) - 0.5, -0.5)
    axes.grid(axis="x", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    _tidy(axes)


def plot_normalization_table(
    table: NormalizationTable,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """The same pairs with each normalisation: how distances spread, and what layers add.

    Args:
        table: what :func:`lpips_fast.analysis.compare_normalizations` returns.
        names: of the pairs, for a legend of up to seven; ``None``: none.
        title: over the panels; ``None``: the metric.

    Returns:
        A figure. To the left each pair's distance over the mean of its normalisation, for more
        than one pair; to the right the layers' shares of the mean distance.

    Raises:
        ValueError: as many names as there are not pairs.
        ImportError: Matplotlib is not installed.
    """
    count = len(table.results[0].distances)
    if names is not None and len(names) != count:
        raise ValueError(f"expected the names of {count} pairs, got {len(names)}")
    title = title or table.metric
    height = 1.6 + 0.42 * len(table)
    if count > 1:
        figure = _new_figure(12.0, height, title)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
        shown = names if names is not None and count <= len(_COLOURS) else None
        _spreads(left, table, shown)
        left.set_yticks(range(len(table)), [_with_mean(r) for r in table])
    else:
        figure = _new_figure(7.6, height, title)
        right = figure.add_subplot()
        right.set_yticks(range(len(table)), [_with_mean(r) for r in table])
    means = np.array([r.layer_means for r in table])
    totals = means.sum(axis=1, keepdims=True)
    _stacked(right, 100 * means / np.where(totals == 0, 1, totals), table.layers)
    right.set_xlabel("share of the mean distance, %" if count > 1 else "share, %", fontsize=9)
    right.set_ylim(len(table) - 0.5, -0.5)
    for axes in figure.axes:
        axes.tick_params(axis="y", labelsize=9)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(
                handles,
                labels,
                loc="outside lower right" if axes is right else "outside lower left",
                ncols=len(labels) if axes is right else 4,
                frameon=False,
                fontsize=8.5,
                columnspacing=1.2,
                handlelength=1.2,
            )
    return figure


def _with_mean(result: NormalizationResult) -> str:
    deviation = "" if math.isnan(result.deviation) else f" ± {result.deviation:.3g}"
    return f"{result.name}: {result.mean:.3g}{deviation}"


def _spreads(axes: Axes, table: NormalizationTable, names: Sequence[str] | None) -> None:
    for row, result in enumerate(table):
        scale = 1 / result.mean if result.mean else 0.0
        ends = [scale * end for end in result.range]
        axes.plot(ends, [row, row], color=_PALE, linewidth=6, zorder=1)
        for k, distance in enumerate(result.distances):
            axes.scatter(
                distance * scale,
                row,
                s=44 if names else 22,
                color=_COLOURS[k] if names else _COLOURS[0],
                alpha=1.0 if names else 0.55,
                edgecolor="white",
                linewidth=0.6,
                zorder=2,
                label=_shortened(names[k], 2.0) if names and row == 0 else None,
            )
    axes.axvline(1, color=_INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(0, None)
    axes.set_xlabel("distance / mean distance of the same normalisation", fontsize=9)
    axes.set_ylabel("normalisation: mean ± deviation", fontsize=9, labelpad=8)
    _tidy(axes)


# ----------------------------------------------------------------------------------------- layers


def plot_layer_contributions(
    contributions: LayerContributions,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Each layer's part of the distance, and its share.

    One pair is drawn as a bar a layer. Up to 16 pairs are a stacked bar each, beside the shares.
    Of more, means are drawn, with the standard deviation over pairs as whiskers.

    Args:
        contributions: what :func:`lpips_fast.analysis.layer_contributions` returns.
        names: of the pairs.
        title: over the panels; ``None``: the metric.

    Raises:
        ValueError: as many names as there are not pairs.
        ImportError: Matplotlib is not installed.
    """
    values = contributions.values.detach().cpu().double().numpy()
    shares = 100 * contributions.shares.detach().cpu().double().numpy()
    count, depth = values.shape
    if names is not None and len(names) != count:
        raise ValueError(f"expected the names of {count} pairs, got {len(names)}")
    title = title or contributions.metric
    if count == 1 and names is not None:
        title = f"{title}\n{_shortened(names[0], 7.0)}"
    colours = _layer_colours(depth)
    if 1 < count <= _PAIRS_SHOWN:
        labels = [_shortened(n, 2.4) for n in names or [f"pair {k + 1}" for k in range(count)]]
        figure = _new_figure(10.0, 1.9 + 0.42 * count, title)
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, parts, unit in ((left, values, "distance"), (right, shares, "share, %")):
            _stacked(axes, parts, contributions.layers, numbered=axes is right)
            axes.set_xlabel(unit, fontsize=9)
        for row, total in enumerate(values.sum(axis=1)):
            left.annotate(
                f"{total:.8f}",
                (total, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        left.set_xlim(0, 1.3 * max(values.sum(axis=1).max(), 1e-12))
        left.set_yticks(range(count), labels, parse_math=False)
        left.set_ylim(count - 0.5, -0.5)
        figure.legend(
            *right.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=depth,
            frameon=False,
            fontsize=9,
        )
        return figure

    figure = _new_figure(7.2, 1.5 + 0.42 * depth, title)
    axes = figure.add_subplot()
    means = values.mean(axis=0)
    deviations = values.std(axis=0, ddof=1) if count > 1 else np.zeros(depth)
    axes.barh(
        range(depth),
        means,
        xerr=deviations if count > 1 else None,
        color=colours,
        height=0.72,
        error_kw={"ecolor": "#808080", "elinewidth": 1, "capsize": 3},
    )
    ends = means + deviations
    for row, (end, value, share) in enumerate(zip(ends, means, shares.mean(axis=0))):
        axes.annotate(
            f"{value:.8f}  ({share:.0f} %)",
            (end, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(depth), contributions.layers)
    axes.set_ylim(depth - 0.5, -0.5)
    axes.set_xlim(0, 1.4 * max(ends.max(), 1e-12))
    total = contributions.distances.mean().item()  # as it is printed elsewhere
    of = f"sum {total:.8f}" if count == 1 else f"mean of {count} pairs, sum {total:.8f}"
    axes.set_xlabel(f"part of the distance ({of})", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    _tidy(axes)
    axes.tick_params(axis="y", labelsize=9)
    return figure


def _ink_on(colour: Any) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _stacked(
    axes: Axes, parts: NDArray[Any], layers: Sequence[str], *, numbered: bool = True
) -> None:
    """A bar a row of ``parts``, (rows, layers); ``numbered`` ones are shares in percent."""
    starts = np.zeros(len(parts))
    for name, colour, widths in zip(layers, _layer_colours(len(layers)), parts.T):
        axes.barh(range(len(parts)), widths, left=starts, color=colour, height=0.72, label=name)
        for row, width in enumerate(widths):
            if numbered and width >= 6:  # narrower parts have no room for a number
                axes.text(
                    starts[row] + width / 2,
                    row,
                    f"{width:.0f}",
                    color=_ink_on(colour),
                    ha="center",
                    va="center",
                    fontsize=8,
                )
        starts = starts + widths
    if numbered:
        axes.set_xlim(0, 100)
    _tidy(axes)


def plot_layer_maps(
    maps: Mapping[str, Tensor],
    image0: Tensor | NDArray[Any],
    image1: Tensor | NDArray[Any],
    *,
    names: Sequence[str] = ("first image", "second image"),
    title: str | None = None,
    shared_scale: bool = False,
) -> Figure:
    """Each layer's distance map of one pair beside its two images, and the sum of all.

    Args:
        maps: what :func:`lpips_fast.analysis.layer_maps` returns for one pair.
        image0, image1: float (3, H, W) or (1, 3, H, W) in [-1, 1], or uint8 (H, W, 3).
        names: of the images.
        title: over all panels.
        shared_scale: one colour scale for all layers, which shows what each adds; otherwise each
            has its own, which shows what each sees.

    Raises:
        ValueError: no maps, maps of more than one pair, with NaN or infinity, or no images.
        ImportError: Matplotlib is not installed.
    """
    if not maps:
        raise ValueError("expected the map of at least one layer, got none")
    planes = {name: plane_of(map) for name, map in maps.items()}
    panels: list[tuple[str, NDArray[Any]]] = [
        (_shortened(name, 2.4), rgb_of(image)) for name, image in zip(names, (image0, image1))
    ]
    total = np.sum(list(planes.values()), axis=0)
    panels += [
        (f"{name}: mean {plane.mean(dtype=np.float64):.6f}", plane)
        for name, plane in {"sum of layers": total, **planes}.items()
    ]
    aspect = total.shape[0] / total.shape[1]
    if aspect > 0.45:  # four or five a row, whichever leaves fewer places empty
        columns, place = min((4, 5), key=lambda n: (-len(panels) % n, n)), 2.35
    else:  # wide pictures want room
        columns, place = (2, 5.0) if aspect > 0.15 else (1, 9.0)
    height = min(place * aspect, 5.0)  # inches of a panel, whose width is that of its place at most
    width = height / aspect
    rows = math.ceil(len(panels) / columns)
    figure = _new_figure(
        (place + 0.6) * columns, (max(height, 0.3) + 0.3) * rows + (0.4 if title else 0.1), title
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    brightest = max(float(plane.max()) for plane in planes.values())
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, picture) in zip(grid, panels):
        axes.set_title(name, fontsize=9, parse_math=False)
        if picture.ndim == 3:
            axes.imshow(picture, interpolation="antialiased")
            continue
        is_total = picture is total
        top = brightest if shared_scale and not is_total else float(picture.max())
        drawn = axes.imshow(
            picture,
            cmap=COLOUR_MAP,
            vmin=0,
            vmax=top if top > 0 else 1.0,  # equal images: any scale will do, if 0 is dark
            interpolation="antialiased",
        )
        place_of_bar = (1 + 0.07 / width, 0, 0.12 / width, 1)  # beside the panel, in its sizes
        bar = figure.colorbar(drawn, cax=axes.inset_axes(place_of_bar))
        bar.ax.tick_params(labelsize=7)
        if height < 1.2:
            end = drawn.get_clim()[1]
            bar.set_ticks([0, end], labels=["0", f"{end:.2g}"])
        else:
            bar.ax.locator_params(nbins=4)
        if is_total and height > 1.5:
            bar.set_label("distance per position", fontsize=8)
    return figure


# --------------------------------------------------------------------------------------- channels


def plot_channel_importance(importance: ChannelImportance, *, title: str | None = None) -> Figure:
    """How the learned weights are spread over channels, and which are heaviest.

    Args:
        importance: what :func:`lpips_fast.analysis.channel_importance` returns.
        title: over the panels; ``None``: the metric.

    Returns:
        A figure: how much of a layer's weight its heaviest channels have; how many channels there
        are, have a weight, and count; below, the heaviest of each layer.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    depth = len(importance)
    longest = max(len(r.top) for r in importance)
    lower = 0.7 + 0.2 * longest
    figure = _new_figure(max(2.1 * depth, 9.6), 3.5 + lower, title or importance.metric)
    outer = figure.add_gridspec(2, 1, height_ratios=(3.0, lower))
    figure.set_layout_engine("constrained", h_pad=0.1)
    upper_row = outer[0].subgridspec(1, 2)
    spread, counts = (figure.add_subplot(upper_row[k]) for k in range(2))
    colours = _layer_colours(depth)
    for r, colour in zip(importance, colours):
        sizes = r.weights.abs().sort(descending=True).values.numpy()
        total = sizes.sum()
        gathered = np.concatenate([[0.0], np.cumsum(sizes) / total if total else 0 * sizes])
        part = np.linspace(0, 100, len(gathered))
        spread.plot(part, 100 * gathered, color=colour, label=r.layer, linewidth=1.6)
    spread.plot([0, 100], [0, 100], color=_INK, linewidth=0.8, linestyle="--", label="equal")
    spread.set(xlim=(0, 100), ylim=(0, 101))
    spread.set_xlabel("heaviest channels of the layer, %", fontsize=9)
    spread.set_ylabel("share of the layer's weight, %", fontsize=9)
    spread.legend(frameon=False, fontsize=8, loc="lower right")
    _tidy(spread)

    positions = np.arange(depth)
    groups: tuple[tuple[str, list[float], str], ...] = (
        ("channels", [len(r.weights) for r in importance], _PALE),
        (
            "of weight other than 0",
            [len(r.weights) - r.unused_channels for r in importance],
            "#99bbdd",
        ),
        ("effective: (Σw)² / Σw²", [r.effective_channels for r in importance], _COLOURS[0]),
    )
    for k, (label, heights, colour) in enumerate(groups):
        bars = counts.bar(positions + 0.28 * (k - 1), heights, 0.27, color=colour, label=label)
        counts.bar_label(bars, [f"{h:.0f}" for h in heights], fontsize=7, padding=1)
    counts.set_xticks(positions, [r.layer for r in importance])
    counts.set_ylabel("channels", fontsize=9)
    counts.set_ylim(0, 1.3 * max(groups[0][1]))
    counts.legend(frameon=False, fontsize=8, loc="upper left", ncols=1)
    _tidy(counts)

    lower_row = outer[1].subgridspec(1, depth)
    for k, (r, colour) in enumerate(zip(importance, colours)):
        axes = figure.add_subplot(lower_row[k])
        rows = range(len(r.top))
        axes.barh(rows, [100 * share for _, _, share in r.top], color=colour, height=0.75)
        axes.set_yticks(rows, [str(channel) for channel, _, _ in r.top])
        axes.set_ylim(len(r.top) - 0.4, -0.6)
        axes.set_title(f"{r.layer}: {100 * r.share:.0f} % of all weight", fontsize=9)
        axes.set_xlabel("share of the layer, %", fontsize=8.5)
        if k == 0:
            axes.set_ylabel("channel", fontsize=9)
        _tidy(axes)
    return figure
