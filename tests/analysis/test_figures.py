"""The pictures of an analysis: true to the numbers, labelled, nothing overlaps, no display."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from many_images import model_of, some_images
from torch import Tensor

from lpips_fast import LPIPS, Features
from lpips_fast.analysis import figures as plots
from lpips_fast.analysis.parts import (
    LayerContributions,
    NormalizationTable,
    channel_importance,
    compare_normalizations,
    layer_contributions,
    layer_maps,
    layer_names,
)
from lpips_fast.normalization import NORMALIZATIONS

matplotlib = pytest.importorskip("matplotlib", reason="drawing needs Matplotlib")

KINDS = tuple(NORMALIZATIONS)

Figure = Any


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return model_of("squeeze")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return some_images(4)


@pytest.fixture(scope="module")
def table(model: LPIPS, images: Tensor) -> NormalizationTable:
    return compare_normalizations(model, [(images[:1], images[1:])])


@pytest.fixture(scope="module")
def contributions(model: LPIPS, images: Tensor) -> LayerContributions:
    return layer_contributions(model, images[:1], images[1:])


def texts_of(figure: Figure) -> list[Any]:
    """Every text that is drawn: not those of ticks outside an axis' limits."""
    Text = matplotlib.text.Text
    drawn: list[Any] = []
    draw = Text.draw

    def record(text: Any, *arguments: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.canvas.draw()
    return drawn


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def assert_readable(figure: Figure) -> None:
    """No text leaves the picture, and none runs into another."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    assert len(boxes) > 3
    width, height = figure.bbox.width, figure.bbox.height
    for name, box in boxes:
        inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
        assert inside, f"{name!r} leaves the picture"
    for (name0, a), (name1, b) in itertools.combinations(boxes, 2):
        overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
        overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert overlap_x < 1.5 or overlap_y < 1.5, f"{name0!r} runs into {name1!r}"


def pixels_of(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


class TestNormalizations:
    def test_it_is_readable(self, model: LPIPS, images: Tensor) -> None:
        figure = plots.plot_normalizations(
            model.encode(images[:1]), layers=layer_names(model), title="Features of a $file$"
        )
        assert_readable(figure)
        words = words_of(figure)
        for wanted in ("before", "l2: a / (sqrt(sum a²) + eps)", "relu7", "Features of a $file$"):
            assert wanted in words
        assert words.count("L2 norm of the channel vector") == len(KINDS)

    def test_the_histograms_and_norms(self, model: LPIPS, images: Tensor) -> None:
        features = model.encode(images).detach()
        figure = plots.plot_normalizations(features, normalizations=["l2"])
        above_before, above_after, below_before, below_after = figure.axes
        assert above_before.get_title() == "before"
        for axes in (above_before, above_after):  # everything is in some bin
            for stairs in axes.patches:
                assert stairs.get_data().values.sum() == pytest.approx(100)
        # What l2 leaves of the norms is 1; before, the line goes from the least to the largest.
        for line in below_after.lines:
            np.testing.assert_allclose(line.get_xdata(), 1, rtol=1e-5)
        norms = features.taps[2].norm(dim=1)
        np.testing.assert_allclose(
            below_before.lines[6].get_xdata(), [norms.min(), norms.max()], rtol=1e-5
        )
        np.testing.assert_allclose(
            below_before.lines[8].get_xdata(), np.median(norms.numpy()), rtol=1e-5
        )

    def test_any_features(self) -> None:
        generator = torch.Generator()
        print(f"seed {generator.seed()}")
        tap = torch.randn(2, 5, 4, 3, generator=generator)
        assert len(plots.plot_normalizations(tap, normalizations=["none", "max"]).axes) == 4
        assert len(plots.plot_normalizations([tap.half(), tap], normalizations=[]).axes) == 2
        zeros = plots.plot_normalizations(torch.zeros(1, 3, 2, 2))
        assert_readable(zeros)

    @pytest.mark.parametrize(
        ("features", "options", "message"),
        [
            ([], {}, "one a layer, got"),
            (torch.rand(3, 4, 4), {}, "expected features"),
            (torch.full((1, 2, 3, 3), torch.nan), {}, "NaN or infinity"),
            (torch.rand(1, 2, 3, 3), {"layers": ["a", "b"]}, "names of 1 layers, got 2"),
            (torch.rand(1, 2, 3, 3), {"normalizations": ["l7"]}, "unknown normalization 'l7'"),
            (Features((), (8, 8)), {}, "one a layer, got"),
        ],
    )
    def test_errors(self, features: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plots.plot_normalizations(features, **options)


class TestTable:
    def test_several_pairs(self, table: NormalizationTable) -> None:
        figure = plots.plot_normalization_table(table, names=["one.png", "two.png", "$3$.png"])
        assert_readable(figure)
        words = words_of(figure)
        assert "LPIPS squeeze, version 0.1" in words and "two.png" in words
        left, right = figure.axes
        first = [points.get_offsets()[0][0] for points in left.collections[:3]]
        l2 = table["l2"]
        np.testing.assert_allclose(first, np.array(l2.distances) / l2.mean)
        widths = [bar.get_width() for bar in right.patches]
        assert len(widths) == len(KINDS) * 7
        assert sum(widths[:: len(KINDS)]) == pytest.approx(100)  # the first row of each layer
        np.testing.assert_allclose(widths[:: len(KINDS)], 100 * np.array(l2.layer_means) / l2.mean)

    def test_one_pair(self, model: LPIPS, images: Tensor) -> None:
        table = compare_normalizations(model, [(images[:1], images[1:2])])
        figure = plots.plot_normalization_table(table)
        assert len(figure.axes) == 1
        assert_readable(figure)

    def test_equal_images(self, model: LPIPS, images: Tensor) -> None:
        table = compare_normalizations(model, [(images[:2], images[:2].clone())])
        assert_readable(plots.plot_normalization_table(table, names=["a", "b"]))

    def test_names(self, table: NormalizationTable) -> None:
        with pytest.raises(ValueError, match="names of 3 pairs, got 1"):
            plots.plot_normalization_table(table, names=["one"])


class TestLayerContributions:
    def test_some_pairs(self, contributions: LayerContributions) -> None:
        names = [
            "short.png",
            "a/very/long/name/of/a/folder/" + 20 * "long" + ".png",
            "$x$.png",
        ]
        figure = plots.plot_layer_contributions(contributions, names=names)
        assert_readable(figure)
        left, right = figure.axes
        widths = np.array([bar.get_width() for bar in left.patches]).reshape(7, 3)
        np.testing.assert_allclose(widths.T, contributions.values, rtol=1e-6)
        shares = np.array([bar.get_width() for bar in right.patches]).reshape(7, 3)
        np.testing.assert_allclose(shares.sum(axis=0), 100, rtol=1e-5)
        assert {bar.get_x() for bar in left.patches[:3]} == {0.0}

    def test_one_pair(self, model: LPIPS, images: Tensor) -> None:
        parts = layer_contributions(model, images[:1], images[1:2])
        figure = plots.plot_layer_contributions(parts, names=["a $1 image.png"])
        assert_readable(figure)
        (axes,) = figure.axes
        np.testing.assert_allclose([bar.get_width() for bar in axes.patches], parts.values[0])
        assert "a $1 image.png" in words_of(figure)
        assert f"sum {parts.distances.item():.8f}" in words_of(figure)

    def test_many_pairs(self) -> None:
        generator = torch.Generator()
        print(f"seed {generator.seed()}")
        values = torch.rand(30, 5, generator=generator)
        parts = LayerContributions("a metric", ("a", "b", "c", "d", "e"), values)
        figure = plots.plot_layer_contributions(parts)
        assert_readable(figure)
        (axes,) = figure.axes
        bars = [bar.get_width() for bar in axes.patches]
        np.testing.assert_allclose(bars, values.double().mean(dim=0))
        assert "mean of 30 pairs" in words_of(figure)

    @pytest.mark.parametrize("count", [1, 2])
    def test_equal_images(self, model: LPIPS, images: Tensor, count: int) -> None:
        parts = layer_contributions(model, images[:count], images[:count].clone())
        assert_readable(plots.plot_layer_contributions(parts))

    def test_names(self, contributions: LayerContributions) -> None:
        with pytest.raises(ValueError, match="names of 3 pairs, got 2"):
            plots.plot_layer_contributions(contributions, names=["a", "b"])


class TestLayerMaps:
    @pytest.mark.parametrize("shared", [False, True])
    def test_panels(self, model: LPIPS, images: Tensor, shared: bool) -> None:
        maps = layer_maps(model, images[:1], images[1:2])
        figure = plots.plot_layer_maps(
            maps,
            images[:1],
            images[1],
            names=("ref.png", "img.png"),
            title="T",
            shared_scale=shared,
        )
        assert_readable(figure)
        panels = [axes for axes in figure.axes if axes.get_title()]
        assert [axes.get_title().split(":")[0] for axes in panels] == [
            *("ref.png", "img.png", "sum of layers"),
            *layer_names(model),
        ]
        shown = [np.asarray(axes.images[0].get_array()) for axes in panels]
        assert shown[0].shape == (48, 40, 3) and shown[0].dtype == np.uint8
        for panel, map in zip(shown[3:], maps.values()):
            np.testing.assert_allclose(panel, map[0, 0])
        np.testing.assert_allclose(shown[2], sum(maps.values())[0, 0], rtol=1e-6)
        ends = [axes.images[0].get_clim() for axes in panels[3:]]
        assert all(low == 0 for low, _ in ends)
        assert len({high for _, high in ends}) == (1 if shared else 7)

    @pytest.mark.parametrize("size", [(16, 300), (300, 16), (8, 8)], ids=str)
    def test_any_shape(self, size: tuple[int, int]) -> None:
        generator = torch.Generator()
        print(f"seed {generator.seed()}")
        maps = {f"relu{k}": torch.rand(1, 1, *size, generator=generator) for k in range(5)}
        image = np.zeros((*size, 3), np.uint8)
        figure = plots.plot_layer_maps(maps, image, image, title="LPIPS")
        assert_readable(figure)
        width, height = figure.get_size_inches()
        assert 2 < width < 20 and 2 < height < 15

    def test_equal_images_are_all_dark(self) -> None:
        figure = plots.plot_layer_maps({"relu1": torch.zeros(8, 8)}, *np.zeros((2, 8, 8, 3), "u1"))
        assert figure.axes[2].images[0].get_clim() == (0, 1)

    def test_errors(self, model: LPIPS, images: Tensor) -> None:
        with pytest.raises(ValueError, match="at least one layer, got none"):
            plots.plot_layer_maps({}, images[0], images[1])
        with pytest.raises(ValueError, match="the map of one pair"):
            plots.plot_layer_maps({"a": torch.rand(2, 1, 48, 40)}, images[0], images[1])


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_channel_importance(net: str) -> None:
    model = model_of(net)
    importance = channel_importance(model)
    figure = plots.plot_channel_importance(importance)
    assert_readable(figure)
    spread, counts, *tops = figure.axes
    assert len(tops) == model.L
    for line, layer in zip(spread.lines, importance):
        rising = line.get_ydata()
        assert rising[0] == 0 and rising[-1] == pytest.approx(100)
        assert (np.diff(rising) >= -1e-9).all() and len(rising) == len(layer.weights) + 1
        assert rising[1] == pytest.approx(100 * layer.top[0][2])
    heights = [bar.get_height() for bar in counts.patches]
    assert heights[: model.L] == [len(layer.weights) for layer in importance]
    assert heights[-1] == pytest.approx(importance.layers[-1].effective_channels)
    labels = [label.get_text() for label in tops[0].get_yticklabels()]
    assert labels == [str(channel) for channel, _, _ in importance.layers[0].top]


def test_figures_are_saved_in_any_format(contributions: LayerContributions, tmp_path: Path) -> None:
    for suffix in ("png", "pdf", "svg"):
        figure = plots.plot_layer_contributions(contributions)
        figure.savefig(tmp_path / f"layers.{suffix}")
        assert (tmp_path / f"layers.{suffix}").stat().st_size > 2000


def test_no_pyplot_and_no_display(
    contributions: LayerContributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import raises
    assert pixels_of(plots.plot_layer_contributions(contributions)).std() > 0


def test_colours_of_layers_differ(contributions: LayerContributions) -> None:
    pixels = pixels_of(plots.plot_layer_contributions(contributions))
    seen = {tuple(p) for p in pixels.reshape(-1, 4)[::3].tolist()}
    for colour in plots._layer_colours(7):
        expected = np.rint(np.array(colour[:3]) * 255)
        assert any(np.abs(np.array(c[:3]) - expected).max() <= 1 for c in seen)


def test_without_matplotlib(
    contributions: LayerContributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lpips-fast\[plots\]"'):
        plots.plot_layer_contributions(contributions)
