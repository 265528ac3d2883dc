"""Gradients of float16 trunks: neither vanishing nor overflowing, and right in every graph."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from parity import image_pair, relative, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast.comparison import gradient_scaling
from lpips_fast.comparison.gradient_scaling import enter, leave

WEIGHTS = (1e-4, 1e-2, 1.0, 1e4)


@pytest.fixture(scope="module")
def half() -> lpips_fast.LPIPS:
    weights = trunk_weights("alex")
    return lpips_fast.LPIPS(net="alex", weights=weights, dtype=torch.float16, verbose=False)


@pytest.fixture(scope="module")
def single() -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(net="alex", weights=trunk_weights("alex"), verbose=False)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return image_pair(2, 64, 64, torch.float32, 4)


def gradient(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    leaf = x.clone().requires_grad_()
    (weight * model(leaf, y).sum()).backward()
    return leaf.grad


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


class TestNodes:
    def test_gradients_between_are_scaled_and_outside_are_not(self):
        x = torch.tensor([3.0, 4.0], requires_grad=True)
        between = []
        (same,), token = enter([x])
        squares = same.square()
        squares.register_hook(between.append)
        (distance,) = leave([squares.sum().view(1)], token, [1.0])
        (1e-6 * distance).backward()
        torch.testing.assert_close(x.grad, 2e-6 * x.detach())
        power = between[0][0].item() / 1e-6
        assert math.log2(power) == pytest.approx(round(math.log2(power)), abs=1e-6)
        assert 1024 <= between[0][0].item() <= 2048

    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-45, 1e-38, 3e38])
    def test_any_gradient(self, value):
        x = torch.ones(3, requires_grad=True)
        (same,), token = enter([x])
        (distance,) = leave([same], token, [1.0])
        distance.backward(torch.full((3,), value))
        torch.testing.assert_close(x.grad, torch.full((3,), value), equal_nan=True, rtol=0, atol=0)

    def test_the_largest_of_all_layers_decides(self):
        x = torch.ones((), requires_grad=True)
        seen = []
        (same,), token = enter([x])
        layers = [same * 1, same * 1]
        layers[1].register_hook(seen.append)
        small, large = leave(layers, token, [1.0, 64.0])
        (1e-3 * small + 1.0 * large).backward()
        assert x.grad.item() == pytest.approx(1.001)
        assert 1024 <= seen[0].item() / 64 <= 2048

    def test_parts_and_passes(self):
        x = torch.ones(2, requires_grad=True)
        (same,), token = enter([x])
        first, second = leave([same * 2, same * 3], token, [1.0, 1.0])
        for layer, slope in ((first, 2), (second, 3)):
            (found,) = torch.autograd.grad(layer.sum(), x, retain_graph=True)
            assert torch.equal(found, torch.full((2,), float(slope)))
        (found,) = torch.autograd.grad(1e-8 * (first + second).sum(), x)
        torch.testing.assert_close(found, torch.full((2,), 5e-8))

    def test_without_the_last_node(self):
        x = torch.ones(2, requires_grad=True)
        (same,), _ = enter([x])
        same.sum().backward()
        assert torch.equal(x.grad, torch.ones(2))

    def test_derivatives(self):
        def function(x: Tensor) -> Tensor:
            (same,), token = enter([x])
            return leave([same.pow(3).sum()[None]], token, [2.0])[0]

        x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)

    def test_images_of_half_precision(self):
        x = torch.ones(2, dtype=torch.float16, requires_grad=True)
        (same,), token = enter([x])
        (distance,) = leave([same.float()], token, [1.0])
        distance.backward(torch.full((2,), 1e-3))
        assert torch.equal(x.grad, torch.full((2,), 1e-3, dtype=torch.float16))


class TestModel:
    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_any_loss_weight(self, half, single, pair, weight):
        expected = gradient(single, *pair)
        found = gradient(half, *pair, weight)
        assert cosine(found, expected) > 0.99
        assert (found.norm() / expected.norm()).item() / weight == pytest.approx(1, abs=0.05)

    def test_the_weight_does_not_change_the_direction(self, half, pair):
        usual = gradient(half, *pair)
        assert torch.equal(gradient(half, *pair, 2.0**-20), usual * 2.0**-20)

    @pytest.mark.parametrize("spatial", [False, True])
    def test_both_images_and_linear_weights(self, half, single, pair, monkeypatch, spatial):
        gradients = []
        for model in (half, single):
            monkeypatch.setattr(model, "spatial", spatial)
            model.zero_grad()
            leaves = [t.clone().requires_grad_() for t in pair]
            (1e-4 * model(*leaves).mean()).backward()
            gradients.append(
                [t.grad for t in leaves] + [lin.model[-1].weight.grad for lin in model.lins]
            )
        for found, expected in zip(*gradients):
            assert cosine(found, expected) > 0.99
            assert (found.norm() / expected.norm()).item() == pytest.approx(1, abs=0.05)

    def test_several_losses_and_a_graph_that_goes_on(self, half, single, pair):
        gradients = []
        for model in (half, single):
            leaf = (pair[0] / 2).requires_grad_()
            image = (2 * leaf).clamp(-1, 1)
            value, layers = model(image, pair[1], retPerLayer=True)
            loss = 1e-4 * value.sum() + 1e-3 * layers[2].sum() + 1e-5 * image.square().mean()
            loss = loss + 1e-6 * model(image.flip(-1), pair[1]).sum()
            loss.backward()
            gradients.append(leaf.grad)
        assert cosine(*gradients) > 0.99
        assert (gradients[0].norm() / gradients[1].norm()).item() == pytest.approx(1, abs=0.05)

    def test_one_layer_alone(self, half, single, pair):
        gradients = []
        for model in (half, single):
            leaf = pair[0].clone().requires_grad_()
            _, layers = model(leaf, pair[1], retPerLayer=True)
            (1e-4 * layers[0].sum()).backward()
            gradients.append(leaf.grad)
        assert cosine(*gradients) > 0.99

    def test_whoever_hooks_into_the_trunk_sees_the_gradients_as_they_are(self, half, pair):
        seen, taps = [], []
        handle = half.net.slice2.register_forward_hook(lambda *a: taps.append(a[2]))
        try:
            leaf = pair[0].clone().requires_grad_()
            loss = half(leaf, pair[1]).sum()
            taps[0].register_hook(seen.append)
            loss.backward()
        finally:
            handle.remove()
        assert 0 < seen[0].abs().max() < 1  # scaled it would be a thousand times as much

    def test_features_with_a_graph_are_left_alone(self, half, pair):
        features = half.encode(pair[0].clone().requires_grad_())
        (of_tap,) = torch.autograd.grad(
            half(features, half.encode(pair[1])).sum(), features.taps[1]
        )
        assert 0 < of_tap.abs().max() < 1

    def test_compiled(self, half, pair):
        compiled = torch.compile(half, backend="aot_eager", fullgraph=True)
        found = gradient(compiled, *pair, 1e-4)
        assert relative(found, gradient(half, *pair, 1e-4)) < 1e-3

    def test_float32_is_not_scaled(self, single, pair, monkeypatch):
        monkeypatch.setattr(gradient_scaling, "enter", None)
        gradient(single, *pair)
