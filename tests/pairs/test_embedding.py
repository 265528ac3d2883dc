"""Vectors whose squared Euclidean distance is LPIPS."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from many_images import DataSet, model_of, pair_by_pair, some_images
from parity import NETS
from torch import Tensor

from lpips_fast import LPIPS
from lpips_fast.pairs.embedding import embedding_size
from lpips_fast.trunk import slice_node
from lpips_fast.trunk.slices import slice_layers


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return model_of()


def squared_distances(vectors: Tensor) -> Tensor:
    vectors = vectors.double()
    return (vectors[:, None] - vectors[None]).square().sum(dim=2)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("options", [{}, {"lpips": False}, {"version": "0.0"}])
def test_squared_distances_are_lpips(net: str, options: dict[str, Any]) -> None:
    model = model_of(net, **options)
    images = some_images(4)
    vectors = model.embed(images)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (4, embedding_size(model, (48, 40)))
    expected = pair_by_pair(model, images, images).double()
    torch.testing.assert_close(squared_distances(vectors), expected, rtol=1e-5, atol=1e-8)


def test_batches_and_sources(model: LPIPS) -> None:
    images = some_images(5)
    vectors = model.embed(images)
    for source in (list(images), DataSet(images), model.encode(images).detach()):
        torch.testing.assert_close(model.embed(source, max_batch=2), vectors)
    unit = (images + 1) / 2
    torch.testing.assert_close(model.embed(unit, normalize=True), vectors, rtol=1e-3, atol=1e-5)
    assert torch.equal(model.embed(images[0]), model.embed(images[:1]))


@pytest.mark.parametrize("net", NETS)
def test_layers(net: str) -> None:
    model = model_of(net)
    images = some_images(3)
    with torch.no_grad():
        _, parts = model(images[:1], images, retPerLayer=True)
    for layer, part in enumerate(parts):
        vectors = model.embed(images, layers=[layer])
        assert vectors.shape[1] == embedding_size(model, (48, 40), [layer])
        distances = squared_distances(vectors)[0].float()
        torch.testing.assert_close(distances, part.flatten(), rtol=1e-5, atol=1e-8)
    last, first = model.L - 1, model.embed(images, layers=[0])
    both = model.embed(images, layers=[last, 0])
    assert torch.equal(both[:, -first.shape[1] :], first)
    assert torch.equal(both[:, : -first.shape[1]], model.embed(images, layers=[last]))


def test_the_rest_of_the_trunk_is_not_run(model: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    run = slice_node.run

    def watched(slices: Any, *arguments: Any) -> list[Tensor]:
        assert all(layers is not slice_layers("alex", 3) for layers, _, _ in slices), (
            "a slice behind the last wanted tap ran"
        )
        return run(slices, *arguments)

    monkeypatch.setattr(slice_node, "run", watched)
    assert model.embed(some_images(2), layers=[1, 0]).shape[0] == 2
    with pytest.raises(AssertionError, match="behind the last"):
        model.embed(some_images(2), layers=[2])


def test_half_precision(model: LPIPS) -> None:
    images = some_images(4)
    vectors = model.embed(images, dtype=torch.float16)
    assert vectors.dtype == torch.float16
    expected = pair_by_pair(model, images, images).double()
    torch.testing.assert_close(squared_distances(vectors), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [[], [5], [-1], [0, 9]])
def test_layers_that_are_not_there(model: LPIPS, layers: list[int]) -> None:
    with pytest.raises(ValueError, match="expected indices of the layers of 'alex', 0 to 4"):
        model.embed(some_images(1), layers=layers)


def test_models_without_a_euclidean_distance() -> None:
    images = some_images(3)
    negative = model_of()
    with torch.no_grad():
        negative.lin2.model[-1].weight[0, 5] = -0.25
    for model, message in (
        (model_of(spatial=True), "spatial=False"),
        (negative, r"layer 2 has a negative or NaN weight \(-0.25\)"),
        (model_of(pretrained=False), "negative or NaN weight"),
        (model_of(eval_mode=False).train(), r"call model.eval\(\) first"),
    ):
        for call in (model.pairwise, model.embed):
            with pytest.raises(ValueError, match=message):
                call(images)
        with pytest.raises(ValueError, match=message):
            model.nearest(images, images, 1)


def test_faiss_example(real_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    spec = importlib.util.spec_from_file_location(
        "faiss_search", REPOSITORY / "examples" / "faiss_search.py"
    )
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--weights", str(real_weights), "--gallery", "40"])
    out = capsys.readouterr().out
    assert "the same neighbours" in out
