"""What torch knows of every operator: fake kernels, derivatives or that there is none, FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import parity
import pytest
import torch
from operator_calls import CALLS, Draw, Seeded, in_float64
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import lpips_fast
from lpips_fast import composed, functional

OPS = torch.ops.lpips_fast
WITHOUT_DERIVATIVE = [
    *("direct_pack", "direct_conv2d", "winograd_pack", "winograd_conv2d", "depth_to_space"),
    *("fire", "fire_backward", "tap_backward", "position_weights"),
]


def arguments_of(name: str, seed: int) -> list[Any]:
    return CALLS[name](Draw(Seeded(seed)))[0]


def without_empty_batches(name: str) -> Iterator[list[Any]]:
    """Opcheck itself cannot copy an empty tensor that lies like a crop."""
    drawn = (arguments_of(name, seed) for seed in itertools.count())
    return (
        found for found in drawn if all(t.numel() > 0 for t in tree_leaves(found) if is_tensor(t))
    )


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def with_gradients(arguments: list[Any]) -> list[Any]:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.is_floating_point())

    return tree_map_only(Tensor, leaf, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, autograd, fake kernel, and AOTAutograd with shapes as symbols."""
    operator = getattr(OPS, name).default
    for arguments in itertools.islice(without_empty_batches(name), 2):
        torch.library.opcheck(operator, arguments)
        if name in WITHOUT_DERIVATIVE:
            arguments = with_gradients(arguments)
            torch.library.opcheck(operator, arguments, test_utils="test_autograd_registration")


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_lie_as_real_ones(name):
    for seed in range(8):
        arguments = arguments_of(name, seed)
        real = tree_leaves(getattr(OPS, name)(*arguments))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
            fake = tree_leaves(getattr(OPS, name)(*fakes))
        for got, right in zip(fake, real, strict=True):
            assert (got.shape, got.dtype, got.device) == (right.shape, right.dtype, right.device)
            strides = zip(got.stride(), right.stride(), got.shape)
            assert got.numel() == 0 or all(a == b for a, b, size in strides if size > 1)


def test_bias_relu_in_place():
    """It has no kernel on the CPU: its fake one, and that it is refused in a graph."""
    with FakeTensorMode():
        y = torch.empty(1, 2, 3, 3)
        assert OPS.bias_relu_(y, torch.empty(2)) is None
        with pytest.raises(NotImplementedError, match="no derivative"):
            OPS.bias_relu_(y, torch.empty(2, requires_grad=True))
        with torch.no_grad():
            OPS.bias_relu_(y, torch.empty(2, requires_grad=True))


class TestDerivatives:
    @pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
    def test_none_raises(self, name):
        arguments = with_gradients(arguments_of(name, 0))
        results = [t for t in tree_leaves(getattr(OPS, name)(*arguments)) if t.requires_grad]
        assert results
        with pytest.raises(NotImplementedError, match=f"lpips_fast::{name} has no derivative"):
            results[0].sum().backward()

    def test_scaling_has_none_to_its_constants(self):
        shift = torch.zeros(3, requires_grad=True)
        y = OPS.scale_images([torch.ones(1, 3, 2, 2)], shift, torch.ones(3), False, torch.float32)
        with pytest.raises(NotImplementedError, match="shift and scale"):
            y.sum().backward()

    @pytest.mark.parametrize("kind", ["averaged", "map", "masked"])
    def test_of_any_order(self, kind):
        """Each of a feature that is made from another, too: partial derivatives are no totals."""
        torch.manual_seed(0)
        a, b, w = torch.randn(2, 5, 3, 2), torch.randn(2, 5, 3, 2), torch.rand(5)
        a, b, w = in_float64([[a], [b], [w]])

        def derivatives(formula) -> list[Tensor]:
            s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            first = a[0] * s + s**2
            second = first * b[0] + s
            value = formula([first, second], [b[0], a[0] * s], [w[0] * s, w[0]], **masks(s))
            value = (sum(m.sum() for m in value) if kind == "map" else value).sum()
            values = []
            for _ in range(4):
                (value,) = torch.autograd.grad(value, s, create_graph=True)
                values.append(value.detach())
            return values

        def maps(feats0, feats1, weights):
            return [composed.distance_map(*ts) for ts in zip(feats0, feats1, weights)]

        def masks(s: Tensor) -> dict[str, list[Tensor]]:
            of_all, of_each = a[0][:1, :1].abs(), b[0][:, :1].abs()
            return {"position_weights": [of_all + s, of_each * s]} if kind == "masked" else {}

        ours = functional.distance_map if kind == "map" else functional.distance
        expected = derivatives(maps if kind == "map" else composed.distance)
        for got, right in zip(derivatives(ours), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=0)

    def test_third_of_max_pooling(self):
        x = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)

        def third(pool) -> Tensor:
            value = pool(x).pow(4).sum()
            for _ in range(3):
                (grad,) = torch.autograd.grad(value, x, create_graph=True)
                value = grad.sum()
            return grad

        ours = third(lambda x: OPS.max_pool2d(x, 3, 2, True))
        torchs = third(lambda x: torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True))
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, torchs)


class TestFlops:
    def count(self, call) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def test_convolutions(self):
        x, weight = torch.randn(2, 8, 13, 11), torch.randn(16, 8, 3, 3)
        expected = self.count(lambda: torch.nn.functional.conv2d(x, weight, None, 1, 1))
        direct, winograd = OPS.direct_pack(weight), OPS.winograd_pack(weight)
        assert self.count(lambda: OPS.direct_conv2d(x, direct, None, True, 16, 3, 1, 1)) == expected
        call = (x, winograd, None, True, None, 16, 3, 1, 1)
        assert self.count(lambda: OPS.winograd_conv2d(*call)) == expected

    @pytest.mark.parametrize("name", ["fire", "fire_backward"])
    def test_fire(self, name):
        arguments = arguments_of(name, 3)
        x = arguments[0 if name == "fire" else 1]
        narrow = len(arguments[2]) if name == "fire" else arguments[2].shape[1]
        wide = len(arguments[4]) if name == "fire" else arguments[0].shape[1] // 2
        positions = len(x) * x.shape[2] * x.shape[3]
        expected = 2 * positions * narrow * (x.shape[1] + 10 * wide)
        assert self.count(lambda: getattr(OPS, name)(*arguments)) == expected

    def test_distance(self):
        a = [torch.randn(2, 5, 4, 3), torch.randn(2, 9, 2, 2)]
        w, one = [torch.rand(5), torch.rand(9)], 6 * sum(f.numel() for f in a)
        assert self.count(lambda: OPS.distance(a, a, w, 1e-10)) == one
        assert self.count(lambda: OPS.distance_map(a, a, w, 1e-10)) == one
        p = [torch.ones(1, 1, 4, 3), torch.ones(1, 1, 2, 2)]
        assert self.count(lambda: OPS.masked_distance(a, a, w, p, 1e-10)) == one + 2 * 2 * 16
        grad, needs = torch.ones(2, 2), (True, True, False)
        assert self.count(lambda: OPS.distance_backward(grad, a, a, w, 1e-10, *needs)) == 2 * one
        x = a[0].contiguous(memory_format=torch.channels_last)
        tap = (torch.ones(2, 1), None, x, x, w[0], 1e-10, True)
        assert self.count(lambda: OPS.tap_backward(*tap)) == 2 * 6 * x.numel()

    @pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
    def test_of_a_model_are_those_of_lpips(self, net, reference):
        weights = parity.trunk_weights(net)
        ours = lpips_fast.LPIPS(net=net, weights=weights, verbose=False)
        theirs = reference.LPIPS(net=net, pnet_rand=True, verbose=False)
        x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
        with torch.no_grad():
            expected = self.count(lambda: theirs(x, y))
            assert abs(self.count(lambda: ours(x, y)) / expected - 1) < 0.1
