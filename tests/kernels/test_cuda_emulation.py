"""The CUDA kernels on the CPU: csrc/cuda, unmodified, through tests/emulation.

What passes here is proven of the kernels' indexing, tails, reductions, formulas and launch plan,
for every dtype and order, against the composed formula in float64. What a GPU alone can show
(races, the memory model, speed) is not: tests/kernels/test_cuda.py is for that.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cuda_emulation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    DTYPES,
    STRIDED,
    THREAD_ORDERS,
    EmulatedLibrary,
    emulation_library,
    fresh_seed,
    strided,
)
from distance_rounding import (
    assert_within_rounding,
    distance_bound,
    gradient_scale,
    maps,
    relative_error,
)
from torch import Tensor

from lpips_fast import composed

ORDERS = [CHANNELS_LAST, CHANNELS_FIRST]
WIDTHS = [1, 2, 3, 5, 8, 31, 32, 33, 64, 100, 192, 256, 384, 512, 1000, 2048]
AVERAGE, MAP, BACKWARD, TAP_BACKWARD = 0, 1, 2, 3
EPS = 1e-10

# Half features are exact in float64, so distances err by float32 sums alone; gradients are rounded
# to their own dtype.
DISTANCE_ERROR = {torch.float64: 1e-13}
GRADIENT_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


# ------------------------------------------------------------------- the C interface's structures


class FeatureView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class LayerView(ctypes.Structure):
    _fields_ = [
        ("shape", ctypes.c_int64 * 4),
        ("order", ctypes.c_int32),
        ("feat0", FeatureView),
        ("feat1", FeatureView),
        ("weight", ctypes.c_void_p),
    ]


class UpstreamView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class PositionWeightView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride_n", ctypes.c_int64)]


class LayerWork(ctypes.Structure):
    _fields_ = [
        ("layer", LayerView),
        ("map", ctypes.c_void_p),
        ("upstream", UpstreamView),
        ("upstream_scale", ctypes.c_double),
        ("grad0", FeatureView),
        ("grad1", FeatureView),
        ("grad_weight", ctypes.c_void_p),
        ("deeper", FeatureView),
        ("position_weight", PositionWeightView),
    ]


def view(tensor: Tensor, order: int) -> FeatureView:
    """view_of of csrc/lpips_distance.h: the stride of the dense dimension is 1, also at size 1."""
    n, c, h, w = tensor.stride()
    return FeatureView(tensor.data_ptr(), (n, 1, h, w) if order == 0 else (n, c, h, 1))


class Emulator(EmulatedLibrary):
    """The distance's operators on CPU tensors, run by the CUDA kernels."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self.library.size_of_layer_work.restype = ctypes.c_int64
        assert self.library.size_of_layer_work() == ctypes.sizeof(LayerWork)
        self.multiprocessors = 4
        self.launches = 0

    @staticmethod
    def works(feats0, feats1, weights) -> list[LayerWork]:
        works = []
        for a, b, w in zip(feats0, feats1, weights):
            work = LayerWork(upstream_scale=1.0)
            order = 0 if a.stride(1) == 1 else 1  # the rule of csrc/lpips_distance.h
            work.layer = LayerView(
                tuple(a.shape), order, view(a, order), view(b, order), w.data_ptr()
            )
            works.append(work)
        return works

    def run(self, operation: int, dtype: torch.dtype, works, eps: float, out: Tensor | None):
        self.launches = self.library.run_distance(
            str(dtype).removeprefix("torch.").encode(),
            operation,
            (LayerWork * len(works))(*works),
            len(works),
            ctypes.c_double(eps),
            self.multiprocessors,
            self.thread_order,
            ctypes.c_void_p(None if out is None else out.data_ptr()),
        )
        if self.launches < 0:
            raise ValueError(self.library.last_error().decode())

    def distance(self, feats0, feats1, weights, eps=EPS, position_weights=()) -> Tensor:
        out = self.empty((feats0[0].shape[0], len(feats0)), weights[0].dtype)
        works = self.works(feats0, feats1, weights)
        for work, p in zip(works, position_weights):
            stride = 0 if len(p) == 1 else p[0].numel()
            work.position_weight = PositionWeightView(p.data_ptr(), stride)
        self.run(AVERAGE, feats0[0].dtype, works, eps, out)
        return out

    def distance_map(self, feats0, feats1, weights, eps=EPS) -> list[Tensor]:
        works = self.works(feats0, feats1, weights)
        maps = [self.empty((len(f), 1, *f.shape[2:]), weights[0].dtype) for f in feats0]
        for work, out in zip(works, maps):
            work.map = out.data_ptr()
        self.run(MAP, feats0[0].dtype, works, eps, None)
        return maps

    def backward(
        self, grad, feats0, feats1, weights, eps=EPS, need0=True, need1=True, need_weights=True
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """distance_backward for a tensor (N, L), distance_map_backward for a list of maps."""
        works = self.works(feats0, feats1, weights)
        grads0, grads1, grads_weight = [], [], []
        for layer, (work, f, w) in enumerate(zip(works, feats0, weights)):
            if isinstance(grad, Tensor):
                column = grad[:, layer]
                work.upstream = UpstreamView(column.data_ptr(), (column.stride(0), 0, 0))
                work.upstream_scale = 1 / max(f.shape[2] * f.shape[3], 1)
            else:
                strides = (grad[layer].stride(0), grad[layer].stride(2), grad[layer].stride(3))
                work.upstream = UpstreamView(grad[layer].data_ptr(), strides)
            order = CHANNELS_LAST if f.stride(1) == 1 else CHANNELS_FIRST
            if need0:
                grads0.append(self.empty(f.shape, f.dtype, order))
                work.grad0 = FeatureView(grads0[-1].data_ptr(), grads0[-1].stride())
            if need1:
                grads1.append(self.empty(f.shape, f.dtype, order))
                work.grad1 = FeatureView(grads1[-1].data_ptr(), grads1[-1].stride())
            if need_weights:
                grads_weight.append(self.empty(w.shape, w.dtype))
                work.grad_weight = grads_weight[-1].data_ptr()
        self.run(BACKWARD, feats0[0].dtype, works, eps, None)
        return grads0, grads1, grads_weight

    def tap_backward(
        self, grad: Tensor, deeper: Tensor | None, tap, target, weight, need_weight=False
    ) -> tuple[Tensor, Tensor | None]:
        """tap_backward: the gradient before the ReLU, and the weight's."""
        (work,) = self.works([tap], [target], [weight])
        if grad.dim() == 4:
            strides = (grad.stride(0), grad.stride(2), grad.stride(3))
            work.upstream = UpstreamView(grad.data_ptr(), strides)
        else:
            work.upstream = UpstreamView(grad.data_ptr(), (grad.stride(0), 0, 0))
            work.upstream_scale = 1 / max(tap.shape[2] * tap.shape[3], 1)
        if deeper is not None:
            work.deeper = view(deeper, 0)
        result = self.empty(tap.shape, tap.dtype, CHANNELS_LAST)
        work.grad0 = FeatureView(result.data_ptr(), result.stride())
        grad_weight = self.empty(weight.shape, weight.dtype) if need_weight else None
        if grad_weight is not None:
            work.grad_weight = grad_weight.data_ptr()
        self.run(TAP_BACKWARD, tap.dtype, [work], EPS, None)
        return result, grad_weight

    def plan(self, operation: int, work: LayerWork, element_size: int) -> dict[str, int]:
        names = "vectors blocks threads lanes team_warps slabs tiles tile_positions workspace"
        facts = (ctypes.c_int64 * 9)()
        if self.library.plan_of_layer(
            element_size, operation, ctypes.byref(work), self.multiprocessors, facts
        ):
            raise ValueError(self.library.last_error().decode())
        return dict(zip(names.split(), facts))


@pytest.fixture(scope="session")
def library() -> Emulator:
    return Emulator(emulation_library("run_distance"))


@pytest.fixture
def emulator(library: Emulator) -> Iterator[Emulator]:
    library.multiprocessors, library.thread_order = 4, 0
    yield library
    library.release()
    assert not library.races()


# ---------------------------------------------------------------------------- inputs, reference


def make_features(shape, dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features like a ReLU's, with zero vectors and positions where both images agree; a weight."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator).relu_()
    b = (a + 0.5 * torch.randn(shape, generator=generator)).relu_()
    n, _, h, w = shape
    kind = torch.randint(0, 12, (n, 1, h, w), generator=generator)
    both = torch.rand(kind.shape, generator=generator) < 0.5
    a = torch.where(kind == 0, 0, a)
    b = torch.where((kind == 1) | ((kind == 0) & both), 0, b)
    b = torch.where(kind == 2, a, b)
    weight = torch.randn(shape[1], generator=generator).to(composed.accumulator_dtype(dtype))
    return a.to(dtype), b.to(dtype), weight


def reference_gradients(formula, grads, feats0, feats1, weights):
    leaves = [
        [t.detach().double().requires_grad_() for t in group] for group in (feats0, feats1, weights)
    ]
    outputs = formula(*leaves)
    return [torch.autograd.grad(outputs, group, grads, retain_graph=True) for group in leaves]


def averaged(feats0, feats1, weights) -> Tensor:
    return composed.distance(feats0, feats1, weights)


def check_all(emulator: Emulator, feats0, feats1, weights, seed: int) -> None:
    """Averages, maps, and the backward of both, against float64."""
    dtype = feats0[0].dtype
    error = DISTANCE_ERROR.get(dtype, 2e-6)
    exact = [[t.double() for t in group] for group in (feats0, feats1, weights)]

    distances = emulator.distance(feats0, feats1, weights)
    expected = averaged(*exact)
    magnitude = averaged(exact[0], exact[1], [w.abs() for w in exact[2]])
    assert bool(((distances - expected).abs() <= distance_bound(magnitude, error)).all())

    generator = torch.Generator().manual_seed(seed + 1)
    of_positions = []
    for k, f in enumerate(feats0):
        drawn = torch.rand((len(f) if k % 2 else 1, 1, *f.shape[2:]), generator=generator)
        drawn = torch.where(drawn < 0.3, 0, 3 * drawn).to(weights[0].dtype)
        of_positions.append(emulator.copy(drawn, in_front=bool(k % 3)))
    masked = emulator.distance(feats0, feats1, weights, position_weights=of_positions)
    exactly = [p.double() for p in of_positions]
    expected = composed.distance(*exact, position_weights=exactly)
    magnitude = composed.distance(
        exact[0], exact[1], [w.abs() for w in exact[2]], position_weights=exactly
    )
    assert bool(((masked - expected).abs() <= 3 * distance_bound(magnitude, error)).all())
    ones = [emulator.copy(torch.ones_like(p)) for p in of_positions]
    assert torch.equal(emulator.distance(feats0, feats1, weights, position_weights=ones), distances)

    results = emulator.distance_map(feats0, feats1, weights)
    magnitudes = maps(exact[0], exact[1], [w.abs() for w in exact[2]])
    for result, reference, magnitude in zip(results, maps(*exact), magnitudes):
        assert bool(((result - reference).abs() <= distance_bound(magnitude, error)).all())

    generator = torch.Generator().manual_seed(seed)
    accumulator = composed.accumulator_dtype(dtype)
    grad = torch.randn(distances.shape, generator=generator).to(accumulator)
    grads = [torch.randn(r.shape, generator=generator).to(accumulator) for r in results]
    for formula, upstream in ((averaged, grad), (maps, grads)):
        actual = emulator.backward(upstream, feats0, feats1, weights)
        expected_grads = reference_gradients(
            formula,
            upstream.double() if isinstance(upstream, Tensor) else [g.double() for g in upstream],
            feats0,
            feats1,
            weights,
        )
        for side, (feats, others) in enumerate([(exact[0], exact[1]), (exact[1], exact[0])]):
            for layer, (feat, other, w) in enumerate(zip(feats, others, exact[2])):
                x, y = actual[side][layer], expected_grads[side][layer]
                limit = 65504 if dtype == torch.float16 else float("inf")
                zero = (feat.norm(dim=1, keepdim=True) == 0).expand_as(x)
                rest = ~zero & (y.abs() < limit)
                assert bool(x[zero].isfinite().all())
                bound = max(GRADIENT_ERROR[dtype], 1e-5)
                assert relative_error(x[zero], y.clamp(-limit, limit)[zero]) < bound
                g = upstream[layer] if formula is maps else upstream[:, layer].view(-1, 1, 1, 1)
                pixels = 1 if formula is maps else max(feat.shape[2] * feat.shape[3], 1)
                scale = gradient_scale(g.double() / pixels, feat, other, w)
                # Below float16's normal numbers an error is a step of 2^-24, whatever the value.
                step = 2**-24 * x.numel() ** 0.5 if dtype == torch.float16 else 0
                error_norm = float((x[rest].double() - y[rest]).norm())
                assert error_norm <= GRADIENT_ERROR[dtype] * float(scale[rest].norm()) + step
        for x, y in zip(actual[2], expected_grads[2]):
            assert relative_error(x, y) < max(error, 1e-12) * 10


# ------------------------------------------------------------------- widths, shapes and strides


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", WIDTHS)
def test_every_width(emulator, dtype, order, channels):
    seed = fresh_seed()
    shape = (2, channels, *((5, 7) if channels <= 256 else (3, 3)))
    a, b, weight = make_features(shape, dtype, seed)
    a, b = emulator.copy(a, order), emulator.copy(b, order, in_front=True)
    check_all(emulator, [a], [b], [emulator.copy(weight)], seed)


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 1, 1), (3, 8, 1, 40), (3, 8, 40, 1), (1, 8, 33, 31), (2, 32, 16, 16), (7, 4, 2, 2)],
    ids=str,
)
def test_every_shape(emulator, dtype, order, shape):
    seed = fresh_seed()
    emulator.multiprocessors = 1  # few blocks, so that each walks through several rounds
    a, b, weight = make_features(shape, dtype, seed)
    a, b = emulator.copy(a, order), emulator.copy(b, order)
    check_all(emulator, [a], [b], [weight], seed)


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", STRIDED)
def test_strided_features(emulator, dtype, order, kind):
    seed = fresh_seed()
    for shape in [(2, 16, 5, 8), (2, 64, 8, 24)]:
        a, b, weight = make_features(shape, dtype, seed)
        skewed = strided(emulator, a, order, kind)
        plain = emulator.copy(b, order)
        check_all(emulator, [skewed], [plain], [weight], seed)
        check_all(emulator, [plain], [skewed], [weight], seed)


def test_misaligned_weight(emulator):
    seed = fresh_seed()
    a, b, weight = make_features((1, 64, 4, 4), torch.float16, seed)
    skewed = emulator.empty((65,), torch.float32)[1:].copy_(weight)
    check_all(
        emulator,
        [emulator.copy(a, CHANNELS_LAST)],
        [emulator.copy(b, CHANNELS_LAST)],
        [skewed],
        seed,
    )


def test_expanded_features_and_gradients(emulator):
    """Strides of 0: one target for a batch, the gradient of a sum."""
    seed = fresh_seed()
    a, b, weight = make_features((3, 24, 4, 5), torch.float32, seed)
    target = b[:1].contiguous(memory_format=CHANNELS_LAST).expand(3, -1, -1, -1)
    a = a.contiguous(memory_format=CHANNELS_LAST)
    check_all(emulator, [a], [target], [weight], seed)
    one = torch.ones(1, 1).expand(3, 1)
    grads = emulator.backward(one, [a], [target], [weight])
    same = emulator.backward(one.contiguous(), [a], [target], [weight])
    assert torch.equal(grads[0][0], same[0][0]) and torch.equal(grads[2][0], same[2][0])
    ones = [torch.ones(1, 1, 1, 1).expand(3, 1, 4, 5)]
    from_map = emulator.backward(ones, [a], [target], [weight])
    from_dense = emulator.backward([ones[0].contiguous()], [a], [target], [weight])
    assert torch.equal(from_map[0][0], from_dense[0][0])


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
def test_map_gradient_of_any_strides(emulator, order):
    seed = fresh_seed()
    a, b, weight = make_features((2, 32, 6, 8), torch.float32, seed)
    a, b = emulator.copy(a, order), emulator.copy(b, order)
    dense = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(seed))
    strided_grad = torch.full((2, 1, 8, 6), float("nan")).transpose(2, 3).copy_(dense)
    expected = emulator.backward([dense], [a], [b], [weight])
    actual = emulator.backward([strided_grad], [a], [b], [weight])
    for x, y in zip(itertools.chain(*actual), itertools.chain(*expected)):
        # Rows that do not adjoin are cut differently: sums over positions come in another order.
        assert relative_error(x, y.double()) < 1e-6


def test_random_calls(emulator):
    """Several layers of any shape, order and strides in one call."""
    seed = fresh_seed()
    choose = random.Random(seed)
    for _ in range(25):
        dtype = choose.choice(DTYPES)
        emulator.multiprocessors = choose.choice([1, 4, 132])
        emulator.thread_order = choose.choice(THREAD_ORDERS)
        n = choose.randint(1, 3)
        layers: tuple[list[Tensor], ...] = ([], [], [])
        for _ in range(choose.randint(1, 4)):
            order = choose.choice(ORDERS)
            channels = choose.choice([choose.randint(1, 70), 8 * choose.randint(1, 40), 520])
            shape = (n, channels, choose.randint(1, 9), choose.randint(1, 9))
            a, b, weight = make_features(shape, dtype, choose.randrange(2**31))
            if choose.random() < 0.5:
                a = strided(emulator, a, order, choose.choice(STRIDED))
            else:
                a = a.contiguous(memory_format=order)
            order = CHANNELS_LAST if a.stride(1) == 1 else CHANNELS_FIRST
            layers[0].append(a)
            layers[1].append(b.contiguous(memory_format=order))
            layers[2].append(weight)
        check_all(emulator, *layers, seed)
        emulator.release()


# ------------------------------------------------------------------------- the gradient at a tap


def reference_tap_gradient(grad, deeper, tap, target, weight, eps=EPS) -> tuple[Tensor, Tensor]:
    """In float64: the distance's gradient and the deeper one, through a ReLU that made the tap."""
    before = torch.where(tap > 0, tap, -1).double().requires_grad_()
    weight = weight.double().requires_grad_()
    relu = before.relu()
    if grad.dim() == 4:
        value = composed.distance_map(relu, target.double(), weight, eps)
    else:
        value = composed.distance([relu], [target.double()], [weight], eps)
    outputs, upstream = [value], [grad.double()]
    if deeper is not None:
        outputs, upstream = [*outputs, relu], [*upstream, deeper.double()]
    result, grad_weight = torch.autograd.grad(outputs, [before, weight], upstream)
    return result, grad_weight


def check_tap(emulator: Emulator, tap, target, weight, seed: int, kind: str | None = None) -> None:
    """With and without a deeper gradient and the weight's, to a mean and to a map."""
    generator = torch.Generator().manual_seed(seed)
    accumulator = composed.accumulator_dtype(tap.dtype)
    n, _, h, w = tap.shape
    deeper = torch.randn(tap.shape, generator=generator).to(tap.dtype)
    lies = emulator.copy(deeper, CHANNELS_LAST)
    if kind is not None:
        lies = strided(emulator, deeper, CHANNELS_LAST, kind)
    pixels = max(h * w, 1)
    for shape, each in (((n, 1), pixels), ((n, 1, h, w), 1)):
        grad = emulator.copy(torch.randn(shape, generator=generator).to(accumulator))
        for more, need_weight in itertools.product((None, lies), (False, True)):
            got, got_weight = emulator.tap_backward(grad, more, tap, target, weight, need_weight)
            expected, expected_weight = reference_tap_gradient(grad, more, tap, target, weight)
            assert not got[tap <= 0].any()
            upstream = grad.double() if grad.dim() == 4 else grad.double().view(-1, 1, 1, 1) / each
            exact = [t.double() for t in (tap, target, weight)]
            scale = gradient_scale(upstream, *exact).norm()
            scale += 0 if more is None else more.double().norm()
            step = 2**-24 * got.numel() ** 0.5 if tap.dtype == torch.float16 else 0
            error = (got.double() - expected).norm()
            assert error <= GRADIENT_ERROR[tap.dtype] * scale + step
            if need_weight:
                bound = max(DISTANCE_ERROR.get(tap.dtype, 2e-6), 1e-12) * 10
                assert relative_error(got_weight, expected_weight) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestTapBackward:
    @pytest.mark.parametrize("channels", [1, 3, 8, 33, 64, 192, 512, 1200])
    def test_every_width(self, emulator, dtype, channels):
        seed = fresh_seed()
        emulator.multiprocessors = 1
        a, b, weight = make_features((2, channels, 5, 6), dtype, seed)
        a, b = emulator.copy(a, CHANNELS_LAST), emulator.copy(b, CHANNELS_LAST, in_front=True)
        check_tap(emulator, a, b, emulator.copy(weight), seed)

    @pytest.mark.parametrize("kind", STRIDED)
    def test_strided(self, emulator, dtype, kind):
        seed = fresh_seed()
        a, b, weight = make_features((2, 16, 5, 8), dtype, seed)
        skewed, plain = strided(emulator, a, CHANNELS_LAST, kind), emulator.copy(b, CHANNELS_LAST)
        check_tap(emulator, skewed, plain, weight, seed)
        check_tap(emulator, plain, skewed, weight, seed, kind)

    def test_is_the_sum_of_its_parts(self, emulator, dtype):
        """distance_backward, an addition and the ReLU's derivative, each rounded by itself."""
        seed = fresh_seed()
        a, b, weight = make_features((2, 64, 6, 5), dtype, seed)
        a, b = (x.contiguous(memory_format=CHANNELS_LAST) for x in (a, b))
        grad = torch.rand(2, 1, dtype=weight.dtype)
        (plain,), _, (plain_weight,) = emulator.backward(grad, [a], [b], [weight])
        got, got_weight = emulator.tap_backward(grad, None, a, b, weight, True)
        assert torch.equal(got, torch.where(a > 0, plain, 0))
        assert torch.equal(got_weight, plain_weight)

    def test_nan_comes_through(self, emulator, dtype):
        a, b, weight = make_features((1, 8, 3, 4), dtype, fresh_seed())
        a[0, 2, 1, 1] = torch.nan
        a, b = (x.contiguous(memory_format=CHANNELS_LAST) for x in (a, b))
        got, _ = emulator.tap_backward(torch.ones(1, 1, dtype=weight.dtype), None, a, b, weight)
        assert got[0, 2, 1, 1].isnan()

    def test_empty(self, emulator, dtype):
        for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
            a, b, weight = make_features(shape, dtype, 0)
            grad = torch.ones(shape[0], 1, dtype=weight.dtype)
            got, got_weight = emulator.tap_backward(grad, None, a, b, weight, True)
            assert got.shape == shape and not got_weight.any()


# --------------------------------------------------------------------------- races, in every kernel


def test_every_kernel_runs_without_a_race(emulator):
    """Every instantiation, in memory that the race detector watches, blocks of several rounds."""
    emulator.launched()
    emulator.multiprocessors = 1
    for dtype, order in itertools.product(DTYPES, ORDERS):
        # All channels in registers, and more of them than fit; loads of vectors, and of elements.
        for channels, kind in itertools.product((64, 1040), (None, "misaligned")):
            seed = fresh_seed()
            height, width = (12, 16) if channels == 64 else (2, 8)
            a, b, weight = make_features((2, channels, height, width), dtype, seed)
            a = emulator.copy(a, order) if kind is None else strided(emulator, a, order, kind)
            b, weight = emulator.copy(b, order), emulator.copy(weight)
            emulator.distance([a], [b], [weight])
            emulator.distance_map([a], [b], [weight])
            grad = emulator.copy(torch.ones(2, 1, dtype=weight.dtype))
            for need_weight in (False, True):
                emulator.backward(grad, [a], [b], [weight], need_weights=need_weight)
                emulator.backward(grad, [a], [b], [weight], EPS, need_weight, not need_weight)
                if order == CHANNELS_LAST:
                    emulator.tap_backward(grad, a, a, b, weight, need_weight)
        emulator.release()
    assert emulator.launched() == set(emulator.kernels.values())
    assert not emulator.races()


# ------------------------------------------------------------------------------- exact promises


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestExact:
    SHAPES = ((2, 64, 6, 9), (2, 100, 3, 5), (1, 1200, 2, 3))

    def test_identical_features_give_zero(self, emulator, dtype, order):
        for shape in self.SHAPES:
            a, _, weight = make_features(shape, dtype, fresh_seed())
            a = a.contiguous(memory_format=order)
            assert not emulator.distance([a], [a.clone()], [weight]).any()
            assert not emulator.distance_map([a], [a.clone()], [weight])[0].any()
            grad = torch.ones(shape[0], 1, dtype=weight.dtype)
            for gradients in emulator.backward(grad, [a], [a.clone()], [weight]):
                assert not gradients[0].any()

    def test_symmetric_to_the_bit(self, emulator, dtype, order):
        for shape in self.SHAPES:
            a, b, weight = make_features(shape, dtype, fresh_seed())
            a, b = (x.contiguous(memory_format=order) for x in (a, b))
            forth = emulator.distance([a], [b], [weight])
            assert torch.equal(forth, emulator.distance([b], [a], [weight]))
            assert torch.equal(
                emulator.distance_map([a], [b], [weight])[0],
                emulator.distance_map([b], [a], [weight])[0],
            )
            grad = torch.rand(forth.shape, dtype=forth.dtype)
            (da,), (db,), (dw,) = emulator.backward(grad, [a], [b], [weight])
            (db2,), (da2,), (dw2,) = emulator.backward(grad, [b], [a], [weight])
            assert torch.equal(da, da2) and torch.equal(db, db2) and torch.equal(dw, dw2)

    def test_same_bits_in_any_order_of_threads(self, emulator, dtype, order):
        """A missing barrier, or a sum whose order is left to chance, shows here."""
        emulator.multiprocessors = 1
        for shape in self.SHAPES:
            a, b, weight = make_features(shape, dtype, fresh_seed())
            a, b = (x.contiguous(memory_format=order) for x in (a, b))
            grad = torch.rand(shape[0], 1, dtype=weight.dtype)
            results = []
            for emulator.thread_order in THREAD_ORDERS:
                gradients = emulator.backward(grad, [a], [b], [weight])
                results.append(
                    [
                        emulator.distance([a], [b], [weight]),
                        *emulator.distance_map([a], [b], [weight]),
                        *itertools.chain(*gradients),
                    ]
                )
            for other in results[1:]:
                assert all(torch.equal(x, y) for x, y in zip(results[0], other))

    def test_only_what_is_asked_for(self, emulator, dtype, order):
        a, b, weight = make_features((2, 64, 5, 4), dtype, fresh_seed())
        a, b = (x.contiguous(memory_format=order) for x in (a, b))
        grad = torch.rand(2, 1, dtype=weight.dtype)
        everything = emulator.backward(grad, [a], [b], [weight])
        for needs in itertools.product([False, True], repeat=3):
            if any(needs):
                some = emulator.backward(grad, [a], [b], [weight], EPS, *needs)
                for needed, part, whole in zip(needs, some, everything):
                    assert len(part) == needed
                    if needed and not needs[2]:  # other blocks, when weights are not asked for
                        assert relative_error(part[0], whole[0].double()) < 1e-6
                    elif needed:
                        assert torch.equal(part[0], whole[0])


# ------------------------------------------------------------------------------ hard magnitudes


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
class TestMagnitudes:
    @pytest.mark.parametrize(
        ("dtype", "scale"),
        [
            (torch.float32, 1e15),
            (torch.float32, 1e-15),
            (torch.float16, 6e3),  # squares beyond float16
            (torch.float16, 1e-7),  # subnormal
            (torch.bfloat16, 1e15),
            (torch.bfloat16, 1e-15),
            (torch.float64, 1e100),
            (torch.float64, 1e-100),
        ],
        ids=str,
    )
    def test_large_and_small(self, emulator, dtype, scale, order):
        a, b, weight = make_features((2, 64, 4, 6), torch.float64, fresh_seed())
        a = (a * scale).to(dtype).contiguous(memory_format=order)
        b = (b * scale).to(dtype).contiguous(memory_format=order)
        weight = weight.abs().to(composed.accumulator_dtype(dtype))
        exact = ([a.double()], [b.double()], [weight.double()])
        error = DISTANCE_ERROR.get(dtype, 2e-6)
        assert relative_error(emulator.distance([a], [b], [weight]), averaged(*exact)) < error
        grad = torch.ones(2, 1, dtype=weight.dtype)
        (da,), _, (dw,) = emulator.backward(grad, [a], [b], [weight])
        expected = reference_gradients(averaged, grad.double(), *exact)
        assert relative_error(dw, expected[2][0]) < error * 10
        assert not da.isnan().any()
        if dtype != torch.float16:
            # A few ULPs of every term; overflow to infinity is left to be seen.
            finite = da.isfinite() & (expected[0][0].abs() < torch.finfo(dtype).max)
            assert relative_error(da[finite], expected[0][0][finite]) < 0.02

    @pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
    def test_tiny_differences_do_not_cancel(self, emulator, order, step):
        a, noise, weight = make_features((1, 64, 6, 6), torch.float32, fresh_seed())
        b = (a * (1 + step * noise)).contiguous(memory_format=order)
        a, weight = a.contiguous(memory_format=order), weight.abs()
        exact = averaged([a.double()], [b.double()], [weight.double()])
        # The unit vectors' rounding, 2^-24 of each element, against a difference of `step`.
        assert relative_error(emulator.distance([a], [b], [weight]), exact) < 1e-5 + 2e-7 / step

    def test_float16_gradient_of_zero_vectors_is_clamped_and_no_other(self, emulator, order):
        a = torch.zeros(1, 16, 2, 2, dtype=torch.float16)
        a[0, :, 0, 0] = 1e-4
        b = torch.rand(1, 16, 2, 2).add(0.5).half()
        a, b = (x.contiguous(memory_format=order) for x in (a, b))
        weight = torch.ones(16)
        (da,), (db,), _ = emulator.backward(torch.full((1, 1), 1e3), [a], [b], [weight])
        zero = (a == 0).all(dim=1, keepdim=True).expand_as(a)
        assert bool((da[zero].abs() == 65504).all())
        assert bool(db.isfinite().all())
        (da,), _, _ = emulator.backward(torch.full((1, 1), 1e6), [a], [b], [weight])
        assert bool(da[~zero].isinf().any()), "an overflow elsewhere must stay visible"
        assert bool((da[zero].abs() == 65504).all())

    def test_nan_and_infinity_are_not_hidden(self, emulator, order):
        a, b, weight = make_features((2, 32, 4, 4), torch.float32, fresh_seed())
        for bad in (float("nan"), float("inf")):
            spoilt = a.clone()
            spoilt[1, 3, 2, 2] = bad
            spoilt = spoilt.contiguous(memory_format=order)
            clean = b.contiguous(memory_format=order)
            distances = emulator.distance([spoilt], [clean], [weight])
            assert bool(distances[0].isfinite()) and bool(distances[1].isnan())


def test_eps_is_the_callers(emulator):
    a, b, weight = make_features((1, 8, 3, 3), torch.float32, fresh_seed())
    a, b = (x.contiguous(memory_format=CHANNELS_LAST) for x in (a, b))
    exact = composed.distance([a.double()], [b.double()], [weight.double()], 0.25)
    assert relative_error(emulator.distance([a], [b], [weight], 0.25), exact) < 1e-5


# ----------------------------------------------------------------------- launches and the plan


def trunk_features(channels: Sequence[int], sizes: Sequence[int], n: int, order):
    layers = [
        make_features((n, c, s, s), torch.float32, fresh_seed()) for c, s in zip(channels, sizes)
    ]
    a, b, weights = (list(group) for group in zip(*layers))
    return *([x.contiguous(memory_format=order) for x in xs] for xs in (a, b)), weights


ALEX = [64, 192, 384, 256, 256]


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
def test_alex_at_64_pixels_is_one_launch(emulator, order):
    emulator.multiprocessors = 132
    layers = trunk_features(ALEX, [15, 7, 3, 3, 3], 1, order)
    result = emulator.distance(*layers)
    launches = emulator.launches
    assert relative_error(result, averaged(*[[t.double() for t in g] for g in layers])) < 1e-5
    # channels_last: all vector loads. NCHW: odd heights, so that all loads are single elements.
    assert launches == 1
    emulator.distance_map(*layers)
    assert emulator.launches == 1
    emulator.backward(result, *layers, need_weights=False)
    assert emulator.launches == 1
    emulator.backward(result, *layers)
    assert emulator.launches == 2


def test_larger_images_are_two_launches(emulator):
    layers = trunk_features([64, 128], [48, 24], 2, CHANNELS_LAST)
    result = emulator.distance(*layers)
    assert emulator.launches == 2
    assert relative_error(result, averaged(*[[t.double() for t in g] for g in layers])) < 1e-5


def test_many_layers_of_both_orders(emulator):
    """More layers than one launch takes; their columns must not be confused."""
    seed = fresh_seed()
    layers: tuple[list[Tensor], ...] = ([], [], [])
    for index in range(19):
        a, b, w = make_features((2, 3 + 5 * index, 3, 4), torch.float16, seed + index)
        order = ORDERS[index % 2]
        layers[0].append(a.contiguous(memory_format=order))
        layers[1].append(b.contiguous(memory_format=order))
        layers[2].append(w)
    check_all(emulator, *layers, seed)


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0), (2, 0, 4, 4)], ids=str)
def test_empty(emulator, order, shape):
    full = (shape[0], 8, 3, 3)
    layers = [make_features(s, torch.float32, fresh_seed()) for s in (shape, full)]
    a, b, weights = (list(group) for group in zip(*layers))
    a, b = ([x.contiguous(memory_format=order) for x in xs] for xs in (a, b))
    result = emulator.distance(a, b, weights)
    assert_within_rounding(result, composed.distance, a, b, weights, 2e-6)
    for x, *layer in zip(emulator.distance_map(a, b, weights), a, b, weights):
        assert_within_rounding(x, lambda *one: maps(*one)[0], *([t] for t in layer), 2e-6)
    _, _, dw = emulator.backward(torch.ones(result.shape), a, b, weights)
    assert dw[0].shape == (shape[1],) and not dw[0].any()
    assert bool(dw[1].isfinite().all())


def work_of(shape, strides, order: int) -> LayerWork:
    some = FeatureView(4096, tuple(strides))
    return LayerWork(LayerView(tuple(shape), order, some, some, 4096), 4096, upstream_scale=1.0)


class TestPlan:
    def test_vector_loads_where_they_are_possible(self, emulator):
        for size, wide in ((4, 4), (2, 8), (8, 2)):
            for c in (64, 8, 12, 7):
                work = work_of((2, c, 9, 9), (81 * c, 1, 9 * c, c), 0)
                assert emulator.plan(AVERAGE, work, size)["vectors"] == (c % wide == 0)
        for hw, possible in ((16, True), (15, False)):
            work = work_of((2, 64, hw, hw), (64 * hw * hw, hw * hw, hw, 1), 1)
            assert emulator.plan(AVERAGE, work, 4)["vectors"] == possible

    def test_blocks_come_in_whole_waves(self, emulator):
        """On 132 multiprocessors of four blocks each; rounds are of 64 positions here."""
        emulator.multiprocessors = 132
        for images, side, blocks in (
            (8, 128, 512),  # 2048 rounds: by four in one wave, not by three in 1.3
            (1, 184, 265),  # 529 rounds: by two in one wave, not one by one in a second
            (12, 128, 1032),  # 3072: by three in two waves, not by four in 1.5
            (32, 256, 4096),  # many: at most 32 blocks a multiprocessor, so by eight
        ):
            work = work_of((images, 64, side, side), (64 * side**2, 1, 64 * side, 64), 0)
            plan = emulator.plan(MAP, work, 4)
            assert plan["lanes"] == 4 and plan["blocks"] == blocks

    @pytest.mark.parametrize("size", [2, 4, 8])
    def test_layers_of_the_trunks_stay_in_registers(self, emulator, size):
        for c in (64, 128, 192, 256, 384, 512):
            last = work_of((1, c, 8, 8), (64 * c, 1, 8 * c, c), 0)
            first = work_of((1, c, 8, 8), (64 * c, 64, 8, 1), 1)
            if size < 8 or c <= 256:
                assert emulator.plan(AVERAGE, last, size)["slabs"] == 1
            assert emulator.plan(AVERAGE, first, size)["slabs"] == 1

    def test_blocks_cover_every_position_once(self, emulator):
        for order, h, w, c in itertools.product((0, 1), (1, 7, 64), (1, 33), (3, 64, 512)):
            strides = (h * w * c, 1, w * c, c) if order == 0 else (h * w * c, h * w, w, 1)
            plan = emulator.plan(MAP, work_of((3, c, h, w), strides, order), 4)
            assert plan["blocks"] == 3 * plan["tiles"]
            assert (plan["tiles"] - 1) * plan["tile_positions"] < h * w
            assert plan["tiles"] * plan["tile_positions"] >= h * w

    def test_refusals(self, emulator):
        with pytest.raises(ValueError, match="channels are not supported"):
            emulator.plan(AVERAGE, work_of((1, 2**28, 1, 1), (2**28, 1, 1, 1), 0), 4)
        with pytest.raises(ValueError, match="smaller batches"):
            emulator.plan(AVERAGE, work_of((2**31, 1, 1, 1), (0, 1, 1, 1), 0), 4)
        with pytest.raises(ValueError, match="do not adjoin"):
            emulator.plan(AVERAGE, work_of((1, 1, 2, 2**31), (0, 1, 2**32, 1), 0), 4)


@pytest.mark.parametrize("far", ["image", "channel", "row", "column"])
def test_offsets_beyond_32_bits(emulator, far):
    """A few elements, 2^32 apart, in address space that costs no memory."""
    order = CHANNELS_FIRST if far == "channel" else CHANNELS_LAST
    distance = 2**32 + 64
    strides = {
        "image": (distance, 1, 16, 8),
        "row": (8, 1, distance, 8),
        "column": (8, 1, 8, distance),
        "channel": (8, distance, 2, 1),
    }[far]
    shape = {
        "image": (2, 8, 1, 2),
        "row": (1, 8, 2, 1),
        "column": (1, 8, 1, 2),
        "channel": (1, 3, 2, 2),
    }[far]
    size = 2 * (sum((n - 1) * s for n, s in zip(shape, strides)) + 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, ValueError, MemoryError):
        pytest.skip(f"no address space for {size >> 30} GiB")
    seed = fresh_seed()
    a, b, weight = make_features(shape, torch.float16, seed)
    wide = torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides).copy_(a)
    b = b.contiguous(memory_format=order)
    exact = ([a.double()], [b.double()], [weight.double()])
    result = emulator.distance([wide], [b], [weight])
    assert relative_error(result, averaged(*exact)) < 1e-5
    grad = torch.ones(result.shape)
    (da,), _, _ = emulator.backward(grad, [wide], [b], [weight])
    expected = emulator.backward(grad, [a.contiguous(memory_format=order)], [b], [weight])
    assert relative_error(da, expected[0][0].double()) < 1e-5
