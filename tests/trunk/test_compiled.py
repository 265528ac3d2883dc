"""Slices as operators: torch.library's own checks, and what torch.compile makes of a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor, nn

from lpips_fast import LPIPS
from lpips_fast.trunk.legality import FastSlice
from lpips_fast.trunk.slices import plain, slice_layers

OPS = torch.ops.lpips_fast
SLICES = [("alex", 1), ("alex", 2), ("squeeze", 1), ("squeeze", 2), ("vgg", 2)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(net: str = "alex", **options) -> LPIPS:
    return LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)


def slice_of(net: str, number: int) -> tuple[list[Tensor], Tensor]:
    """Parameters of a slice, and images for it."""
    trunk = model_of(net).net
    fast = trunk.fast_slices(torch.device("cpu"), torch.float32)[number - 1]
    assert isinstance(fast, FastSlice)
    parameters = [p.detach() for p in fast.parameters]
    channels = next(p.shape[1] for p in parameters if p.dim() == 4)
    x = torch.rand(2, channels, 23, 26).contiguous(memory_format=torch.channels_last)
    return parameters, x


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("net", "number"), SLICES)
def test_operators_compute_what_torchs_own_compute(net: str, number: int, poisoned) -> None:
    parameters, x = slice_of(net, number)
    layers = slice_layers(net, number)
    exact = x.double().requires_grad_()
    expected = plain(layers, [p.double() for p in parameters], exact)
    tap = OPS.slice_tap(x, parameters, net, number)
    made = OPS.slice_record(x, [], parameters, net, number)
    assert torch.equal(made[-1], tap)
    assert relative(tap, expected.detach()) < 1e-5
    grad = torch.randn_like(tap)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    found = OPS.slice_backward(grad, x, made, [], parameters, net, number)
    assert relative(found, expected_grad) < 1e-4
    assert not any(t.isnan().any() for t in (*made[:1], tap, found))


@pytest.mark.parametrize(("net", "number"), SLICES)
def test_opcheck(net: str, number: int) -> None:
    parameters, x = slice_of(net, number)
    leaf = x.clone().requires_grad_()
    made = OPS.slice_record(x, [], parameters, net, number)
    weight = torch.rand(made[-1].shape[1])
    target = made[-1].roll(1, dims=0)
    check = torch.library.opcheck
    check(OPS.slice_tap.default, (x, parameters, net, number))
    check(OPS.slice_record.default, (leaf, [], parameters, net, number))
    check(
        OPS.slice_backward.default, (torch.randn_like(target), x, made, [], parameters, net, number)
    )
    for spatial in (False, True):
        arguments = (leaf, target, weight, [], parameters, net, number, spatial)
        check(OPS.slice_distance.default, arguments)
    value, *made = OPS.slice_distance(x, target, weight, [], parameters, net, number, False)
    arguments = (None, torch.ones_like(value), x, target, weight, made, [], parameters, net, number)
    check(OPS.slice_distance_backward.default, (*arguments, True, True))


def test_a_target_that_wants_a_gradient_is_refused() -> None:
    parameters, x = slice_of("alex", 1)
    target = OPS.slice_tap(x, parameters, "alex", 1).requires_grad_()
    weight = torch.rand(target.shape[1])
    value = OPS.slice_distance(
        x.requires_grad_(), target, weight, [], parameters, "alex", 1, False
    )[0]
    with pytest.raises(RuntimeError, match="detach it"):
        value.sum().backward()


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_compiled_models_have_the_bits_of_eager_ones(net: str) -> None:
    model = model_of(net)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    x, y = image_pair(2, 64, 64, torch.float32, seed=0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, y), model(x, y))
    assert "lpips_fast.slice_tap" in graphs[-1].print_readable(print_output=False)
    grads = []
    for function in (model, compiled):
        leaf = x.clone().requires_grad_()
        function(leaf, y).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert "lpips_fast.slice_distance" in graphs[-1].print_readable(print_output=False)


def test_inductor_with_other_sizes_and_a_step() -> None:
    model = model_of()

    def loss(image: Tensor, target: Tensor) -> Tensor:
        return model(image * 0.5, target).mean()

    compiled = torch.compile(loss, dynamic=True)
    for size in (64, 80):
        x, y = image_pair(2, size, size, torch.float32, seed=size)
        grads = []
        for function in (loss, compiled):
            leaf = x.clone().requires_grad_()
            function(leaf, y).backward()
            grads.append(leaf.grad)
        assert relative(grads[1], grads[0]) < 1e-5


def _pool(model: LPIPS) -> None:
    model.net.slice2._modules["2"] = nn.AvgPool2d(3, 2)


def _stride(model: LPIPS) -> None:
    model.net.slice3[1].padding = (0, 0)


def _weights(model: LPIPS) -> None:
    for parameter in model.net.parameters():
        parameter.data.mul_(0.5)


@pytest.mark.parametrize("change", [_pool, _stride, _weights])
def test_what_is_changed_after_compiling_is_followed(change) -> None:
    """Hooks apart, which torch.compile itself does not look for again (docs/module.md)."""
    model = model_of()
    x, y = image_pair(1, 64, 64, torch.float32, seed=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(x, y)
        change(model)
        after = model(x, y)
        assert relative(compiled(x, y), after) < 1e-5
    assert relative(before, after) > 1e-4


def test_a_second_derivative_of_compiled_code_is_an_error() -> None:
    model = model_of()
    x, y = image_pair(1, 64, 64, torch.float32, seed=2)
    leaf = x.clone().requires_grad_()
    value = torch.compile(model, backend="aot_eager")(leaf, y).sum()
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()
