"""A slice run by hand against its definition in float64: values, gradients of every order."""

from __future__ import annotations

import pytest
import torch
from parity import trunk_weights
from served import HALF_DTYPES, needs
from torch import Tensor

from lpips_fast import kernels
from lpips_fast.trunk import TRUNKS, Trunk, tap_channels
from lpips_fast.trunk.legality import FastSlice
from lpips_fast.trunk.slice_node import slice_tap
from lpips_fast.trunk.slices import input_gradient, plain, record, run, slice_layers

SLICES = [(net, number) for net, spec in TRUNKS.items() for number in range(1, len(spec.taps) + 1)]
SIZES = {1: (37, 43), 2: (17, 20)}  # of a slice's images; deeper ones get 9x11


def frozen_slice(net: str, number: int, dtype: torch.dtype = torch.float32) -> FastSlice:
    found = Trunk(net, trunk_weights(net)).to(dtype).fast_slices(torch.device("cpu"), dtype)
    assert isinstance(found[number - 1], FastSlice)
    return found[number - 1]


def images(net: str, number: int, batch: int = 2) -> Tensor:
    channels = 3 if number == 1 else tap_channels(net)[number - 2]
    x = torch.randn(batch, channels, *SIZES.get(number, (9, 11)))
    if number > 1:
        x = x.relu()
    return x.contiguous(memory_format=torch.channels_last)


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def exactly(fast: FastSlice, x: Tensor) -> Tensor:
    layers = slice_layers(fast.net, fast.number)
    return plain(layers, [p.double() for p in fast.parameters], x.double())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("net", "number"), SLICES)
class TestAgainstFloat64:
    def test_value(self, net, number):
        fast, x = frozen_slice(net, number), images(net, number)
        layers = slice_layers(net, number)
        y = slice_tap(fast, x)
        assert error(y, exactly(fast, x)) < 6e-6
        assert not y.requires_grad and y.is_contiguous(memory_format=torch.channels_last)
        held = [x]
        assert torch.equal(run([(layers, fast.parameters, fast.keep_nan)], held)[0], y)
        assert held == [], "the memory of the images goes back"
        assert torch.equal(record(layers, fast.parameters, x, fast.keep_nan)[-1], y)

    def test_gradient(self, net, number):
        fast, x = frozen_slice(net, number), images(net, number).requires_grad_()
        y = slice_tap(fast, x)
        grad = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        x32 = x.detach().requires_grad_()
        tap = plain(slice_layers(net, number), fast.parameters, x32)
        (expected,) = torch.autograd.grad(tap, x32, grad)
        # A ReLU or a window may switch within rounding: few of many elements.
        assert error(got, expected.double()) < 2e-2
        assert (got - expected).abs().median() < 1e-5 * expected.abs().max()
        layers = slice_layers(net, number)
        made = record(layers, fast.parameters, x.detach(), fast.keep_nan)
        by_hand = torch.ops.aten.threshold_backward(grad, made[-1], 0)
        by_hand = input_gradient(layers, fast.parameters, by_hand, x.detach(), made)
        assert torch.equal(got, by_hand)


@pytest.mark.parametrize(("net", "number"), [("alex", 1), ("alex", 2), ("squeeze", 2), ("vgg", 2)])
class TestDerivatives:
    """The node against the same layers by torch's own operators."""

    def both(self, net, number, derive):
        fast, x = frozen_slice(net, number), images(net, number, batch=1)
        layers = slice_layers(net, number)
        return [
            derive(function, x.clone().requires_grad_())
            for function in (
                lambda x: slice_tap(fast, x),
                lambda x: plain(layers, fast.parameters, x),
            )
        ]

    def test_second(self, net, number):
        def derive(function, x):
            (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), x)[0]

        got, expected = self.both(net, number, derive)
        assert error(got, expected.double()) < 2e-2

    def test_third(self, net, number):
        def derive(function, x):
            # By a cube, so that the third derivative is not 0.
            value = function(x).pow(3).sum()
            for _ in range(3):
                (grad,) = torch.autograd.grad(value, x, create_graph=True)
                value = grad.square().sum().sqrt()
            return grad.detach()

        got, expected = self.both(net, number, derive)
        assert expected.norm() > 0
        assert error(got, expected.double()) < 5e-2

    def test_many_gradients_at_once(self, net, number):
        directions = None

        def derive(function, x):
            nonlocal directions
            y = function(x)
            if directions is None:
                directions = torch.randn(3, *y.shape)
            return torch.autograd.grad(y, x, directions, is_grads_batched=True)[0]

        got, expected = self.both(net, number, derive)
        assert error(got, expected.double()) < 2e-2


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("net", "number"), [("alex", 1), ("alex", 3), ("squeeze", 2)])
def test_half_precision(net, number, dtype):
    x = images(net, number)
    expected = exactly(frozen_slice(net, number), x)
    y = slice_tap(frozen_slice(net, number, dtype), x.to(dtype))
    assert y.dtype == dtype and error(y, expected) < 0.02


@needs(torch.bfloat16)
def test_autocast():
    fast, x = frozen_slice("alex", 2), images("alex", 2).requires_grad_()
    expected = exactly(fast, x.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = slice_tap(fast, x)
    assert y.dtype == torch.bfloat16 and error(y.detach(), expected) < 0.02
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("wide", [True, False], ids=["our kernels", "without wide vectors"])
def test_nan_in_an_image_reaches_its_first_tap(wide, monkeypatch):
    if not wide:
        monkeypatch.setattr(kernels, "has_wide_vectors", lambda: False)
    for net in TRUNKS:
        x = images(net, 1)
        x[1, 1, 20, 20] = torch.nan
        y = slice_tap(frozen_slice(net, 1), x)
        assert y[1].isnan().any() and y[0].isfinite().all()


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_an_image_has_the_same_bits_in_any_batch(net):
    for number in range(1, len(TRUNKS[net].taps) + 1):
        fast, x = frozen_slice(net, number), images(net, number, batch=5)
        y = slice_tap(fast, x)
        for k in range(5):
            assert torch.equal(slice_tap(fast, x[k : k + 1]), y[k : k + 1])


def test_backward_twice_and_its_memory():
    fast, x = frozen_slice("alex", 1), images("alex", 1).requires_grad_()
    y = slice_tap(fast, x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_a_weight_changed_before_backward_raises_as_in_torch():
    fast, x = frozen_slice("alex", 1), images("alex", 1).requires_grad_()
    y = slice_tap(fast, x)
    fast.parameters[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_the_same_memory_read_in_another_order(net):
    """By ``p.data = …``: same tensor, address, version and bytes, and yet another weight."""
    trunk = Trunk(net, trunk_weights(net))
    for number in (2, 3):
        (fast,) = trunk.fast_slices(torch.device("cpu"), torch.float32)[number - 1 : number]
        assert isinstance(fast, FastSlice)
        x = images(net, number)
        slice_tap(fast, x)
        for weight in fast.parameters[::2]:
            shape = [weight.shape[k] for k in (0, 2, 3, 1)]
            weight.data = weight.data.view(shape).permute(0, 3, 1, 2)
        assert error(slice_tap(fast, x), exactly(fast, x)) < 6e-6
