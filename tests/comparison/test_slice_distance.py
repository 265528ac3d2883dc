"""A slice and its distance as one node, against one node for every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import image_pair, trunk_weights
from served import needs

from lpips_fast import LPIPS, composed
from lpips_fast.comparison import routes, slice_distance
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.composed import EPS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tap(*shape: int, dtype=torch.float32) -> torch.Tensor:
    feature = torch.randn(shape).relu()
    feature[:, :, 0, 0] = 0  # a dead position
    return feature.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 5, 3, 4), (3, 130, 1, 2)], ids=str)
@pytest.mark.parametrize("is_map", [False, True])
@pytest.mark.parametrize("has_deeper", [False, True])
def test_tap_backward(dtype, shape, is_map, has_deeper):
    feat0, feat1 = tap(*shape, dtype=dtype), tap(*shape, dtype=dtype)
    feat1[-1] = feat0[-1]
    accumulator = composed.accumulator_dtype(dtype)
    weight = torch.rand(shape[1], dtype=accumulator)
    grad = torch.randn((shape[0], 1, *shape[2:]) if is_map else (shape[0], 1), dtype=accumulator)
    deeper = None
    if has_deeper:  # a crop: of other strides
        wide = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3] + 2, dtype=torch.float64)
        deeper = wide.to(dtype).contiguous(memory_format=torch.channels_last)[..., 1:, 1:-1]
    got, got_weight = torch.ops.lpips_fast.tap_backward(
        grad, deeper, feat0, feat1, weight, EPS, True
    )
    before = feat0.double().requires_grad_()  # equal to the ReLU of itself
    weight64 = weight.double().requires_grad_()
    formula = (
        composed.distance_map if is_map else lambda a, b, w, e: composed.distance([a], [b], [w], e)
    )
    value = formula(before.relu(), feat1.double(), weight64, EPS)
    loss = (value * grad.double()).sum()
    if deeper is not None:
        loss = loss + (before.relu() * deeper.double()).sum()
    expected, expected_weight = torch.autograd.grad(loss, (before, weight64))
    scale = expected.abs().max()
    assert torch.all(got[feat0 == 0] == 0)
    torch.testing.assert_close(
        got.double(), expected, rtol=TOLERANCE[dtype], atol=(scale * TOLERANCE[dtype]).item()
    )
    torch.testing.assert_close(got_weight.double(), expected_weight, rtol=1e-4, atol=1e-6)
    (alone,) = torch.ops.lpips_fast.tap_backward(grad, deeper, feat0, feat1, weight, EPS, False)
    assert torch.equal(alone, got)


def test_fake_kernel_of_tap_backward():
    torch.library.opcheck(
        torch.ops.lpips_fast.tap_backward.default,
        (
            torch.randn(2, 1),
            tap(2, 8, 4, 5),
            tap(2, 8, 4, 5),
            tap(2, 8, 4, 5),
            torch.rand(8),
            EPS,
            True,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"deeper": tap(1, 8, 4, 4)}, "deeper layers"),
        ({"feat0": torch.rand(2, 8, 4, 5)}, "channels-last"),
        ({"grad": torch.randn(3, 1)}, "gradient of the distance"),
        ({"weight": torch.rand(7)}, "one per channel"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"grad": torch.randn(2, 1), "deeper": None, "feat0": tap(2, 8, 4, 5)}
    arguments |= {"feat1": tap(2, 8, 4, 5), "weight": torch.rand(8), **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lpips_fast.tap_backward(**arguments, eps=EPS, need_weight=False)


@pytest.fixture(scope="module", params=["alex", "squeeze", "vgg"])
def model(request) -> LPIPS:
    return LPIPS(net=request.param, weights=trunk_weights(request.param), verbose=False)


def layer_by_layer(model: LPIPS) -> LPIPS:
    """A copy that calls every module of the trunk: somebody hooks into its slices."""
    other = copy.deepcopy(model)
    for block in other.net.slices():
        block.register_forward_hook(lambda *_: None)
    return other


def distances_apart(model: LPIPS) -> LPIPS:
    """A copy whose slices run by hand, and whose distance is a node of its own."""
    other = copy.deepcopy(model)
    other.net.register_forward_hook(lambda *_: None)
    return other


def gradients(model: LPIPS, image, target, loss=torch.sum, **options):
    image = image.clone().requires_grad_()
    inputs = [image, *(linear_weight(lin) for lin in model.lins[:2])]
    value = model(image, target, **options)
    return value, torch.autograd.grad(loss(value), inputs)


def assert_same(got, expected, tolerance=1e-4):
    for g, e in zip(got, expected):
        assert (g - e).norm() <= tolerance * e.norm(), (g - e).norm() / e.norm()


class TestInTheModel:
    def test_it_is_taken(self, model, monkeypatch):
        calls = []
        plain = slice_distance.slice_distance
        monkeypatch.setattr(routes, "slice_distance", lambda *a: calls.append(1) or plain(*a))
        image, target = image_pair(1, 65, 70, torch.float32, seed=torch.seed() % 2**31)
        gradients(model, image, target)
        assert len(calls) == model.L
        gradients(layer_by_layer(model), image, target)
        gradients(distances_apart(model), image, target)
        with torch.no_grad():
            model(image, target)
        assert len(calls) == model.L

    @needs(torch.bfloat16)
    def test_autocast(self, model):
        image, target = image_pair(1, 65, 70, torch.float32, seed=torch.seed() % 2**31)
        _, expected = gradients(model, image, target)
        with torch.autocast("cpu", torch.bfloat16):
            _, got = gradients(model, image, target)
            _, plain = gradients(layer_by_layer(model), image, target)
        for g, p, e in zip(got, plain, expected):  # of 8 bits: as near as the modules come
            assert (g - e).norm() <= 1.5 * (p - e).norm() + 0.05 * e.norm()

    @pytest.mark.parametrize("spatial", [False, True])
    @pytest.mark.parametrize("size", [(64, 64), (131, 197)], ids=str)
    def test_values_and_gradients(self, model, spatial, size):
        image, target = image_pair(2, *size, torch.float32, seed=torch.seed() % 2**31)
        model.spatial = spatial
        apart, by_layer = distances_apart(model), layer_by_layer(model)
        try:
            value, got = gradients(model, image, target)
            value_apart, got_apart = gradients(apart, image, target)
            value_by_layer, _ = gradients(by_layer, image, target)
        finally:
            model.spatial = False
        assert torch.equal(value, value_apart)
        assert_same(got, got_apart, 1e-3)
        torch.testing.assert_close(value, value_by_layer, rtol=1e-5, atol=1e-7)
        exact = by_layer.double()
        _, exact_gradients = gradients(exact, image.double(), target.double())
        assert_same(got, exact_gradients, 0.1)  # a ReLU may switch within rounding of 0

    def test_either_image_and_features(self, model):
        image, target = image_pair(1, 64, 80, torch.float32, seed=torch.seed() % 2**31)
        _, expected = gradients(model, image, target)
        image.requires_grad_()
        swapped = torch.autograd.grad(model(target, image).sum(), image)
        encoded = torch.autograd.grad(model(image, model.encode(target)).sum(), image)
        assert torch.equal(swapped[0], expected[0])
        assert torch.equal(encoded[0], expected[0])

    def test_a_loss_of_some_layers(self, model):
        image, target = image_pair(1, 64, 64, torch.float32, seed=torch.seed() % 2**31)
        for k in (0, 1, model.L - 1):
            image.grad, results = None, []
            for each in (model, layer_by_layer(model)):
                x = image.clone().requires_grad_()
                each(x, target, retPerLayer=True)[1][k].sum().backward()
                results.append(x.grad)
            # A ReLU or a window may switch within rounding; a wrong layer would be all wrong.
            assert_same(results[:1], results[1:], 0.05)

    def test_half_precision(self, model):
        half = copy.deepcopy(model)
        half.dtype = torch.bfloat16
        half.net.bfloat16()
        image, target = image_pair(1, 64, 64, torch.float32, seed=torch.seed() % 2**31)
        _, got = gradients(half, image, target)
        _, expected = gradients(layer_by_layer(half), image, target)
        assert got[0].dtype == torch.float32
        assert_same(got, expected, 0.2)  # of 8 bits

    def test_one_image_for_many_targets(self, model):
        image, target = image_pair(3, 64, 64, torch.float32, seed=torch.seed() % 2**31)
        _, got = gradients(model, image[:1], target)
        _, expected = gradients(layer_by_layer(model), image[:1], target)
        assert_same(got, expected, 0.05)  # as above

    def test_second_derivative(self, model):
        # It jumps where a ReLU or a window changes its mind, which rounding decides in one pair of
        # images out of some: a wrong one would be wrong for all.
        errors = []
        for _ in range(4):
            image, target = image_pair(1, 64, 64, torch.float32, seed=torch.seed() % 2**31)
            results = []
            for each in (model, layer_by_layer(model)):
                x = image.clone().requires_grad_()
                (grad,) = torch.autograd.grad(each(x, target).sum(), x, create_graph=True)
                results += torch.autograd.grad((grad.square().sum()) * 1e3, x)
            errors.append(((results[0] - results[1]).norm() / results[1].norm()).item())
            if errors[-1] < 1e-3:
                return
        pytest.fail(f"relative errors {errors}")

    def test_backward_twice(self, model):
        image, target = image_pair(1, 64, 64, torch.float32, seed=torch.seed() % 2**31)
        x = image.clone().requires_grad_()
        value = model(x, target).sum()
        first = torch.autograd.grad(value, x, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(value, x)[0])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, x)
