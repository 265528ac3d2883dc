"""The CUDA kernels on a GPU, against the composed formula in float64 and against torch's machinery.

tests/kernels/test_cuda_emulation.py and test_cuda_trunk_emulation.py run the same kernels on the
CPU; here is what needs the device: the real compiler and memory, streams, graphs, devices,
compilation, 64-bit sizes, launches, and cuDNN.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from distance_rounding import (
    assert_within_rounding,
    distance_bound,
    gradient_scale,
    maps,
    relative_error,
)
from parity import image_pair, trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast import composed, functional, kernels
from lpips_fast.trunk import cuda_convolution
from lpips_fast.trunk.convolution import Convolution

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
EPS = 1e-10
CHANNELS_LAST, CHANNELS_FIRST = torch.channels_last, torch.contiguous_format
ORDERS = [CHANNELS_LAST, CHANNELS_FIRST]
ORDER_NAMES = ["channels_last", "channels_first"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WIDTHS = [1, 2, 3, 5, 8, 31, 32, 33, 64, 100, 192, 256, 384, 512, 1000, 2048]
DISTANCE_ERROR = {torch.float64: 1e-12}
GRADIENT_ERROR = {
    torch.float64: 1e-11,
    torch.float32: 5e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
ALEX = [(64, 15), (192, 7), (384, 3), (256, 3), (256, 3)]  # channels, height at 64 pixels


@pytest.fixture(autouse=True)
def built_with_cuda() -> None:
    if "_cuda" not in kernels.LOADED_LIBRARIES:
        reason = "lpips_fast is built without CUDA kernels (set LPIPS_FAST_CUDA=1 and rebuild)"
        if os.environ.get("LPIPS_FAST_REQUIRE_CUDA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    return torch.Generator(DEVICE).manual_seed(seed)


def make_features(
    shape: Sequence[int], dtype: torch.dtype, order, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Features like a ReLU's, with zero vectors and positions where both images agree; a weight."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    a = draw(*shape).relu_()
    b = (a + 0.5 * draw(*shape)).relu_()
    kind = torch.randint(0, 12, (shape[0], 1, *shape[2:]), generator=generator, device=DEVICE)
    a = torch.where(kind == 0, 0, a)
    b = torch.where((kind == 0) | (kind == 1), 0, b)
    b = torch.where(kind == 2, a, b)
    weight = draw(shape[1]).to(composed.accumulator_dtype(dtype))
    return *(x.to(dtype).contiguous(memory_format=order) for x in (a, b)), weight


def check_gradient(actual: Tensor, expected: Tensor, scale: Tensor, feat: Tensor) -> None:
    dtype = actual.dtype
    limit = 65504 if dtype == torch.float16 else float("inf")
    zero = (feat.norm(dim=1, keepdim=True) == 0).expand_as(actual)
    rest = ~zero & (expected.abs() < limit)
    assert bool(actual[zero].isfinite().all())
    clamped = expected.clamp(-limit, limit)[zero]
    assert relative_error(actual[zero], clamped) < max(GRADIENT_ERROR[dtype], 1e-5)
    # Below float16's normal numbers an error is a step of 2^-24, however small the value.
    step = 2**-24 * actual.numel() ** 0.5 if dtype == torch.float16 else 0
    error = float((actual[rest].double() - expected[rest]).norm())
    assert error <= GRADIENT_ERROR[dtype] * float(scale[rest].norm()) + step


def check_all(feats0, feats1, weights, generator: torch.Generator) -> None:
    """Averages, maps, and the gradients of both, through autograd, against float64."""
    dtype = feats0[0].dtype
    accumulator, error = composed.accumulator_dtype(dtype), DISTANCE_ERROR.get(dtype, 4e-6)
    for spatial in (False, True):
        leaves = [[t.detach().requires_grad_() for t in g] for g in (feats0, feats1, weights)]
        exact = [[t.detach().double().requires_grad_() for t in g] for g in leaves]
        operator = torch.ops.lpips_fast.distance_map if spatial else torch.ops.lpips_fast.distance
        formula = maps if spatial else composed.distance
        results, expected = operator(*leaves, EPS), formula(*exact)
        magnitude = formula(exact[0], exact[1], [w.abs() for w in exact[2]])
        if not spatial:
            results, expected, magnitude = [results], [expected], [magnitude]
        for result, reference, size in zip(results, expected, magnitude):
            assert result.dtype == accumulator
            assert bool(((result - reference).abs() <= distance_bound(size, error)).all())
        upstream = [
            torch.randn(r.shape, generator=generator, device=DEVICE, dtype=accumulator)
            for r in results
        ]
        got = torch.autograd.grad(results, list(itertools.chain(*leaves)), upstream)
        exact_leaves = list(itertools.chain(*exact))
        wanted = torch.autograd.grad(expected, exact_leaves, [g.double() for g in upstream])
        count = len(feats0)
        for index in range(count):
            a, b, w = (group[index].detach() for group in exact)
            pixels = a.shape[2] * a.shape[3]
            g = upstream[index] if spatial else upstream[0][:, index].view(-1, 1, 1, 1) / pixels
            for side, feat, other in ((0, a, b), (1, b, a)):
                scale = gradient_scale(g.double(), feat, other, w)
                at = side * count + index
                check_gradient(got[at], wanted[at], scale, feat)
            assert relative_error(got[2 * count + index], wanted[2 * count + index]) < max(
                1e-5, 10 * DISTANCE_ERROR.get(dtype, 0)
            )


# ---------------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", WIDTHS)
def test_every_width(poisoned, generator, dtype, order, channels):
    a, b, w = make_features((2, channels, 13, 11), dtype, order, generator)
    check_all([a], [b], [w], generator)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 1, 1), (3, 8, 1, 300), (3, 8, 300, 1), (1, 64, 256, 256), (32, 128, 15, 15)],
    ids=str,
)
def test_every_shape(poisoned, generator, dtype, order, shape):
    a, b, w = make_features(shape, dtype, order, generator)
    check_all([a], [b], [w], generator)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(poisoned, generator, dtype, order):
    """Crops, slices and misaligned addresses are read where they lie."""
    a, b, w = make_features((4, 72, 24, 24), dtype, order, generator)
    for view in (
        (slice(None), slice(None), slice(3, 20), slice(1, 22)),
        (slice(None), slice(None), slice(8, 24), slice(8, 24)),
        (slice(1, None, 2), slice(None), slice(None), slice(None)),
        (slice(None), slice(1, 66), slice(None), slice(None)),
        (slice(None), slice(8, 72), slice(None), slice(None)),
    ):
        check_all([a[view]], [b[view]], [w[view[1]]], generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 33, 64, 192, 512, 1200])
def test_tap_backward(poisoned, generator, dtype, channels):
    """The gradient of the distance and a deeper one, through the ReLU, against float64."""
    tap, target, w = make_features((2, channels, 13, 11), dtype, CHANNELS_LAST, generator)
    deeper = images_of(tap.shape, dtype, CHANNELS_LAST, generator)
    for shape, more in itertools.product(((2, 1), (2, 1, 13, 11)), (None, deeper)):
        grad = torch.randn(shape, generator=generator, device=DEVICE, dtype=w.dtype)
        got, got_weight = torch.ops.lpips_fast.tap_backward(grad, more, tap, target, w, EPS, True)
        leaf, weight = tap.double().requires_grad_(), w.double().requires_grad_()
        if len(shape) == 4:
            value, g = composed.distance_map(leaf, target.double(), weight), grad.double()
        else:
            value = composed.distance([leaf], [target.double()], [weight])
            g = grad.double().view(2, 1, 1, 1) / (13 * 11)
        expected, expected_weight = torch.autograd.grad(value, [leaf, weight], grad.double())
        expected = torch.where(tap > 0, expected + (0 if more is None else more.double()), 0)
        scale = gradient_scale(g, tap.double(), target.double(), w.double()).norm()
        scale += 0 if more is None else more.double().norm()
        step = 2**-24 * got.numel() ** 0.5 if dtype == torch.float16 else 0
        assert float((got.double() - expected).norm()) <= GRADIENT_ERROR[dtype] * scale + step
        assert relative_error(got_weight, expected_weight) < 1e-5


def test_several_layers_of_both_orders(poisoned, generator):
    layers = [
        make_features((3, 5 + 16 * k, 3 + k, 9), torch.float16, ORDERS[k % 2], generator)
        for k in range(19)
    ]
    check_all(*(list(group) for group in zip(*layers)), generator)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked(poisoned, generator, dtype, order):
    """Position weights, of all images and of each; ones leave every bit as it is."""
    drawn = [make_features((2, c, 7, 5), dtype, order, generator) for c in (64, 33)]
    a, b, w = (list(group) for group in zip(*drawn, strict=True))
    p = [torch.rand(n, 1, 7, 5, generator=generator, device=DEVICE).to(w[0].dtype) for n in (1, 2)]
    exact = [[t.double() for t in group] for group in (a, b, w, p)]
    expected = composed.distance(*exact[:3], position_weights=exact[3])
    magnitude = composed.distance(
        exact[0], exact[1], [x.abs() for x in exact[2]], position_weights=exact[3]
    )
    value = functional.distance(a, b, w, position_weights=p)
    error = DISTANCE_ERROR.get(dtype, 5e-6)
    assert ((value - expected).abs() <= 4 * error * (magnitude + magnitude.sqrt()) + error**2).all()
    results = []
    for masking in ({}, {"position_weights": [torch.ones_like(x) for x in p]}):
        leaves = [x.clone().requires_grad_() for x in a]
        value = functional.distance(leaves, b, w, **masking)
        results.append([value, *torch.autograd.grad(value.sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_masks_of_images(net):
    """Weights made by torch's operators on the device."""
    model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
    a, b = image_pair(2, 67, 75, torch.float32, 0)
    masks = [torch.rand(67, 75), torch.rand(2, 1, 67, 75) > 0.5, torch.ones(67, 75) * 0.3]
    options = [{"mask_mode": mode} for mode in ("weighted", "fill")]
    cases = list(itertools.product(masks, options))
    with torch.no_grad():
        expected = [model(a, b, mask=m, **how) for m, how in cases]
        model.to(DEVICE)
        a, b = a.to(DEVICE), b.to(DEVICE)
        for (m, how), right in zip(cases, expected, strict=True):
            torch.testing.assert_close(
                model(a, b, mask=m.to(DEVICE), **how).cpu(), right, rtol=1e-3, atol=1e-6
            )
        with pytest.raises(ValueError, match="mask is empty for image 1"):
            model(a, b, mask=torch.stack([masks[2], masks[2] * 0])[:, None].to(DEVICE))


def test_agrees_with_the_cpu_kernels(generator):
    layers = [make_features((2, c, s, s), torch.float32, CHANNELS_LAST, generator) for c, s in ALEX]
    a, b, w = (list(group) for group in zip(*layers))
    on_cpu = [[t.cpu() for t in group] for group in (a, b, w)]
    expected = torch.ops.lpips_fast.distance(*on_cpu, EPS)
    result = torch.ops.lpips_fast.distance(a, b, w, EPS)
    assert relative_error(result.cpu(), expected.double()) < 1e-6


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestExact:
    SHAPES = ((2, 64, 31, 33), (2, 100, 13, 15), (1, 1200, 5, 7), (2, 512, 16, 16))

    def test_identical_features_give_zero(self, generator, dtype, order):
        for shape in self.SHAPES:
            a, _, w = make_features(shape, dtype, order, generator)
            assert not torch.ops.lpips_fast.distance([a], [a.clone()], [w], EPS).any()
            assert not torch.ops.lpips_fast.distance_map([a], [a.clone()], [w], EPS)[0].any()

    def test_symmetric_to_the_bit(self, generator, dtype, order):
        for shape in self.SHAPES:
            a, b, w = make_features(shape, dtype, order, generator)
            grad = torch.rand(shape[0], 1, dtype=w.dtype, device=DEVICE)
            for name in ("distance", "distance_map"):
                operator = getattr(torch.ops.lpips_fast, name)
                forth, back = operator([a], [b], [w], EPS), operator([b], [a], [w], EPS)
                assert all(torch.equal(x, y) for x, y in zip(forth, back))
            backward = torch.ops.lpips_fast.distance_backward
            da, db, dw = backward(grad, [a], [b], [w], EPS, True, True, True)
            db2, da2, dw2 = backward(grad, [b], [a], [w], EPS, True, True, True)
            assert torch.equal(da, da2) and torch.equal(db, db2) and torch.equal(dw, dw2)

    def test_same_bits_run_after_run(self, generator, dtype, order):
        """While another stream keeps the device busy, so that blocks run in other orders."""
        busy = torch.cuda.Stream()
        noise = torch.rand(1024, 1024, device=DEVICE)
        for shape in self.SHAPES:
            a, b, w = make_features(shape, dtype, order, generator)
            grad = torch.rand(shape[0], 1, dtype=w.dtype, device=DEVICE)
            results = []
            for repeat in range(8):
                with torch.cuda.stream(busy):
                    for _ in range(repeat):
                        noise @ noise
                results.append(
                    [
                        torch.ops.lpips_fast.distance([a], [b], [w], EPS),
                        *torch.ops.lpips_fast.distance_map([a], [b], [w], EPS),
                        *torch.ops.lpips_fast.distance_backward(
                            grad, [a], [b], [w], EPS, True, True, True
                        ),
                    ]
                )
            torch.cuda.synchronize()
            for other in results[1:]:
                assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
class TestMagnitudes:
    @pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
    def test_tiny_differences_do_not_cancel(self, generator, order, step):
        a, noise, w = make_features((1, 64, 16, 16), torch.float32, order, generator)
        b, w = a * (1 + step * noise), w.abs()
        exact = composed.distance([a.double()], [b.double()], [w.double()])
        result = torch.ops.lpips_fast.distance([a], [b], [w], EPS)
        assert relative_error(result, exact) < 1e-5 + 2e-7 / step

    @pytest.mark.parametrize(
        ("dtype", "scale"),
        [
            (torch.float32, 1e15),
            (torch.float32, 1e-15),
            (torch.float16, 6e3),
            (torch.float16, 1e-7),
            (torch.bfloat16, 1e15),
            (torch.bfloat16, 1e-15),
        ],
        ids=str,
    )
    def test_large_and_small(self, generator, order, dtype, scale):
        a, b, w = make_features((2, 64, 9, 9), torch.float64, order, generator)
        a, b = ((x * scale).to(dtype) for x in (a, b))
        w = w.abs().float()
        exact = composed.distance([a.double()], [b.double()], [w.double()])
        assert relative_error(torch.ops.lpips_fast.distance([a], [b], [w], EPS), exact) < 1e-5

    def test_float16_gradient_of_zero_vectors_is_clamped_and_no_other(self, order):
        a = torch.zeros(1, 16, 2, 2, dtype=torch.float16, device=DEVICE)
        a[0, :, 0, 0] = 1e-4
        b = torch.rand(1, 16, 2, 2, device=DEVICE).add(0.5).half()
        a, b = (x.contiguous(memory_format=order) for x in (a, b))
        w = torch.ones(16, device=DEVICE)
        grad = torch.full((1, 1), 1e6, device=DEVICE)
        needs = (True, False, False)
        (da,) = torch.ops.lpips_fast.distance_backward(grad, [a], [b], [w], EPS, *needs)
        zero = (a == 0).all(dim=1, keepdim=True).expand_as(a)
        assert bool((da[zero].abs() == 65504).all())
        assert bool(da[~zero].isinf().any()), "an overflow elsewhere must stay visible"

    def test_nan_is_not_hidden(self, generator, order):
        a, b, w = make_features((2, 32, 9, 9), torch.float32, order, generator)
        a[1, 3, 2, 2] = float("nan")
        result = torch.ops.lpips_fast.distance([a], [b], [w], EPS)
        assert bool(result[0].isfinite()) and bool(result[1].isnan())


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0), (2, 0, 4, 4)], ids=str)
def test_empty(generator, order, shape):
    full = (shape[0], 8, 3, 3)
    layers = [make_features(s, torch.float32, order, generator) for s in (shape, full)]
    a, b, w = ([t.requires_grad_() for t in group] for group in zip(*layers))
    result = torch.ops.lpips_fast.distance(a, b, w, EPS)
    assert_within_rounding(result, composed.distance, a, b, w, 4e-6)
    grads = torch.autograd.grad(result.sum(), [*a, *b, *w])
    assert [g.shape for g in grads] == [t.shape for t in [*a, *b, *w]]
    for x, *layer in zip(torch.ops.lpips_fast.distance_map(a, b, w, EPS), a, b, w):
        assert_within_rounding(x, lambda *one: maps(*one)[0], *([t] for t in layer), 4e-6)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_more_than_2_31_elements(order):
    """One feature of 2^31 elements and more; the end of it must be read and written right."""
    shape = (1, 64, 5800, 5800)
    count = shape[1] * shape[2] * shape[3]
    needed = 2 * count * 4 + (2 << 30)  # two features and two gradients in half precision
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, there are {free >> 30}")
    a, b = (
        torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=order).normal_()
        for _ in range(2)
    )
    w = torch.rand(64, device=DEVICE)
    (result,) = torch.ops.lpips_fast.distance_map([a], [b], [w], EPS)
    corners = [(slice(None), slice(None), rows) for rows in (slice(0, 3), slice(5797, 5800))]
    for corner in corners:
        expected = composed.distance_map(a[corner].double(), b[corner].double(), w.double())
        assert relative_error(result[corner], expected) < 1e-5
    average = torch.ops.lpips_fast.distance([a], [b], [w], EPS)
    assert relative_error(average, result.double().mean(dim=(2, 3))) < 1e-5
    grad = torch.ones_like(average)
    needs = (True, True, False)
    grads = torch.ops.lpips_fast.distance_backward(grad, [a], [b], [w], EPS, *needs)
    for corner in corners:
        leaves = [x[corner].double().requires_grad_() for x in (a, b)]
        expected = composed.distance_map(*leaves, w.double()).sum() / (shape[2] * shape[3])
        for actual, wanted in zip(grads, torch.autograd.grad(expected, leaves)):
            # The gradients are far below float16's normal numbers: compare within its last step.
            assert float((actual[corner].double() - wanted).abs().max()) <= 2**-24


# ------------------------------------------------------------------------------ torch's machinery


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("spatial", [False, True], ids=["averaged", "map"])
def test_gradcheck_twice(order, spatial):
    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
        return x.contiguous(memory_format=order).requires_grad_()

    a, b = leaf(2, 5, 3, 2), leaf(2, 5, 3, 2)
    w = torch.rand(5, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def distance(a: Tensor, b: Tensor, w: Tensor):
        function = functional.distance_map if spatial else functional.distance
        result = function([a, b * 2], [b, a], [w, w])
        return tuple(result) if spatial else result

    assert torch.autograd.gradcheck(distance, (a, b, w))
    assert torch.autograd.gradgradcheck(distance, (a, b, w))


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("name", ["distance", "distance_map"])
class TestOpcheck:
    def inputs(self, order) -> tuple[list[Tensor], ...]:
        def feature(*shape: int) -> Tensor:
            x = torch.randn(shape, device=DEVICE).contiguous(memory_format=order)
            return x.requires_grad_()

        shapes = [(2, 5, 4, 3), (2, 16, 2, 2)]
        weights = [torch.rand(s[1], device=DEVICE, requires_grad=True) for s in shapes]
        return [feature(*s) for s in shapes], [feature(*s) for s in shapes], weights

    def test_forward(self, name, order):
        operator = getattr(torch.ops.lpips_fast, name).default
        torch.library.opcheck(operator, (*self.inputs(order), EPS))

    @pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=str)
    def test_backward(self, name, order, needs):
        a, b, w = self.inputs(order)
        grad = torch.rand(2, 2, device=DEVICE)
        if name == "distance_map":
            grad = [torch.rand(2, 1, *f.shape[2:], device=DEVICE) for f in a]
        operator = getattr(torch.ops.lpips_fast, f"{name}_backward").default
        torch.library.opcheck(operator, (grad, a, b, w, EPS, *needs))


def random_layers(generator, dtype=torch.float32, n=2, order=CHANNELS_LAST):
    layers = [make_features((n, c, s, s), dtype, order, generator) for c, s in ALEX]
    return tuple(list(group) for group in zip(*layers))


def test_refusals_are_sentences(generator):
    a, b, w = random_layers(generator)
    with pytest.raises(RuntimeError, match="must be on one device"):
        torch.ops.lpips_fast.distance(a, b, [w[0].cpu(), *w[1:]], EPS)
    with pytest.raises(RuntimeError, match="accumulator's dtype"):
        torch.ops.lpips_fast.distance(a, b, [x.double() for x in w], EPS)


def test_current_stream(generator):
    """The features are filled late, on a stream of their own; the kernel must come after."""
    a, b, w = random_layers(generator)
    expected = torch.ops.lpips_fast.distance(a, b, w, EPS)
    late = [torch.zeros_like(x) for x in a]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, a):
            x.copy_(y)
        result = torch.ops.lpips_fast.distance(late, b, w, EPS)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_second_device(generator):
    """Features of device 1 while device 0 is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    a, b, w = random_layers(generator)
    expected = torch.ops.lpips_fast.distance(a, b, w, EPS)
    with torch.cuda.device(0):
        moved = [[t.to("cuda:1").requires_grad_() for t in group] for group in (a, b, w)]
        result = torch.ops.lpips_fast.distance(*moved, EPS)
        assert result.device == torch.device("cuda:1")
        result.sum().backward()
        assert torch.cuda.current_device() == 0
    assert relative_error(result.cpu(), expected.cpu().double()) < 1e-6
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in moved[2])


@pytest.fixture
def forbid_synchronisation() -> Iterator[contextlib.AbstractContextManager]:
    @contextlib.contextmanager
    def forbidden():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    yield forbidden()


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_no_host_synchronisation(generator, order, forbid_synchronisation):
    a, b, w = random_layers(generator, order=order)
    leaves = [t.requires_grad_() for group in (a, b, w) for t in group]
    torch.ops.lpips_fast.distance(a, b, w, EPS).sum().backward()  # loads modules
    with forbid_synchronisation:
        torch.ops.lpips_fast.distance(a, b, w, EPS).sum().backward()
        sum(m.sum() for m in torch.ops.lpips_fast.distance_map(a, b, w, EPS)).backward()
    assert all(bool(t.grad.isfinite().all()) for t in leaves)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_graph_capture(generator, order):
    """Capture once, replay with other features in the same memory."""
    first, second = (random_layers(generator, torch.float16, order=order) for _ in range(2))
    a, b, w = ([t.clone() for t in group] for group in first)
    grad = torch.rand(2, len(ALEX), generator=generator, device=DEVICE)

    def step() -> list[Tensor]:
        return [
            torch.ops.lpips_fast.distance(a, b, w, EPS),
            *torch.ops.lpips_fast.distance_map(a, b, w, EPS),
            *torch.ops.lpips_fast.distance_backward(grad, a, b, w, EPS, True, True, True),
        ]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for inputs in (second, first):
        for static, fresh in zip(itertools.chain(a, b, w), itertools.chain(*inputs)):
            static.copy_(fresh)
        graph.replay()
        for x, y in zip(captured, step()):
            assert torch.equal(x, y)


class DistanceOfTwo(torch.nn.Module):
    """A feature extractor and the distance of what it extracts, trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.Conv2d(3, 64, 3, device=DEVICE)
        self.weight = torch.nn.Parameter(torch.rand(64, device=DEVICE))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (self.trunk(image).relu() for image in (x, y))
        return functional.distance([a], [b], [self.weight]).sum()


def test_make_graphed_callables():
    model = DistanceOfTwo()
    x = torch.rand(2, 3, 32, 32, device=DEVICE, requires_grad=True)
    y = torch.rand(2, 3, 32, 32, device=DEVICE)
    expected = model(x, y)
    wanted = torch.autograd.grad(expected, [x, model.weight])
    sample = (torch.rand_like(x).requires_grad_(), torch.rand_like(y))
    graphed = torch.cuda.make_graphed_callables(model, sample)
    result = graphed(x, y)
    got = torch.autograd.grad(result, [x, model.weight])
    assert relative_error(result, expected.double()) < 1e-5
    for actual, reference in zip(got, wanted):
        assert relative_error(actual, reference.double()) < 1e-4


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("spatial", [False, True], ids=["averaged", "map"])
def test_compile_without_graph_breaks(generator, order, spatial):
    a, b, w = random_layers(generator, order=order)

    def loss(a: list[Tensor], b: list[Tensor], w: list[Tensor]) -> Tensor:
        if spatial:
            return sum(m.mean() for m in functional.distance_map(a, b, w))
        return functional.distance(a, b, w).sum()

    leaves = [t.requires_grad_() for t in a]
    expected = torch.autograd.grad(loss(a, b, w), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(compiled(a, b, w), leaves)
    for actual, reference in zip(got, expected):
        assert relative_error(actual, reference.double()) < 1e-5


def test_export(generator):
    class Distance(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return functional.distance([a], [b])

    a, b, _ = make_features((2, 64, 9, 9), torch.float32, CHANNELS_LAST, generator)
    program = torch.export.export(Distance(), (a, b))
    assert torch.equal(program.module()(a, b), functional.distance([a], [b]))


def test_autocast(generator):
    """Under autocast the features are half precision, and the distance is float32 all the same."""
    x, y = (torch.rand(2, 3, 32, 32, device=DEVICE) for _ in range(2))
    trunk = torch.nn.Conv2d(3, 64, 3, device=DEVICE).to(memory_format=CHANNELS_LAST)
    with torch.autocast("cuda", torch.float16):
        a, b = trunk(x), trunk(y)
        result = functional.distance([a], [b])
    assert a.dtype == torch.float16 and result.dtype == torch.float32
    exact = composed.distance([a.double()], [b.double()], [torch.ones(64, device=DEVICE).double()])
    assert relative_error(result, exact) < 1e-5


# --------------------------------------------------------------------------- launches and memory


def kernels_of(function) -> list[str]:
    """Names of the kernels that a call launches."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def test_number_of_launches(generator):
    a, b, w = random_layers(generator, n=1)
    small = kernels_of(lambda: torch.ops.lpips_fast.distance(a, b, w, EPS))
    if not small:
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(small) == 1, small
    grad = torch.ones(1, len(a), device=DEVICE)
    needs = (True, False, False)
    backward = torch.ops.lpips_fast.distance_backward
    assert len(kernels_of(lambda: backward(grad, a, b, w, EPS, *needs))) == 1
    x, y, v = make_features((8, 64, 256, 256), torch.float16, CHANNELS_LAST, generator)
    large = kernels_of(lambda: torch.ops.lpips_fast.distance([x], [y], [v], EPS))
    assert len(large) == 2, large


def test_forward_needs_no_memory_of_the_features_size(generator):
    a, b, w = make_features((4, 64, 128, 128), torch.float32, CHANNELS_LAST, generator)
    size = a.numel() * a.element_size()
    torch.ops.lpips_fast.distance([a], [b], [w], EPS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = torch.ops.lpips_fast.distance([a], [b], [w], EPS)
    assert torch.cuda.max_memory_allocated() - before < size / 100
    leaf = a.detach().requires_grad_()
    result = torch.ops.lpips_fast.distance([leaf], [b], [w], EPS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(result.sum(), leaf)
    assert torch.cuda.max_memory_allocated() - before < size * 1.01 + (1 << 20)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_whole_module_agrees_with_the_cpu(net):
    torch.manual_seed(0)
    model = lpips_fast.LPIPS(net=net, pnet_rand=True, verbose=False)
    x, y = (torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2))
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = model(x, y)
        result = model.to(DEVICE)(x.to(DEVICE), y.to(DEVICE))
    assert relative_error(result.cpu(), expected.double()) < 1e-3


# --------------------------------------------------------------------------------- the trunk


def images_of(shape: Sequence[int], dtype: torch.dtype, order, generator) -> Tensor:
    x = torch.randn(shape, generator=generator, device=DEVICE)
    return x.to(dtype).contiguous(memory_format=order)


def shift_and_scale() -> list[Tensor]:
    layer = lpips_fast.ScalingLayer().to(DEVICE)
    return [layer.shift, layer.scale]


def scaled(batches: Sequence[Tensor], unit_range: bool, dtype: torch.dtype) -> Tensor:
    """The formula in torch's own operators, in the accumulator's dtype."""
    parts = []
    for images in batches:
        x = images.to(composed.accumulator_dtype(images.dtype))
        x = 2 * x - 1 if unit_range else x
        shift, scale = (t.to(x.dtype) for t in shift_and_scale())
        parts.append(((x - shift) / scale).to(dtype))
    return torch.cat(parts)


def biased_relu(y: Tensor, bias: Tensor) -> Tensor:
    return (y + bias.view(1, -1, 1, 1)).relu()


class TestTrunkOperators:
    @pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
    @pytest.mark.parametrize("result", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_scale_images(self, poisoned, generator, dtype, result, order):
        for shape in ((2, 3, 64, 64), (1, 3, 33, 47), (3, 3, 1, 5), (1, 3, 300, 1), (0, 3, 8, 8)):
            images = images_of(shape, dtype, order, generator)
            crop = images[:, :, shape[2] // 2 :, shape[3] // 3 :]
            for batches in ([images], [images, images.float(), images], [crop], [images.flip(1)]):
                for unit_range in (False, True):
                    got = torch.ops.lpips_fast.scale_images(
                        batches, *shift_and_scale(), unit_range, result
                    )
                    assert got.is_contiguous(memory_format=CHANNELS_LAST)
                    assert torch.equal(got, scaled(batches, unit_range, result))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels", [1, 3, 8, 33, 64, 192, 512])
    def test_bias_relu(self, generator, dtype, channels):
        bias = images_of((channels, 1, 1, 1), dtype, CHANNELS_FIRST, generator).flatten()
        for shape in ((2, channels, 13, 11), (1, channels, 1, 1), (0, channels, 3, 3)):
            y = images_of(shape, dtype, CHANNELS_LAST, generator)
            expected = biased_relu(y, bias)
            torch.ops.lpips_fast.bias_relu_(y, bias)
            assert torch.equal(y, expected)

    @pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_scale_images_flagged(self, generator, dtype, order):
        images = images_of((5, 3, 40, 48), dtype, order, generator)
        images[1, 2, -1, -1], images[3, 0, 0, 0] = torch.nan, torch.inf
        arguments = ([images[:2], images[2:]], *shift_and_scale(), True, torch.float32)
        batch, flags = torch.ops.lpips_fast.scale_images_flagged(*arguments)
        plain = torch.ops.lpips_fast.scale_images(*arguments)
        assert torch.equal(batch.nan_to_num(), plain.nan_to_num())
        assert flags.isnan().tolist() == [False, True, False, True, False]
        assert not flags.nan_to_num().any()

    def test_bias_relu_lets_nan_and_infinity_through(self, generator):
        y = images_of((1, 16, 5, 5), torch.float32, CHANNELS_LAST, generator)
        y[0, 3, 2, 2], y[0, 4, 1, 1] = torch.nan, torch.inf
        torch.ops.lpips_fast.bias_relu_(y, torch.zeros(16, device=DEVICE))
        assert bool(y[0, 3, 2, 2].isnan()) and bool(y[0, 4, 1, 1].isinf())

    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("window", [(3, 2, False), (3, 2, True), (2, 2, False), (4, 1, False)])
    def test_max_pool(self, poisoned, generator, window, dtype, ties):
        kernel, stride, ceil_mode = window
        for shape in ((2, 64, 31, 33), (1, 33, 12, 13), (3, 8, 5, 300), (0, 8, 9, 9)):
            x = images_of(shape, dtype, CHANNELS_LAST, generator)
            x = ((x * 2).round() if ties else x).requires_grad_()
            y = torch.ops.lpips_fast.max_pool2d(x, *window)
            assert y.is_contiguous(memory_format=CHANNELS_LAST)
            assert torch.equal(y, F.max_pool2d(x, kernel, stride, ceil_mode=ceil_mode))
            grad = images_of(y.shape, dtype, CHANNELS_LAST, generator)
            (got,) = torch.autograd.grad(y, x, grad, retain_graph=True)
            exact = x.detach().cpu().double().requires_grad_()
            pooled = F.max_pool2d(exact, kernel, stride, ceil_mode=ceil_mode)
            (expected,) = torch.autograd.grad(pooled, exact, grad.cpu().double())
            assert relative_error(got.cpu(), expected) <= 4 * torch.finfo(dtype).eps
            assert torch.equal(torch.autograd.grad(y, x, grad)[0], got)

    def test_agree_with_the_cpu_kernels(self, generator):
        images = images_of((2, 3, 41, 43), torch.float32, CHANNELS_FIRST, generator)
        arguments = ([images, images], *shift_and_scale())
        on_cpu = ([images.cpu()] * 2, *(t.cpu() for t in shift_and_scale()))
        rest = (True, torch.float32)
        assert torch.equal(
            torch.ops.lpips_fast.scale_images(*arguments, *rest).cpu(),
            torch.ops.lpips_fast.scale_images(*on_cpu, *rest),
        )
        x = images_of((2, 64, 31, 33), torch.float32, CHANNELS_LAST, generator).relu()
        y = torch.ops.lpips_fast.max_pool2d(x, 3, 2, True)
        assert torch.equal(y.cpu(), torch.ops.lpips_fast.max_pool2d(x.cpu(), 3, 2, True))
        grad = torch.randn_like(y)
        backward = torch.ops.lpips_fast.max_pool2d_backward
        expected = backward(grad.cpu(), x.cpu(), y.cpu(), 3, 2)
        assert torch.equal(backward(grad, x, y, 3, 2).cpu(), expected)

    def test_derivatives(self, generator):
        x = images_of((2, 3, 7, 8), torch.float64, CHANNELS_LAST, generator).requires_grad_()

        def pool(x: Tensor) -> Tensor:
            return torch.ops.lpips_fast.max_pool2d(x, 3, 2, True)

        def scale(x: Tensor) -> Tensor:
            return torch.ops.lpips_fast.scale_images(
                [x], *(t.double() for t in shift_and_scale()), True, torch.float64
            )

        for function in (pool, scale):
            assert torch.autograd.gradcheck(function, x)
            assert torch.autograd.gradgradcheck(function, x)

    def test_opcheck(self, generator):
        operators = torch.ops.lpips_fast
        x = images_of((2, 5, 9, 8), torch.float32, CHANNELS_LAST, generator).requires_grad_()
        torch.library.opcheck(operators.max_pool2d.default, (x, 3, 2, True))
        y = operators.max_pool2d(x, 3, 2, True).detach()
        grad = torch.randn_like(y)
        torch.library.opcheck(operators.max_pool2d_backward.default, (grad, x, y, 3, 2))
        images = [images_of((2, 3, 9, 8), torch.float32, o, generator) for o in ORDERS]
        images[0].requires_grad_()
        arguments = (images, *shift_and_scale(), True, torch.float32)
        torch.library.opcheck(operators.scale_images.default, arguments)
        bias = torch.randn(5, device=DEVICE)
        torch.library.opcheck(operators.bias_relu_.default, (x.detach().clone(), bias))

    def test_refusals_are_sentences(self, generator):
        y = images_of((2, 8, 5, 5), torch.float32, CHANNELS_FIRST, generator)
        with pytest.raises(RuntimeError, match="dense channels-last"):
            torch.ops.lpips_fast.bias_relu_(y, y[0, :, 0, 0])
        y = y.contiguous(memory_format=CHANNELS_LAST)
        with pytest.raises(RuntimeError, match="one per channel"):
            torch.ops.lpips_fast.bias_relu_(y, torch.zeros(7, device=DEVICE))
        with pytest.raises(RuntimeError, match="on one device"):
            shift, scale = shift_and_scale()
            arguments = ([y[:, :3]], shift.cpu(), scale, False, torch.float32)
            torch.ops.lpips_fast.scale_images(*arguments)
        with pytest.raises(RuntimeError, match="smaller than the pooling window"):
            torch.ops.lpips_fast.max_pool2d(y[:, :, :2], 3, 2, False)

    def test_current_stream(self, generator):
        """The inputs are filled late, on a stream of their own; the kernels must come after."""
        x = images_of((2, 64, 33, 31), torch.float32, CHANNELS_LAST, generator)
        bias = torch.randn(64, generator=generator, device=DEVICE)

        def run(x: Tensor) -> list[Tensor]:
            pooled = torch.ops.lpips_fast.max_pool2d(x, 3, 2, False)
            grad = torch.ops.lpips_fast.max_pool2d_backward(pooled, x, pooled, 3, 2)
            image = torch.ops.lpips_fast.scale_images(
                [x[:, :3]], *shift_and_scale(), False, torch.float16
            )
            clipped = x.clone()
            torch.ops.lpips_fast.bias_relu_(clipped, bias)
            return [pooled, grad, image, clipped]

        expected = run(x)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            results = run(late)
        stream.synchronize()
        for result, wanted in zip(results, expected):
            assert torch.equal(result, wanted)

    def test_second_device(self, generator):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU only")
        x = images_of((2, 16, 9, 9), torch.float32, CHANNELS_LAST, generator)
        there = x.to("cuda:1")
        with torch.cuda.device(0):
            pooled = torch.ops.lpips_fast.max_pool2d(there, 3, 2, False)
            assert pooled.device == there.device
            torch.ops.lpips_fast.bias_relu_(there, torch.zeros(16, device="cuda:1"))
            assert torch.cuda.current_device() == 0
        assert torch.equal(pooled.cpu(), F.max_pool2d(x, 3, 2).cpu())
        assert torch.equal(there.cpu(), x.relu().cpu())

    def test_more_than_2_31_elements(self):
        """The end of the images must be read and written right."""
        shape = (1, 64, 5800, 5800)
        needed = 5 * shape[1] * shape[2] * shape[3] + (2 << 30)
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, there are {free >> 30}")
        x = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=CHANNELS_LAST)
        x.normal_()
        y = torch.ops.lpips_fast.max_pool2d(x, 2, 2, False)
        grad_x = torch.ops.lpips_fast.max_pool2d_backward(y, x, y, 2, 2)
        for rows in (slice(0, 4), slice(5796, 5800)):
            leaf = x[:, :, rows].float().requires_grad_()
            expected = F.max_pool2d(leaf, 2)
            got = y[:, :, rows.start // 2 : rows.stop // 2].float()
            assert torch.equal(got, expected)
            (reference,) = torch.autograd.grad(expected, leaf, got)
            assert torch.equal(grad_x[:, :, rows].float(), reference)
        corner = x[:, :, -2:].clone()
        bias = torch.randn(64, device=DEVICE, dtype=torch.float16)
        torch.ops.lpips_fast.bias_relu_(x, bias)
        assert torch.equal(x[:, :, -2:], biased_relu(corner, bias))


@contextlib.contextmanager
def torchs_own_trunk() -> Iterator[None]:
    """As with LPIPS_FAST_CUDA_TRUNK=0 in the environment."""
    kernels.dispatch._CUDA_TRUNK, before = False, kernels.dispatch._CUDA_TRUNK
    try:
        yield
    finally:
        kernels.dispatch._CUDA_TRUNK = before


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


CONVOLUTIONS = [  # in, out, kernel, stride, padding
    (3, 64, 11, 4, 2),
    (3, 64, 3, 2, 0),
    (64, 192, 5, 1, 2),
    (64, 64, 3, 1, 1),
    (64, 16, 1, 1, 0),
    (33, 65, 3, 1, 1),
]


@pytest.mark.parametrize("fused", [True, False], ids=["as tried", "two passes"])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
class TestConvolution:
    @pytest.fixture(autouse=True)
    def way(self, fused, exact_convolutions) -> Iterator[None]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=not fused):
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_value_and_image_gradient(self, generator, shape, dtype, fused):
        """Also where memory that cuDNN may read holds NaN."""
        channels, out_channels, kernel, stride, padding = shape
        size = (out_channels, channels, kernel, kernel)
        weight = images_of(size, torch.float32, CHANNELS_LAST, generator) / channels**0.5 / kernel
        weight = weight.to(dtype)
        bias = images_of((out_channels, 1, 1, 1), dtype, CHANNELS_FIRST, generator).flatten()
        conv = Convolution(weight, bias, stride, padding, None)  # type: ignore[arg-type]
        x = images_of((2, channels, 37, 41), dtype, CHANNELS_LAST, generator)
        leaf = x.double().requires_grad_()
        exact = F.conv2d(leaf, weight.double(), bias.double(), stride, padding)
        bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        for keep_nan, _ in itertools.product((False, True), range(3)):
            torch.full_like(exact, torch.nan, dtype=dtype, memory_format=CHANNELS_LAST)
            y = cuda_convolution.convolve(conv, x, keep_nan)
            assert y.is_contiguous(memory_format=CHANNELS_LAST) and y.dtype == dtype
            assert relative_error(y, exact.relu()) < bound
        grad, add = torch.randn_like(y), torch.randn_like(x)
        (expected,) = torch.autograd.grad(exact, leaf, grad.double())
        got = cuda_convolution.input_gradient(conv, grad, x)
        assert relative_error(got, expected) < bound
        got = cuda_convolution.input_gradient(conv, grad, x, through_relu=True, add=add)
        assert relative_error(got, (expected + add) * (x > 0)) < bound

    def test_nan_comes_through_where_it_must(self, generator, shape, fused):
        channels, out_channels, kernel, stride, padding = shape
        size = (out_channels, channels, kernel, kernel)
        weight = images_of(size, torch.float32, CHANNELS_LAST, generator)
        bias = torch.zeros(out_channels, device=DEVICE)
        conv = Convolution(weight, bias, stride, padding, None)  # type: ignore[arg-type]
        x = images_of((1, channels, 37, 41), torch.float32, CHANNELS_LAST, generator)
        x[0, 1, 16, 20] = torch.nan
        assert bool(cuda_convolution.convolve(conv, x, keep_nan=True).isnan().any())


def test_ways_that_were_chosen():
    """Printed with ``-rP``: which layers were fused, and why."""
    print("\n".join(cuda_convolution.describe_choices()) or "no convolution was tried")


def trunk_model(net: str, **options) -> lpips_fast.LPIPS:
    model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)
    return model.to(DEVICE)


def value_and_gradient(model: lpips_fast.LPIPS, seed: int, **call) -> tuple[Tensor, Tensor]:
    in0, in1 = (x.to(DEVICE) for x in image_pair(2, 67, 83, torch.float32, seed))
    in0.requires_grad_()
    value = model(in0, in1, **call)
    # Scaled, so that float16 gradients stay above its smallest numbers.
    return value, torch.autograd.grad(1000 * value.sum(), in0)[0]


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
class TestWholeTrunk:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
    def test_as_by_torchs_own_operators(self, exact_convolutions, net, dtype, normalize):
        model = trunk_model(net, dtype=dtype)
        value, grad = value_and_gradient(model, 0, normalize=normalize)
        with torchs_own_trunk():
            expected, expected_grad = value_and_gradient(model, 0, normalize=normalize)
        bound, gradient_bound = {
            None: (1e-5, 2e-4),
            torch.float16: (1e-2, 0.1),
            torch.bfloat16: (5e-2, 0.5),
        }[dtype]
        assert relative_error(value, expected.double()) < bound
        assert relative_error(grad, expected_grad.double()) < gradient_bound
        with torch.no_grad():
            in0, in1 = (x.to(DEVICE) for x in image_pair(2, 67, 83, torch.float32, 0))
            again = model(in0, in1, normalize=normalize)
        assert relative_error(again, expected.double()) < bound

    def test_autocast(self, net):
        model = trunk_model(net)
        with torch.autocast("cuda", torch.float16):
            value, grad = value_and_gradient(model, 0)
            with torchs_own_trunk():
                expected, expected_grad = value_and_gradient(model, 0)
        assert value.dtype == expected.dtype == torch.float32
        assert grad.dtype == expected_grad.dtype
        assert relative_error(value, expected.double()) < 1e-2

    def test_learning_weights(self, exact_convolutions, net):
        model = trunk_model(net, pnet_tune=True)
        in0, in1 = (x.to(DEVICE) for x in image_pair(1, 67, 83, torch.float32, 0))
        weights = [p for p in model.net.parameters() if p.requires_grad]
        got = torch.autograd.grad(model(in0, in1).sum(), weights)
        with torchs_own_trunk():
            expected = torch.autograd.grad(model(in0, in1).sum(), weights)
        assert all(relative_error(g, e.double()) < 1e-3 for g, e in zip(got, expected))

    def test_deterministic_algorithms(self, net):
        model = trunk_model(net)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (value_and_gradient(model, 0) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(before)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])

    def test_nan_in_an_image_reaches_the_distance(self, net):
        model = trunk_model(net)
        in0, in1 = (x.to(DEVICE) for x in image_pair(2, 67, 83, torch.float32, 0))
        in0[1, 1, 30, 30] = torch.nan
        with torch.no_grad():
            value = model(in0, in1).flatten()
        assert bool(value[0].isfinite()) and bool(value[1].isnan())

    def test_no_host_synchronisation(self, net, forbid_synchronisation):
        model = trunk_model(net)
        in0, in1 = (x.to(DEVICE) for x in image_pair(2, 67, 83, torch.float32, 0))
        in0.requires_grad_()
        model(in0, in1).sum().backward()  # finds engines, loads modules
        with forbid_synchronisation:
            model(in0, in1).sum().backward()
        assert in0.grad is not None and bool(in0.grad.isfinite().all())

    def test_graph_capture(self, exact_convolutions, net):
        """Capture once, replay with other images in the same memory."""
        model = trunk_model(net)
        pairs = [
            [x.to(DEVICE) for x in image_pair(1, 67, 83, torch.float32, seed)] for seed in (0, 1)
        ]
        in0, in1 = (x.clone() for x in pairs[0])
        in0.requires_grad_()

        def step() -> tuple[Tensor, Tensor]:
            value = model(in0, in1)
            return value, torch.autograd.grad(value.sum(), in0)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for pair in reversed(pairs):
            with torch.no_grad():
                in0.copy_(pair[0])
                in1.copy_(pair[1])
            graph.replay()
            for got, expected in zip(captured, step()):
                assert relative_error(got, expected.double()) < 1e-4


def test_max_pool_keeps_no_indices(generator):
    x = images_of((4, 64, 64, 64), torch.float32, CHANNELS_LAST, generator).requires_grad_()
    torch.ops.lpips_fast.max_pool2d(x, 2, 2, False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = torch.ops.lpips_fast.max_pool2d(x, 2, 2, False)
    assert torch.cuda.memory_allocated() - before < 1.1 * y.numel() * y.element_size()


def test_launches_of_scaling_and_of_two_passes(generator):
    images = [images_of((2, 3, 64, 64), torch.float32, CHANNELS_FIRST, generator)] * 2
    shift, scale = shift_and_scale()
    scaling = kernels_of(
        lambda: torch.ops.lpips_fast.scale_images(images, shift, scale, True, torch.float16)
    )
    if not scaling:
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(scaling) == 2, scaling  # one a batch
    y = images_of((2, 64, 16, 16), torch.float32, CHANNELS_LAST, generator)
    bias = torch.zeros(64, device=DEVICE)
    assert len(kernels_of(lambda: torch.ops.lpips_fast.bias_relu_(y, bias))) == 1
