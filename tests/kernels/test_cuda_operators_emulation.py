"""Torch's side of the CUDA operators on the CPU: csrc/cuda/*.cu, compiled by g++.

Checks, layouts, copies, workspaces, guards, streams and launches of the operators that a CUDA torch
would call, here on CPU tensors with the device played (tests/emulation/played_torch.h), against the
operators of the CPU. Only that nvcc compiles the same files, and that a device runs them, is left
to scripts/check_cuda_compile.py and to tests/kernels/test_cuda.py.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from cuda_emulation import CHANNELS_FIRST, CHANNELS_LAST, DTYPES, emulation_library, fresh_seed
from torch import Tensor

import lpips_fast  # noqa: F401  (loads the CPU's operators)
from lpips_fast import composed

ORDERS = [CHANNELS_LAST, CHANNELS_FIRST]
EPS = 1e-10
# Two orders of adding up the same products.
ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Calls(NamedTuple):
    """What the operators asked of the device since it was counted last."""

    launches: int
    guards: int
    guards_held: int
    streams: int
    unguarded_launches: int


class Played:
    """A library of operators on the played device."""

    def __init__(self, name: str) -> None:
        library = emulation_library(f"run_{name}")
        torch.ops.load_library(str(library))
        self.operators = getattr(torch.ops, f"lpips_fast_emulated_{name}")
        self.library = ctypes.CDLL(str(library))

    def play(self, multiprocessors: int = 4, order: int = 0, error: int = 0) -> None:
        self.library.play(multiprocessors, order, error)

    def calls(self) -> Calls:
        counts = (ctypes.c_int * len(Calls._fields))()
        self.library.count_calls(counts)
        return Calls(*counts)


@pytest.fixture(scope="module")
def of_distance() -> Played:
    return Played("distance")


@pytest.fixture(scope="module")
def of_trunk() -> Played:
    return Played("trunk")


@pytest.fixture
def distance(of_distance, poisoned) -> Played:
    of_distance.play()
    of_distance.calls()
    return of_distance


@pytest.fixture
def trunk(of_trunk, poisoned) -> Played:
    of_trunk.play()
    of_trunk.calls()
    return of_trunk


def check_device(calls: Calls, launches: int | None = None) -> None:
    """Every launch under a guard that is given back, on the stream that torch has."""
    assert calls.guards >= 1 and calls.guards_held == 0 and calls.unguarded_launches == 0
    assert calls.streams >= 1
    if launches is not None:
        assert calls.launches == launches


def assert_same(ours: Any, cpus: Any) -> None:
    """Values within rounding, and the same shapes, strides and dtypes."""
    ours, cpus = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, cpus))
    assert len(ours) == len(cpus)
    for x, y in zip(ours, cpus):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert torch.equal(x.isfinite(), y.isfinite())
        if x.numel():
            x, y = (t.double().nan_to_num(0, 0, 0) for t in (x, y))
            assert (x - y).norm() <= ERROR[cpus[0].dtype] * y.norm() + 1e-30


def features(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator).relu_()
    x *= torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.9  # some vectors are zero
    return x.to(dtype)


def layers(
    dtype: torch.dtype, generator: torch.Generator, order, shapes: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    a, b = (
        [features(s, dtype, generator).contiguous(memory_format=order) for s in shapes]
        for _ in range(2)
    )
    accumulator = composed.accumulator_dtype(dtype)
    return a, b, [torch.rand(s[1], generator=generator).to(accumulator) for s in shapes]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


SHAPES = [(2, 64, 6, 5), (2, 33, 4, 7), (2, 520, 2, 2)]


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestDistance:
    def test_forward(self, distance, generator, dtype, order):
        arguments = (*layers(dtype, generator, order, SHAPES), EPS)
        for name in ("distance", "distance_map"):
            ours = getattr(distance.operators, name)(*arguments)
            check_device(distance.calls())
            assert_same(ours, getattr(torch.ops.lpips_fast, name)(*arguments))

    def test_masked(self, distance, generator, dtype, order):
        a, b, w = layers(dtype, generator, order, SHAPES)
        of_positions = [
            torch.rand(n, 1, *f.shape[2:], generator=generator).to(w[0].dtype)
            for n, f in zip((2, 1, 2), a)
        ]
        of_positions[2] = of_positions[2].mT.contiguous().mT  # copied
        arguments = (a, b, w, of_positions, EPS)
        ours = distance.operators.masked_distance(*arguments)
        check_device(distance.calls())
        assert_same(ours, torch.ops.lpips_fast.masked_distance(*arguments))
        ones = [torch.ones_like(p).contiguous() for p in of_positions]
        plain = distance.operators.distance(a, b, w, EPS)
        assert torch.equal(distance.operators.masked_distance(a, b, w, ones, EPS), plain)
        # The gradient of its mean is that of the map, to the bit where all weights are 1.
        grad = torch.rand(2, 3, generator=generator).to(w[0].dtype)
        expected = distance.operators.distance_backward(grad, a, b, w, EPS, True, True, True)
        share = [grad[:, k] * (1.0 / (f.shape[2] * f.shape[3])) for k, f in enumerate(a)]
        grads = [s.view(-1, 1, 1, 1) * p for s, p in zip(share, ones)]
        actual = distance.operators.distance_map_backward(grads, a, b, w, EPS, True, True, True)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))

    def test_backward(self, distance, generator, dtype, order):
        a, b, w = layers(dtype, generator, order, SHAPES)
        grad = torch.randn(2, len(a), generator=generator).to(w[0].dtype)
        grads = [torch.randn(2, 1, *f.shape[2:], generator=generator).to(w[0].dtype) for f in a]
        for needs in itertools.product((False, True), repeat=3):
            for name, upstream in (
                ("distance_backward", grad),
                ("distance_backward", grad.t().contiguous().t()),
                ("distance_map_backward", grads),
                ("distance_map_backward", [g.transpose(2, 3).contiguous().mT for g in grads]),
            ):
                arguments = (upstream, a, b, w, EPS, *needs)
                ours = getattr(distance.operators, name)(*arguments)
                cpus = getattr(torch.ops.lpips_fast, name)(*arguments)
                calls = distance.calls()
                if any(needs):
                    check_device(calls)
                else:
                    assert calls.launches == 0
                # Each by itself: a weight's gradient has other rounding than the features'.
                for x, y in zip(ours, cpus, strict=True):
                    assert_same(x, y)

    def test_views_are_read_where_they_lie_or_copied(self, distance, generator, dtype, order):
        a, b, w = layers(dtype, generator, order, [(4, 24, 9, 10)])
        for view in (
            lambda x: x[1::2],
            lambda x: x[:, :, 1:8, 2:7],
            lambda x: x.transpose(2, 3),
            lambda x: x[..., ::2],
            lambda x: x[:1].expand(4, -1, -1, -1),
            lambda x: x.flip(1),
        ):
            for feats0, feats1 in ((view(a[0]), view(b[0])), (view(a[0]), view(b[0]).clone())):
                arguments = ([feats0], [feats1], w, EPS)
                assert_same(
                    distance.operators.distance(*arguments),
                    torch.ops.lpips_fast.distance(*arguments),
                )
                grad = torch.ones(len(feats0), 1, dtype=w[0].dtype)
                arguments = (grad, *arguments, True, True, False)
                for x, y in zip(
                    distance.operators.distance_backward(*arguments),
                    torch.ops.lpips_fast.distance_backward(*arguments),
                    strict=True,
                ):
                    assert_same(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tap_backward(distance, generator, dtype):
    (tap,), (target,), (weight,) = layers(dtype, generator, CHANNELS_LAST, [(2, 40, 5, 6)])
    deeper = torch.randn(tap.shape, generator=generator).to(dtype)
    for grad in (
        torch.randn(2, 1, generator=generator),
        torch.randn(2, 1, 5, 6, generator=generator),
        torch.randn(2, 1, 6, 5, generator=generator).mT,
    ):
        grad = grad.to(weight.dtype)
        for more in (None, deeper, deeper.contiguous(memory_format=CHANNELS_LAST)):
            for need_weight in (False, True):
                arguments = (grad, more, tap, target, weight, EPS, need_weight)
                ours = distance.operators.tap_backward(*arguments)
                check_device(distance.calls(), launches=1 + need_weight)
                cpus = torch.ops.lpips_fast.tap_backward(*arguments)
                for x, y in zip(ours, cpus, strict=True):
                    assert_same(x, y)


def test_launches_of_a_whole_distance(distance, generator):
    """One launch, and one more where images are cut into several blocks or weights learn."""
    distance.play(multiprocessors=132)
    shapes = [(1, c, s, s) for c, s in ((64, 15), (192, 7), (384, 3), (256, 3), (256, 3))]
    a, b, w = layers(torch.float32, generator, CHANNELS_LAST, shapes)
    distance.operators.distance(a, b, w, EPS)
    check_device(distance.calls(), launches=1)
    large = layers(torch.float32, generator, CHANNELS_LAST, [(2, 64, 48, 48)])
    distance.operators.distance(*large, EPS)
    check_device(distance.calls(), launches=2)
    grad = torch.ones(1, len(a))
    for need_weights, launches in ((False, 1), (True, 2)):
        distance.operators.distance_backward(grad, a, b, w, EPS, True, True, need_weights)
        check_device(distance.calls(), launches)


def test_any_order_of_threads(distance, generator):
    a, b, w = layers(torch.float32, generator, CHANNELS_LAST, SHAPES)
    results = []
    for order in range(3):
        distance.play(order=order)
        results.append(distance.operators.distance(a, b, w, EPS))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 0, 4, 4)], ids=str)
def test_empty(distance, trunk, generator, shape):
    a, b, w = layers(torch.float32, generator, CHANNELS_LAST, [shape, (shape[0], 8, 3, 3)])
    assert_same(
        distance.operators.distance(a, b, w, EPS), torch.ops.lpips_fast.distance(a, b, w, EPS)
    )
    grad = torch.ones(shape[0], 2)
    arguments = (grad, a, b, w, EPS, True, True, True)
    for x, y in zip(
        distance.operators.distance_backward(*arguments),
        torch.ops.lpips_fast.distance_backward(*arguments),
        strict=True,
    ):
        assert_same(x, y)
    y = a[0].clone(memory_format=CHANNELS_LAST)
    trunk.operators.bias_relu_(y, torch.zeros(shape[1]))
    assert y.shape == shape and distance.calls().unguarded_launches == 0


class TestRefusals:
    """As the CPU's operators, in the same words."""

    def refusal(self, operators, name: str, *arguments: Any) -> str:
        with pytest.raises(RuntimeError) as caught:
            getattr(operators, name)(*arguments)
        # Without the place in the source that torch puts in front.
        return re.sub(r"^\w+, \S+:\d+, ", "", str(caught.value).split("\n")[0])

    def test_in_the_same_words(self, distance, generator):
        a, b, w = layers(torch.float32, generator, CHANNELS_LAST, [(2, 8, 4, 4)])
        grad, needs = torch.ones(2, 1), (True, True, True)
        for name, arguments in (
            ("distance", (a, [b[0][:1]], w, EPS)),
            ("distance", (a, b, [w[0].double()], EPS)),
            ("distance_map", (a, [b[0].half()], w, EPS)),
            ("distance_backward", (grad.double(), a, b, w, EPS, *needs)),
            ("distance_map_backward", ([grad], a, b, w, EPS, *needs)),
            ("tap_backward", (grad, a[0][:1], a[0], b[0], w[0], EPS, False)),
            ("tap_backward", (grad, None, a[0].contiguous(), b[0], w[0], EPS, False)),
        ):
            ours = self.refusal(distance.operators, name, *arguments)
            assert ours == self.refusal(torch.ops.lpips_fast, name, *arguments), name
        assert distance.calls().launches == 0

    def test_an_error_of_the_device_is_told(self, distance, trunk, generator):
        a, b, w = layers(torch.float32, generator, CHANNELS_LAST, [(2, 8, 4, 4)])
        distance.play(error=209)
        assert "a played error" in self.refusal(distance.operators, "distance", a, b, w, EPS)
        assert distance.calls().guards_held == 0
        trunk.play(error=209)
        assert "a played error" in self.refusal(trunk.operators, "max_pool2d", a[0], 2, 2, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestTrunk:
    @pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
    def test_max_pool(self, trunk, generator, dtype, order):
        for shape, window in (
            ((2, 16, 9, 8), (3, 2, True)),
            ((1, 7, 8, 8), (2, 2, False)),
            ((2, 8, 7, 7), (4, 1, False)),
        ):
            x = features(shape, dtype, generator).contiguous(memory_format=order)
            y = trunk.operators.max_pool2d(x, *window)
            check_device(trunk.calls(), launches=1)
            assert_same(y, torch.ops.lpips_fast.max_pool2d(x, *window))
            grad = torch.randn(y.shape, generator=generator).to(dtype)
            arguments = (grad.contiguous(memory_format=order), x, y, *window[:2])
            ours = trunk.operators.max_pool2d_backward(*arguments)
            check_device(trunk.calls(), launches=1)
            assert_same(ours, torch.ops.lpips_fast.max_pool2d_backward(*arguments))

    def test_scale_images(self, trunk, generator, dtype):
        shift, scale = torch.randn(3, generator=generator), 0.5 + torch.rand(3, generator=generator)
        first = torch.rand(2, 3, 6, 8, generator=generator).to(dtype)
        for images in (
            [first],
            [first.contiguous(memory_format=CHANNELS_LAST), first.float(), first],
            [first[:, :, 1:, ::2], first[:1, :, 1:, ::2]],
            [first[:, :1].expand(-1, 3, -1, -1)],
        ):
            for unit_range, result in itertools.product((False, True), DTYPES):
                arguments = (images, shift.view(1, 3, 1, 1), scale, unit_range, result)
                ours = trunk.operators.scale_images(*arguments)
                check_device(trunk.calls(), launches=len(images))
                cpus = torch.ops.lpips_fast.scale_images(*arguments)
                assert torch.equal(ours, cpus) and ours.stride() == cpus.stride()

    def test_scale_images_flagged(self, trunk, generator, dtype):
        shift, scale = torch.randn(3, generator=generator), 0.5 + torch.rand(3, generator=generator)
        images = [torch.rand(n, 3, 6, 8, generator=generator).to(dtype) for n in (2, 1, 3)]
        images[0][1, 0, 0, 0], images[2][2, 1, 5, 7] = torch.nan, torch.inf
        arguments = (images, shift, scale, True, torch.float32)
        batch, flags = trunk.operators.scale_images_flagged(*arguments)
        check_device(trunk.calls(), launches=1 + len(images))  # and one that clears the flags
        cpus = torch.ops.lpips_fast.scale_images(*arguments)
        assert torch.equal(batch.nan_to_num(), cpus.nan_to_num())
        assert batch.stride() == cpus.stride()
        assert flags.isnan().tolist() == [False, True, False, False, False, True]
        assert not flags.nan_to_num().any()

    def test_bias_relu(self, trunk, generator, dtype):
        for channels in (16, 7):
            y = torch.randn(2, channels, 5, 6, generator=generator).to(dtype)
            y = y.contiguous(memory_format=CHANNELS_LAST)
            bias = torch.randn(2 * channels, generator=generator).to(dtype)[::2]
            expected = (y + bias.view(1, -1, 1, 1)).relu()
            trunk.operators.bias_relu_(y, bias)
            check_device(trunk.calls(), launches=1)
            assert torch.equal(y, expected)


def test_bias_relu_refuses_other_memory(trunk):
    y = torch.zeros(2, 8, 5, 5)
    with pytest.raises(RuntimeError, match="dense channels-last"):
        trunk.operators.bias_relu_(y, torch.zeros(8))
    with pytest.raises(RuntimeError, match="one per channel"):
        trunk.operators.bias_relu_(y.contiguous(memory_format=CHANNELS_LAST), torch.zeros(7))
