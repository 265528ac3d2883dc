"""Channel means: the fused gradient against the formula, and dropout against the original's."""

from __future__ import annotations

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast import composed, functional, kernels
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.judgements import cached_triplets
from lpips_fast.weights import WeightsError

SHAPES = ((3, 8, 5, 7), (3, 33, 2, 2), (3, 64, 1, 1))


def features(generator: torch.Generator, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(shape, generator=generator).relu().to(dtype).contiguous(memory_format=layout)
        for shape in SHAPES
    ]


def expected_means(feats0: list[Tensor], feats1: list[Tensor]) -> list[Tensor]:
    return [
        (composed.normalize_tensor(a.double()) - composed.normalize_tensor(b.double()))
        .square()
        .mean(dim=(2, 3))
        for a, b in zip(feats0, feats1)
    ]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_means_are_the_formulas(
    generator: torch.Generator, dtype: torch.dtype, channels_last: bool, poisoned: None
) -> None:
    feats0, feats1 = (features(generator, dtype, channels_last) for _ in range(2))
    means = cached_triplets.channel_means(feats0, feats1)
    for result, expected in zip(means, expected_means(feats0, feats1), strict=True):
        assert result.dtype == composed.accumulator_dtype(dtype)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-9)


def test_a_device_without_a_kernel(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    feats0, feats1 = (features(generator, torch.float32, True) for _ in range(2))
    monkeypatch.setattr(kernels, "has_kernel", lambda device: False)
    means = cached_triplets.channel_means(feats0, feats1)
    for result, expected in zip(means, expected_means(feats0, feats1), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-9)


def test_the_distance_is_a_product_with_the_means(generator: torch.Generator) -> None:
    feats0, feats1 = (features(generator, torch.float32, True) for _ in range(2))
    weights = [torch.rand(shape[1], generator=generator) for shape in SHAPES]
    means = cached_triplets.channel_means(feats0, feats1)
    products = torch.stack([m @ w for m, w in zip(means, weights)], dim=1)
    torch.testing.assert_close(products, functional.distance(feats0, feats1, weights))


def test_identical_features_differ_nowhere(generator: torch.Generator) -> None:
    feats = features(generator, torch.float32, True)
    for function in (cached_triplets.channel_means, cached_triplets.dropout_deviations):
        assert all(torch.equal(m, torch.zeros_like(m)) for m in function(feats, feats))


def test_an_image_is_independent_of_its_batch(generator: torch.Generator) -> None:
    feats0, feats1 = (features(generator, torch.float32, True) for _ in range(2))
    whole = cached_triplets.channel_means(feats0, feats1)
    alone = cached_triplets.channel_means([f[1:2] for f in feats0], [f[1:2] for f in feats1])
    for all_images, one in zip(whole, alone):
        assert torch.equal(all_images[1:2], one)


def test_deviations_are_those_of_dropping_positions(generator: torch.Generator) -> None:
    feats0, feats1 = (features(generator, torch.float64, True) for _ in range(2))
    means = cached_triplets.channel_means(feats0, feats1)
    deviations = cached_triplets.dropout_deviations(feats0, feats1)
    for a, b, mean, deviation in zip(feats0, feats1, means, deviations):
        x = (composed.normalize_tensor(a) - composed.normalize_tensor(b)).square().flatten(2)
        # Each position's part is x / HW times 0 or 2, of variance (x / HW)².
        variance = (x / x.shape[2]).square().sum(dim=2)
        torch.testing.assert_close(deviation, variance.sqrt())
        assert (deviation <= mean * (1 + 1e-9)).all()
    torch.testing.assert_close(deviations[2], means[2])  # of one position


# ------------------------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def model() -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)


@pytest.fixture(scope="module")
def items() -> list[dict[str, Tensor]]:
    ref, p0 = image_pair(5, 64, 64, torch.float32, seed=11)
    p1 = image_pair(5, 64, 64, torch.float32, seed=12)[1]
    judge = torch.linspace(0, 1, 5)
    names = ("ref", "p0", "p1", "judge")
    return [dict(zip(names, item)) for item in zip(ref, p0, p1, judge)]


def lin_weights(model: lpips_fast.LPIPS) -> Tensor:
    return torch.cat([linear_weight(lin).detach().flatten() for lin in model.lins])


@pytest.mark.parametrize("batch_size", [2, 50])
def test_cached_distances_are_the_models(
    model: lpips_fast.LPIPS, items: list[dict[str, Tensor]], batch_size: int
) -> None:
    cached = cached_triplets.cache_triplets(model, items, batch_size=batch_size)
    assert len(cached) == 5
    rows = torch.tensor([3, 0])
    d0, d1 = cached.distances(lin_weights(model), rows)
    ref, p0, p1 = (torch.stack([items[k][name] for k in rows]) for name in ("ref", "p0", "p1"))
    with torch.no_grad():
        torch.testing.assert_close(d0, model(ref, p0).flatten(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(d1, model(ref, p1).flatten(), rtol=1e-5, atol=1e-7)
    assert torch.equal(cached.judge[rows], torch.tensor([0.75, 0.0]))
    everything = cached.distances(lin_weights(model))
    torch.testing.assert_close(everything[1][rows], d1)


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_dropout_has_the_originals_mean_and_variance(
    model: lpips_fast.LPIPS, items: list[dict[str, Tensor]], rate: float
) -> None:
    draws = 600
    ref, p0 = items[0]["ref"][None], items[0]["p0"][None]
    dropping = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False, eval_mode=False)
    for lin in dropping.lins:
        lin.model[0].p = rate
    cached = cached_triplets.cache_triplets(model, items[:1])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(torch.Generator().seed() % 2**31)
        features0, features1 = dropping.encode(ref), dropping.encode(p0)
        plain = torch.cat(
            [dropping(features0.expand(50), features1.expand(50)) for _ in range(draws // 50)]
        ).flatten()
        rows = torch.zeros(draws, dtype=torch.long)
        ours = cached.distances(lin_weights(model), rows, dropout=rate)[0]
    exact = cached.distances(lin_weights(model), rows[:1])[0]
    deviation = (
        cached.deviations[0, 0] * lin_weights(model)  # type: ignore[index]
    ).norm() * (rate / (1 - rate)) ** 0.5
    for sample in (plain, ours):
        assert abs(sample.mean() - exact) < 5 * deviation / draws**0.5
        assert sample.std() / deviation == pytest.approx(1, abs=5 / (2 * draws) ** 0.5)
    assert ours.min() >= 0


def test_dropout_needs_deviations(model: lpips_fast.LPIPS, items: list[dict[str, Tensor]]) -> None:
    cached = cached_triplets.cache_triplets(model, items[:1], deviations=False)
    assert cached.deviations is None
    with pytest.raises(ValueError, match="were not cached"):
        cached.distances(lin_weights(model), dropout=0.5)


def test_a_damaged_trunk_is_told(items: list[dict[str, Tensor]]) -> None:
    damaged = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)
    with torch.no_grad():
        damaged.net.slice1[0].bias[0] = float("nan")
    with pytest.raises(WeightsError, match="weights must be damaged"):
        cached_triplets.cache_triplets(damaged, items)
