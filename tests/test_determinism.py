"""The same bits on any number of threads and in any batch, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor

import lpips_fast

# Small grids go to oneDNN, larger ones through our own convolutions.
SIZES = [(64, 64), (97, 131)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["alex", "squeeze", "vgg"])
def build(request) -> Callable[[torch.dtype], lpips_fast.LPIPS]:
    weights = trunk_weights(request.param)

    def build(dtype: torch.dtype) -> lpips_fast.LPIPS:
        options = {"net": request.param, "weights": weights, "verbose": False}
        model = lpips_fast.LPIPS(**options, dtype=None if dtype == torch.float32 else dtype)
        return model.requires_grad_(False)

    return build


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def value_and_gradient(model: lpips_fast.LPIPS, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = model(leaf, y)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0]), "values"
    assert torch.equal(found[1], expected[1]), "gradients"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_threads(build, threads, size):
    model, pair = build(torch.float32), image_pair(2, *size, torch.float32, 1)
    threads(1)
    expected = value_and_gradient(model, *pair)
    for count in (3, 16) if model.net_name == "vgg" else (2, 3, 7, 12, 16):
        threads(count)
        assert_same(value_and_gradient(model, *pair), expected)
        with torch.no_grad():
            assert torch.equal(model(*pair), expected[0])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_batches(build, size):
    model, (x, y) = build(torch.float32), image_pair(3, *size, torch.float32, 2)
    together = value_and_gradient(model, x, y)
    for k in range(3):
        alone = value_and_gradient(model, x[k : k + 1], y[k : k + 1])
        assert_same(alone, tuple(t[k : k + 1] for t in together))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(build, threads, dtype):
    model, pair = build(dtype), image_pair(2, 64, 64, torch.float32, 3)
    threads(1)
    expected = value_and_gradient(model, *pair)
    for count in (2, 16):
        threads(count)
        assert_same(value_and_gradient(model, *pair), expected)
