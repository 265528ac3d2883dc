from __future__ import annotations

import functools

import parity
import pytest
import torch

import lpips_fast
from lpips_fast.export.portable import PortableLPIPS, smallest_dynamic_size

CONFIGURATIONS = [
    {"net": "alex"},
    {"net": "vgg"},
    {"net": "squeeze"},
    {"net": "squeeze", "spatial": True},
    {"net": "alex", "version": "0.0"},
    {"net": "alex", "lpips": False, "spatial": True},
    {"net": "alex", "layers": (0, 3)},
    {"net": "squeeze", "normalization": "l1"},
]


@functools.cache
def trunk_weights(net: str) -> dict[str, torch.Tensor]:
    return parity.trunk_weights(net)


def build(**options) -> lpips_fast.LPIPS:
    weights = trunk_weights(options["net"])
    return lpips_fast.LPIPS(weights=weights, verbose=False, **options)


def pair(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.seed()
    print(f"seed {seed}")
    return parity.image_pair(batch, height, width, torch.float32, seed)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["composed", "fused"])
def test_gives_the_numbers_of_the_model(options, fused):
    model = build(**options)
    in0, in1 = pair(2, 41, 52)
    expected = model(in0, in1)
    found = PortableLPIPS(model, fused=fused)(in0, in1)
    assert found.shape == (expected.shape if model.spatial else (2,))
    torch.testing.assert_close(found, expected.view_as(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["0.1", "0.0"])
def test_normalize_takes_images_in_the_unit_range(version):
    model = build(net="alex", version=version)
    in0, in1 = (image / 2 + 0.5 for image in pair(2, 40, 40))
    expected = model(in0, in1, normalize=True).flatten()
    found = PortableLPIPS(model, normalize=True)(in0, in1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_squeezenet_pools_every_size_as_with_ceil_mode():
    model = build(net="squeeze")
    portable = PortableLPIPS(model)
    for size in range(17, 33):  # all remainders of three poolings and a convolution by two
        in0, in1 = pair(1, size, 2 * size + 1)
        found, expected = portable(in0, in1), model(in0, in1).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_identical_and_zero_images_give_exactly_zero():
    portable = PortableLPIPS(build(net="squeeze"))
    image, _ = pair(3, 33, 47)
    assert torch.equal(portable(image, image), torch.zeros(3))
    zeros = torch.zeros(2, 3, 32, 32)
    assert torch.equal(portable(zeros, zeros), torch.zeros(2))


def test_runs_torch_operators_alone():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespaces.add(func.namespace)
            return func(*args, **(kwargs or {}))

    namespaces: set[str] = set()
    image = torch.zeros(1, 3, 32, 32)
    with Names():
        PortableLPIPS(build(net="squeeze"))(image, image)
    assert namespaces == {"aten"}


def test_is_a_frozen_copy():
    model = build(net="alex", pnet_tune=True)
    portable = PortableLPIPS(model)
    in0, in1 = pair(1, 40, 40)
    before = portable(in0, in1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(portable(in0, in1), before)
    assert not any(p.requires_grad for p in portable.parameters())


def test_smallest_dynamic_size_is_where_the_deepest_tap_has_two_positions():
    for net in ("alex", "vgg", "squeeze"):
        size = smallest_dynamic_size(build(net=net))
        deepest = [lpips_fast.trunk.tap_shapes(net, (n, n))[-1][1:] for n in (size - 1, size)]
        assert deepest == [(1, 1), (2, 2)]
    assert smallest_dynamic_size(build(net="alex", layers=(0,))) < 31


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda model: model.double(), TypeError, "torch.float64, and only float32"),
        (lambda model: setattr(model, "reduction", "mean"), ValueError, "reduction='mean'"),
    ],
)
def test_refuses_what_cannot_be_exported(change, error, says):
    model = build(net="alex")
    change(model)
    with pytest.raises(error, match=says):
        PortableLPIPS(model)


def test_refuses_another_module():
    with pytest.raises(TypeError, match=r"expected a lpips_fast\.LPIPS to export, got Linear"):
        PortableLPIPS(torch.nn.Linear(2, 2))
