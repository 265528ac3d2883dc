"""All pairs and neighbours: the numbers of pair by pair, near and far, in bounded memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from many_images import model_of, pair_by_pair, smallest_limit, some_images
from parity import NETS
from torch import Tensor

import lpips_fast
from lpips_fast import LPIPS
from lpips_fast.pairs import all_pairs as pw


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return model_of()


def assert_close(matrix: Tensor, expected: Tensor, tolerance: float = pw.RELATIVE_ERROR) -> None:
    torch.testing.assert_close(matrix, expected, rtol=tolerance, atol=1e-10)


def assert_is_metric(matrix: Tensor) -> None:
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 0).all()
    assert (matrix >= 0).all()


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("options", [{}, {"lpips": False}, {"version": "0.0"}])
def test_pair_by_pair(net: str, options: dict[str, Any]) -> None:
    model = model_of(net, **options)
    images = some_images(5)
    matrix = model.pairwise(images)
    assert matrix.dtype == torch.float32
    assert_is_metric(matrix)
    assert_close(matrix, pair_by_pair(model, images, images))
    assert_close(model.pairwise(images[:2], images[2:]), matrix[:2, 2:])


@pytest.mark.parametrize("net", NETS)
def test_float64(net: str) -> None:
    model = model_of(net).double()
    images = some_images(4, dtype=torch.float64)
    matrix = model.pairwise(images)
    assert matrix.dtype == torch.float64
    assert_close(matrix, pair_by_pair(model, images, images), 1e-12)


def test_reduced_precision() -> None:
    model = model_of(dtype=torch.bfloat16)
    images = some_images(4)
    matrix = model.pairwise(images)
    assert matrix.dtype == torch.float32
    # The same features, so the same distances: the reduced precision is in the trunk alone.
    assert_close(matrix, pair_by_pair(model, images, images), 1e-4)


def test_near_images_come_from_the_direct_kernel(model: LPIPS) -> None:
    images = some_images(6)
    for exponent in range(1, 5):
        images[exponent] = images[0] + 10.0**-exponent * (images[5] - images[0])
    matrix = model.pairwise(images)
    assert_is_metric(matrix)
    expected = pair_by_pair(model, images, images)
    assert 0 < expected[0, 4] < 1e-6 < 1e-2 < expected.max()
    # Trunk passes of other batches round differently, which shows between images as near as these.
    assert_close(matrix, expected, 1e-3)
    features = model.encode(images).detach()
    matrix = model.pairwise(features)
    for i in range(6):
        one_to_all = model.distance(features[i : i + 1], features).detach().flatten()
        assert_close(matrix[i], one_to_all)
        near = one_to_all < 1e-3
        assert torch.equal(matrix[i][near], one_to_all[near])


def test_without_the_direct_kernel_near_images_are_wrong(
    model: LPIPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = some_images(3)
    images[1] = images[0] + 1e-5 * images[2]
    expected = pair_by_pair(model, images, images)[0, 1]
    monkeypatch.setattr(pw, "NEAR", -math.inf)
    assert abs(model.pairwise(images)[0, 1] / expected - 1) > 1e-2


def test_far_images_need_no_direct_kernel(model: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    def direct(*arguments: Any) -> None:
        raise AssertionError("the direct kernel was called")

    monkeypatch.setattr(lpips_fast.functional, "distance", direct)
    model.pairwise(some_images(4))


def test_equal_images(model: LPIPS) -> None:
    # In different batches, and each of them in two groups.
    images = some_images(7)
    images[1] = images[3] = images[6] = images[0]
    matrix = model.pairwise(images, max_batch=2)
    assert (matrix[0, [1, 3, 6]] == 0).all()
    assert_is_metric(matrix)
    assert (matrix[0, [2, 4, 5]] > 0).all()
    assert torch.equal(model.pairwise(images[:1], images, max_batch=2) == 0, matrix[:1] == 0)


def test_constant_images(model: LPIPS) -> None:
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    matrix = model.pairwise(images)
    assert_is_metric(matrix)
    assert_close(matrix, pair_by_pair(model, images, images), 1e-3)


def test_zero_features(model: LPIPS) -> None:
    """Features of nothing but zeros are at 0 from each other and finite from all else."""
    features = model.encode(some_images(3)).detach()
    for tap in features.taps:
        tap[:2] = 0
    matrix = model.pairwise(features)
    assert matrix[0, 1] == 0 and matrix[0, 2] > 0
    assert torch.isfinite(matrix).all()


@pytest.mark.parametrize("position", [0, 3])
def test_nan_stays_where_it_is(model: LPIPS, position: int) -> None:
    images = some_images(4)
    expected = model.pairwise(images)
    images[position, :, 20:30, 20:30] = math.nan
    matrix = model.pairwise(images)
    others = [k for k in range(4) if k != position]
    assert_close(matrix[others][:, others], expected[others][:, others])
    assert matrix[position, others].isnan().all() and matrix[others, position].isnan().all()


@pytest.mark.parametrize("lower", ["settings", "autocast"])
def test_precision_that_the_program_lowers_elsewhere(
    model: LPIPS, lower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = model.encode(some_images(5, (64, 64))).detach()
    expected = model.pairwise(features)
    if lower == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.pairwise(features), expected)
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(model.pairwise(features), expected)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_long_vectors_are_summed_in_blocks() -> None:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    a = torch.rand(2, 3_000_001, generator=generator)
    exact = a.double() @ a.double().T
    assert ((pw._products(a, a) - exact) / exact).abs().max() < 1e-6
    assert ((pw._squares(a) - exact.diagonal()) / exact.diagonal()).abs().max() < 1e-6
    for length in (1, 4095, 4096, 4097):
        short = a[:, :length]
        torch.testing.assert_close(pw._products(short, short), short @ short.T)


def test_no_graph(model: LPIPS) -> None:
    images = some_images(3)
    tuned = model_of(pnet_tune=True)
    assert not tuned.pairwise(images).requires_grad
    assert not tuned.nearest(images, images, 1)[0].requires_grad
    assert not tuned.embed(images).requires_grad
    images.requires_grad_()
    for call in (model.pairwise, model.embed, lambda x: model.nearest(x, x, 1)):
        with pytest.raises(ValueError, match="wants a gradient"):
            call(images)
    with torch.no_grad():
        assert model.pairwise(images).shape == (3, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reduction_of_losses_is_left_alone(model: LPIPS, reduction: Any) -> None:
    images = some_images(3)
    images[1] = images[0]
    assert torch.equal(model_of(reduction=reduction).pairwise(images), model.pairwise(images))


# --------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("net", NETS)
def test_nearest(net: str) -> None:
    model = model_of(net)
    images = some_images(9)
    images[4] = images[0] + 0.02 * images[1]
    distances, indices = model.nearest(images[:3], images, 4)
    expected = pair_by_pair(model, images[:3], images)
    values, order = expected.sort(dim=1)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, order[:, :4])
    torch.testing.assert_close(distances, values[:, :4], rtol=1e-4, atol=1e-9)
    assert (indices[:, 0] == torch.arange(3)).all() and (distances[:, 0] == 0).all()
    assert indices[0, 1] == 4


def test_nearest_distances_are_the_direct_kernels(model: LPIPS) -> None:
    features = model.encode(some_images(8)).detach()
    distances, indices = model.nearest(features[:3], features, 5)
    for row in range(3):
        direct = model.distance(features[row : row + 1], features[indices[row]]).detach()
        assert torch.equal(distances[row], direct.flatten())
    assert (distances.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("count", [2, 9])
def test_nearest_from_both_sides(model: LPIPS, count: int) -> None:
    """Whichever side is held in memory."""
    images, gallery = some_images(count), some_images(5)
    distances, indices = model.nearest(images, gallery, 5)
    expected = pair_by_pair(model, images, gallery)
    torch.testing.assert_close(distances, expected.gather(1, indices), rtol=1e-4, atol=1e-9)
    assert torch.equal(indices.sort(dim=1).values, torch.arange(5).expand(count, 5))


def test_equal_neighbours_come_in_order(model: LPIPS) -> None:
    gallery = some_images(6)
    gallery[1] = gallery[3] = gallery[5]
    distances, indices = model.nearest(gallery[5], gallery, 3)
    assert indices.tolist() == [[1, 3, 5]] and distances.tolist() == [[0.0, 0.0, 0.0]]
    assert model.nearest(gallery[5], gallery, 2)[1].tolist() == [[1, 3]]


def test_nearest_in_turns(model: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    images = some_images(9)
    expected = model.nearest(images, images, 3)
    turns = []
    original = pw._nearest

    def counted(model: LPIPS, queries: Any, *arguments: Any) -> Any:
        turns.append(len(queries))
        return original(model, queries, *arguments)

    monkeypatch.setattr(pw, "_nearest", counted)
    # So small a share of the memory that the matrix fits for two images only.
    monkeypatch.setattr(pw, "DEFAULT_MEMORY_LIMIT", 0)
    limit = smallest_limit(model, (48, 40), 2)
    each = len(images) * 14
    monkeypatch.setattr(pw, "MATRIX_SHARE", limit // (2 * each))
    distances, indices = model.nearest(images, images, 3, memory_limit=limit, max_batch=2)
    assert turns == [2, 2, 2, 2, 1]
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(distances, expected[0], rtol=1e-5, atol=1e-9)


def test_nearest_of_nan(model: LPIPS) -> None:
    gallery = some_images(5)
    queries = gallery[:2].clone()
    queries[1] = math.nan
    distances, indices = model.nearest(queries, gallery, 2)
    assert indices[0, 0] == 0 and distances[0, 0] == 0
    assert distances[1].isnan().all()


@pytest.mark.parametrize("k", [0, 4, -1])
def test_nearest_refuses_k(model: LPIPS, k: int) -> None:
    images = some_images(3)
    with pytest.raises(ValueError, match=rf"k is {k}, expected 1 to 3"):
        model.nearest(images, images, k)


def test_nearest_names_the_gallery(model: LPIPS) -> None:
    with pytest.raises(ValueError, match="X and gallery differ in size"):
        model.nearest(some_images(2), some_images(2, (64, 64)), 1)
    with pytest.raises(TypeError, match="gallery is a generator"):
        model.nearest(some_images(2), (x for x in some_images(2)), 1)


# ---------------------------------------------------------------------------------- diversity


def test_mean_diversity(model: LPIPS) -> None:
    matrix = model.pairwise(some_images(7))
    mean, error = pw.mean_diversity(matrix)
    upper = matrix.double()[np.triu_indices(7, 1)]
    assert mean == pytest.approx(upper.mean().item(), rel=1e-12)
    # The jackknife, image by image.
    kept = [[j for j in range(7) if j != i] for i in range(7)]
    means = np.array([matrix.double()[k][:, k].sum().item() / 30 for k in kept])
    assert error == pytest.approx(math.sqrt(6 / 7 * ((means - means.mean()) ** 2).sum()), rel=1e-9)
    assert error > 0


def test_standard_error_is_that_of_repeated_draws() -> None:
    """Of distances between random points; pairs taken for independent would give far less."""
    rng = np.random.default_rng()
    draws = rng.normal(size=(400, 12, 2)) * rng.exponential(size=(400, 12, 1))
    results = []
    for points in torch.from_numpy(draws):
        results.append(pw.mean_diversity(torch.cdist(points, points)))
    means, errors = np.array(results).T
    assert 0.7 < np.sqrt((errors**2).mean()) / means.std() < 1.5


def test_diversity_of_two_images() -> None:
    mean, error = pw.mean_diversity(torch.tensor([[0.0, 0.25], [0.25, 0.0]]))
    assert mean == 0.25 and math.isnan(error)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
def test_diversity_of_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected the matrix"):
        pw.mean_diversity(torch.zeros(shape))


def test_published_distances(real_weights: Path, example_images: dict[str, Path]) -> None:
    """The original's example: 0.7219 to the first, 0.138 to the second."""
    pytest.importorskip("PIL.Image", reason="files are read with Pillow")
    model = LPIPS(weights=real_weights, verbose=False)
    matrix = model.pairwise([example_images[name] for name in ("ref", "p0", "p1")])
    assert matrix[0, 1].item() == pytest.approx(0.721881, abs=1e-5)
    assert matrix[0, 2].item() == pytest.approx(0.138, abs=1e-3)
    assert matrix[1, 2].item() == pytest.approx(0.719658, abs=1e-5)


# -------------------------------------------------------------------------------------- devices


@pytest.mark.cuda
@pytest.mark.parametrize("net", NETS)
def test_cuda(net: str) -> None:
    images = some_images(6, (64, 64))
    images[4] = images[1]
    expected = model_of(net).pairwise(images)
    model = model_of(net).cuda()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        matrix = model.pairwise(images)  # moved batch by batch
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert matrix.is_cuda
    torch.testing.assert_close(matrix.cpu(), expected, rtol=2e-3, atol=1e-6)
    assert_is_metric(matrix)
