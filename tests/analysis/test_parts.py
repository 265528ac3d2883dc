"""What a distance is made of: figures against the model, and tables that can be read."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from many_images import model_of, some_images

from lpips_fast import LPIPS
from lpips_fast.analysis.parts import (
    ChannelImportance,
    channel_importance,
    compare_normalizations,
    describe,
    layer_contributions,
    layer_maps,
    layer_names,
    rank_correlation,
)
from lpips_fast.normalization import NORMALIZATIONS

KINDS = tuple(NORMALIZATIONS)


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return model_of("squeeze")


def state_of(model: LPIPS) -> tuple[object, ...]:
    return model.normalization, model.spatial, model.reduction, model.training


class TestCompareNormalizations:
    def test_against_models_of_each(self, model: LPIPS) -> None:
        in0, in1 = some_images(3), some_images(3)
        before = state_of(model)
        table = compare_normalizations(model, [(in0[:2], in1[:2]), (in0[2:], in1[2:])])
        assert state_of(model) == before
        assert [result.name for result in table] == list(KINDS) and len(table) == len(KINDS)
        for kind in KINDS:
            like = copy.copy(model)
            like.normalization = kind
            with torch.no_grad():
                parts = [like(in0[k], in1[k], retPerLayer=True) for k in (slice(2), slice(2, 3))]
            expected = torch.cat([value for value, _ in parts]).double().flatten()
            layers = [torch.cat(layer) for layer in zip(*(layers for _, layers in parts))]
            found = torch.tensor(table[kind].distances, dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
            result = table[kind]
            assert result.mean == pytest.approx(expected.mean().item(), rel=1e-5)
            assert result.deviation == pytest.approx(expected.std().item(), rel=1e-3)
            assert result.range == (min(result.distances), max(result.distances))
            assert result.variation == result.deviation / result.mean
            assert sum(result.layer_means) == pytest.approx(result.mean)
            means = [layer.mean().item() for layer in layers]
            assert result.layer_means == pytest.approx(means, rel=1e-4)

    def test_any_model_and_any_kind_of_pair(self, model: LPIPS) -> None:
        in0, in1 = some_images(2), some_images(2)
        expected = compare_normalizations(model, [(in0, in1)])["l1"].distances
        encoded = [(model.encode(in0), in1)]
        assert compare_normalizations(model, encoded)["l1"].distances == pytest.approx(expected)
        other = model_of("squeeze", spatial=True, reduction="mean", normalization="max")
        table = compare_normalizations(other, [(in0, in1)], normalizations=["l1"])
        assert table["l1"].distances == pytest.approx(expected)
        assert state_of(other) == ("max", True, "mean", False)
        unit = [((in0 + 1) / 2, (in1 + 1) / 2)]
        found = compare_normalizations(model, unit, normalize=True)["l1"].distances
        assert found == pytest.approx(expected, rel=1e-3)

    def test_ranks_are_those_of_l2(self, model: LPIPS) -> None:
        images = some_images(8)
        pair = [(images[:1], images[1:])]
        everything = compare_normalizations(model, pair)
        for result in compare_normalizations(model, pair, normalizations=KINDS[1:]):
            expected = spearman(result.distances, everything["l2"].distances)
            assert result.rank_correlation == pytest.approx(expected)

    def test_the_table(self, model: LPIPS) -> None:
        images = some_images(4)
        table = compare_normalizations(model, [(images[:1], images[1:])])
        first, head, *rows = str(table).splitlines()
        assert first == "Distances of 3 pairs, LPIPS squeeze, version 0.1"
        assert head.split()[:4] == ["normalization", "mean", "deviation", "dev./mean"]
        assert [row.split()[0] for row in rows] == list(KINDS)
        assert all(len(row.split()) == 7 for row in rows)
        assert rows[0].split()[1] == f"{table['l2'].mean:.4g}"
        assert len({len(row) for row in (head, *rows)}) == 1

    def test_one_pair_has_no_deviation(self, model: LPIPS) -> None:
        images = some_images(2)
        table = compare_normalizations(model, [(images[:1], images[1:])])
        assert math.isnan(table["l2"].deviation) and math.isnan(table["l2"].rank_correlation)
        assert str(table).splitlines()[2].split()[2:4] == ["-", "-"]
        report = json.loads(json.dumps(table.as_dict(), allow_nan=False))
        assert report["std"]["deviation"] is None and report["std"]["mean"] > 0
        assert list(report["l1"]["layer_means"]) == list(layer_names(model))

    def test_identical_images(self, model: LPIPS) -> None:
        image = some_images(1)
        table = compare_normalizations(model, [(image, image.clone())] * 2)
        assert all(result.distances == (0.0, 0.0) for result in table)
        assert math.isnan(table["l2"].variation) and math.isnan(table["l2"].rank_correlation)
        str(table)

    def test_errors(self, model: LPIPS) -> None:
        images = some_images(2)
        pair = [(images[:1], images[1:])]
        with pytest.raises(ValueError, match="at least one pair of images, got none"):
            compare_normalizations(model, [])
        with pytest.raises(ValueError, match="at least one normalization, got none"):
            compare_normalizations(model, pair, normalizations=[])
        with pytest.raises(ValueError, match="unknown normalization 'l3'"):
            compare_normalizations(model, pair, normalizations=["l3"])
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            compare_normalizations(model_of("squeeze").train(), pair)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of mean ranks, by the definition."""

    def rank(values: Sequence[float], value: float) -> float:
        return statistics.mean(k for k, other in enumerate(sorted(values)) if other == value)

    ranks = [[rank(values, value) for value in values] for values in (x, y)]
    return statistics.correlation(*ranks)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation(ties: bool) -> None:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    x, y = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    y = y + x
    if ties:
        x, y = x.round(), y.round()
    expected = spearman(x.tolist(), y.tolist())
    assert rank_correlation(x.tolist(), y.tolist()) == pytest.approx(expected)
    assert rank_correlation(x.tolist(), (-x).tolist()) == pytest.approx(-1)


def test_rank_correlation_that_does_not_exist() -> None:
    assert math.isnan(rank_correlation([1.0], [2.0]))
    assert math.isnan(rank_correlation([1.0, 2.0], [3.0, 3.0]))
    with pytest.raises(ValueError, match="got 1 and 2"):
        rank_correlation([1.0], [1.0, 2.0])


class TestLayers:
    @pytest.mark.parametrize("options", [{}, {"lpips": False}, {"layers": (1, 4)}], ids=str)
    def test_contributions(self, options: dict[str, object]) -> None:
        model = model_of("squeeze", **options)
        in0, in1 = some_images(3), some_images(3)
        parts = layer_contributions(model, in0, in1)
        with torch.no_grad():
            value, layers = model(in0, in1, retPerLayer=True)
        assert parts.layers == layer_names(model)
        assert len(parts.layers) == len(layers) and len(parts) == 3
        for k, layer in enumerate(layers):
            assert torch.equal(parts.values[:, k], layer.flatten())
        torch.testing.assert_close(parts.distances, value.flatten())
        torch.testing.assert_close(parts.shares.sum(dim=1), torch.ones(3))
        torch.testing.assert_close(parts.shares * value.view(3, 1), parts.values)
        lines = str(parts).splitlines()
        assert lines[0] == f"Layers of 3 pairs, {describe(model)}"
        assert [line.split()[0] for line in lines[2:]] == [*parts.layers, "sum"]
        assert lines[-1].endswith("100.0 %")

    def test_identical_images_have_no_shares(self, model: LPIPS) -> None:
        image = some_images(1)
        parts = layer_contributions(model, image, image.clone())
        assert (parts.values == 0).all() and (parts.shares == 0).all()
        assert str(parts).splitlines()[-1].split()[1:] == ["0", "0.0", "%"]

    def test_maps(self, model: LPIPS) -> None:
        in0, in1 = some_images(2), some_images(2)
        maps = layer_maps(model, in0, in1)
        assert tuple(maps) == layer_names(model)
        assert all(map.shape == (2, 1, 48, 40) for map in maps.values())
        with torch.no_grad():
            expected = model_of("squeeze", spatial=True)(in0, in1)
        torch.testing.assert_close(sum(maps.values()), expected)
        assert not model.spatial
        some = layer_maps(model_of("squeeze", layers=(2, 3)), in0, in1)
        for name, map in some.items():
            torch.testing.assert_close(map, maps[name])

    def test_no_graph_is_kept(self) -> None:
        model = model_of("squeeze", pnet_tune=True)
        in0, in1 = some_images(1), some_images(1)
        assert not layer_contributions(model, in0, in1).values.requires_grad
        assert not any(map.requires_grad for map in layer_maps(model, in0, in1).values())


class TestChannels:
    def test_learned_weights(self, model: LPIPS) -> None:
        importance = channel_importance(model, top=5)
        assert isinstance(importance, ChannelImportance) and len(importance) == model.L
        everything = sum(
            model.lins[k].model[-1].weight.double().sum().item() for k in range(model.L)
        )
        for k, layer in enumerate(importance):
            weight = model.lins[k].model[-1].weight.detach().double().flatten()
            assert torch.equal(layer.weights, weight)
            assert layer.share == pytest.approx(weight.sum().item() / everything)
            expected, order = weight.topk(5)
            assert [channel for channel, _, _ in layer.top] == order.tolist()
            assert [w for _, w, _ in layer.top] == expected.tolist()
            assert layer.top[0][2] == pytest.approx((expected[0] / weight.sum()).item())
            effective = (weight.sum() ** 2 / (weight**2).sum()).item()
            assert layer.effective_channels == pytest.approx(effective)
            assert layer.unused_channels == (weight == 0).sum()
        assert sum(layer.share for layer in importance) == pytest.approx(1)
        lines = str(importance).splitlines()
        assert [line.split()[0] for line in lines[2:]] == list(layer_names(model))

    def test_extremes(self) -> None:
        for layer in channel_importance(model_of("squeeze", lpips=False)):
            assert layer.effective_channels == pytest.approx(len(layer.weights))
        model = model_of("squeeze", layers=(0, 2))
        with torch.no_grad():
            model.lin0.model[1].weight.zero_()
            model.lin2.model[1].weight.zero_()[0, 7] = -2.0
        first, second = channel_importance(model)
        assert (first.effective_channels, first.share, first.top[0][2]) == (0.0, 0.0, 0.0)
        assert first.unused_channels == 64
        assert (second.effective_channels, second.share) == (1.0, 1.0)
        assert second.top[0] == (7, -2.0, 1.0)
        with pytest.raises(ValueError, match="top is 0, expected at least 1"):
            channel_importance(model, top=0)


def test_the_name_of_a_model() -> None:
    assert describe(model_of("squeeze")) == "LPIPS squeeze, version 0.1"
    model = model_of("alex", version="0.0", lpips=False, normalization="l1", layers=(0, 3))
    expected = "baseline (no linear layers) alex, version 0.0, normalization l1, layers 0,3 only"
    assert describe(model) == expected
    assert layer_names(model) == ("relu1", "relu4")
    assert describe(model.double()) == f"{expected}, float64"
