"""Scores of agreement with people: the original's, on the same values, and by hand."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parity import image_pair, trunk_weights

import lpips_fast
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.judgements import scoring
from lpips_fast.weights import WeightsError


@pytest.fixture(scope="module")
def model() -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)


class Loader:
    """Batches of made-up images, in the shape of the original's loaders."""

    def __init__(self, names: tuple[str, ...], judgement: str, generator: torch.Generator) -> None:
        self.batches = []
        for size in (5, 5, 2):
            batch = {name: torch.rand(size, 3, 2, 2, generator=generator) for name in names}
            votes = torch.randint(6, (size, 1, 1, 1), generator=generator)
            self.batches.append({**batch, judgement: votes / 5})

    def load_data(self) -> list[dict[str, torch.Tensor]]:
        return self.batches


def difference(in0: torch.Tensor, in1: torch.Tensor) -> torch.Tensor:
    """A distance with ties: multiples of 0.02."""
    return ((in0 - in1).abs().mean(dim=(1, 2, 3)) * 50).round() / 50


def squared(in0: torch.Tensor, in1: torch.Tensor) -> torch.Tensor:
    return (in0 - in1).square().mean(dim=(1, 2, 3))


def items(count: int, names: tuple[str, ...], judgement: str, seed: int) -> list[dict[str, Any]]:
    images = [image_pair(count, 64, 64, torch.float32, seed + k)[1] for k in range(len(names))]
    judged = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return [
        {**{name: image[k] for name, image in zip(names, images)}, judgement: judged[k]}
        for k in range(count)
    ]


# ------------------------------------------------------------------------- the original's


@pytest.mark.parametrize("func", [difference, squared])
def test_2afc_is_the_originals(
    reference: ModuleType, generator: torch.Generator, func: Any
) -> None:
    loader = Loader(("ref", "p0", "p1"), "judge", generator)
    expected, arrays = reference.score_2afc_dataset(loader, func)
    score, ours = scoring.score_2afc_dataset(loader, func)
    assert score == pytest.approx(expected, rel=1e-12)
    assert ours.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(ours[name], arrays[name])
    assert scoring.score_2afc_dataset(loader.batches, func)[0] == score


def test_jnd_is_the_originals(reference: ModuleType, generator: torch.Generator) -> None:
    loader = Loader(("p0", "p1"), "same", generator)
    expected, arrays = reference.score_jnd_dataset(loader, squared)
    score, ours = scoring.score_jnd_dataset(loader, squared)
    assert score == pytest.approx(expected, rel=1e-12)
    for name in arrays:
        np.testing.assert_array_equal(ours[name], arrays[name])


def test_jnd_of_distances_in_lpips_own_shape(generator: torch.Generator) -> None:
    loader = Loader(("p0", "p1"), "same", generator)
    score, _ = scoring.score_jnd_dataset(loader, squared)
    four_dimensional = scoring.score_jnd_dataset(
        loader, lambda a, b: squared(a, b).view(-1, 1, 1, 1)
    )
    assert four_dimensional[0] == score


# ---------------------------------------------------------------------------------- by hand


def test_agreement_by_hand() -> None:
    d0, d1 = np.array([0.1, 0.5, 0.3]), np.array([0.2, 0.4, 0.3])
    judge = np.array([0.2, 1.0, 0.9])
    expected = [0.8, 1.0, 0.5]
    np.testing.assert_allclose(scoring.two_afc_agreement(d0, d1, judge), expected)
    tensors = [torch.from_numpy(x) for x in (d0, d1, judge)]
    torch.testing.assert_close(
        scoring.two_afc_agreement(*tensors), torch.tensor(expected, dtype=torch.float64)
    )
    np.testing.assert_allclose(scoring.people_agreement(judge), [0.68, 1.0, 0.82])


def test_average_precision_by_hand() -> None:
    same = np.array([1.0, 0.0, 1.0, 0.0])
    assert scoring.average_precision(np.array([1, 3, 2, 4]), same) == 1.0
    # Precision 0, 0, 1/3, 2/4 at recall 0, 0, 1/2, 1; the envelope is 1/2 throughout.
    assert scoring.average_precision(np.array([3, 1, 4, 2]), same) == pytest.approx(0.5)


def test_average_precision_depends_on_the_order_alone(generator: torch.Generator) -> None:
    distances = torch.rand(50, generator=generator).numpy()
    same = torch.rand(50, generator=generator).numpy()
    score = scoring.average_precision(distances, same)
    assert scoring.average_precision(np.exp(3 * distances) - 7, same) == pytest.approx(score)
    assert scoring.average_precision(distances, distances.max() - distances) > score
    assert 0 < score < 1


def test_what_average_precision_refuses() -> None:
    with pytest.raises(ValueError, match="nobody took any pair for the same"):
        scoring.average_precision(np.ones(3), np.zeros(3))
    with pytest.raises(ValueError, match="2 distances for 3 judgements"):
        scoring.average_precision(np.ones(2), np.ones(3))


# --------------------------------------------------------------------------- of a model


def test_evaluate_2afc_is_the_score_of_the_model(model: lpips_fast.LPIPS) -> None:
    dataset = items(7, ("ref", "p0", "p1"), "judge", seed=3)
    result = scoring.evaluate_2afc(model, dataset, batch_size=3)
    batch = {name: torch.stack([item[name] for item in dataset]) for name in dataset[0]}
    with torch.no_grad():
        score, arrays = scoring.score_2afc_dataset([batch], model)
    np.testing.assert_allclose(result.d0, arrays["d0s"], rtol=1e-5)
    np.testing.assert_allclose(result.d1, arrays["d1s"], rtol=1e-5)
    assert result.score == pytest.approx(score)
    assert result.people == pytest.approx(scoring.people_agreement(arrays["gts"]).mean())


def test_evaluate_jnd_is_the_score_of_the_model(model: lpips_fast.LPIPS) -> None:
    dataset = items(7, ("p0", "p1"), "same", seed=4)
    result = scoring.evaluate_jnd(model, dataset, batch_size=3)
    batch = {name: torch.stack([item[name] for item in dataset]) for name in dataset[0]}
    with torch.no_grad():
        score, arrays = scoring.score_jnd_dataset([batch], model)
    np.testing.assert_allclose(result.distances, arrays["ds"], rtol=1e-5)
    assert result.score == pytest.approx(score)


def test_evaluation_drops_nothing_and_leaves_the_mode(model: lpips_fast.LPIPS) -> None:
    dataset = items(4, ("ref", "p0", "p1"), "judge", seed=5)
    expected = scoring.evaluate_2afc(model, dataset)
    model.train()
    result = scoring.evaluate_2afc(model, dataset)
    assert model.training
    model.eval()
    np.testing.assert_array_equal(result.d0, expected.d0)


def test_damaged_weights_are_told() -> None:
    damaged = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)
    with torch.no_grad():
        linear_weight(damaged.lins[0])[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="4 of 4 distances are NaN"):
        scoring.evaluate_2afc(damaged, items(4, ("ref", "p0", "p1"), "judge", seed=6))


@pytest.mark.parametrize("changed", [{"spatial": True}, {"reduction": "mean"}])
def test_a_model_without_one_distance_an_image(changed: dict[str, Any]) -> None:
    stand_in: Any = SimpleNamespace(**{"spatial": False, "reduction": "none", **changed})
    with pytest.raises(ValueError, match="one distance an image"):
        scoring.evaluate_2afc(stand_in, [])
