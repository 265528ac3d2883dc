"""The trunk's CUDA kernels on the CPU: csrc/cuda, unmodified, through tests/emulation.

What passes here is proven of the kernels' indexing, tails and formulas in every dtype, against
torch or float64. What a GPU alone can show is left to tests/kernels/test_cuda.py.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor

from lpips_fast import composed, kernels  # noqa: F401  (ops loads the CPU's max-pooling)

VECTOR_BYTES = 16
SHIFT = torch.tensor([-0.030, -0.088, -0.188])
SCALE = torch.tensor([0.458, 0.448, 0.450])


def name_of(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


class Emulator(EmulatedLibrary):
    """The trunk's operators on CPU tensors, run by the CUDA kernels."""

    def __init__(self, library) -> None:
        super().__init__(library)
        self.ends = 0  # where not 0: only so many blocks at either end of a launch run

    def call(self, function: str, *arguments: Any) -> int:
        """Runs a launch of tests/emulation/run_trunk.cpp; returns the number of launches."""
        launches = self.ask(function, *arguments, self.thread_order, self.ends)
        if launches < 0:
            raise ValueError(self.library.last_error().decode())
        return launches

    def ask(self, function: str, *arguments: Any) -> int:
        converted: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                converted.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, (tuple, list)):
                converted.append((ctypes.c_int64 * len(argument))(*argument))
            elif isinstance(argument, torch.dtype):
                converted.append(ctypes.c_char_p(name_of(argument)))
            else:
                converted.append(ctypes.c_int64(argument))
        return getattr(self.library, function)(*converted)

    def bias_relu_(self, y: Tensor, bias: Tensor) -> int:
        n, c, h, w = y.shape
        return self.call("run_bias_relu", y.dtype, y, bias, n * h * w, c)

    def scale_images(
        self,
        batches: Sequence[Tensor],
        unit_range: bool,
        dtype: torch.dtype,
        skew: int = 0,
        flags: Tensor | None = None,
    ) -> Tensor:
        """One batch behind the other, as csrc/cuda/scale_images_cuda.cu launches them.

        The result lies ``skew`` elements behind an aligned address.
        """
        n, (_, _, h, w) = sum(map(len, batches)), batches[0].shape
        flat = self.empty((n * h * w * 3 + skew,), dtype, in_front=bool(skew))[skew:]
        first = done = 0
        for images in batches:
            accumulator = composed.accumulator_dtype(images.dtype)
            shift, scale = (self.copy(t.to(accumulator)) for t in (SHIFT, SCALE))
            self.call(
                *("run_scale_images", images.dtype, dtype, images, (len(images), h, w)),
                *(images.stride(), shift, scale, unit_range, flat[first:]),
                0 if flags is None else flags[done:],
            )
            first += images.numel()
            done += len(images)
        return flat.as_strided((n, 3, h, w), (h * w * 3, 1, w * 3, 3))

    def max_pool2d(self, x: Tensor, kernel: int, stride: int, ceil_mode: bool) -> Tensor:
        model = F.max_pool2d(torch.empty(x.shape, device="meta"), kernel, stride, 0, 1, ceil_mode)
        y = self.empty(model.shape, x.dtype, CHANNELS_LAST)
        shape = (*x.shape[1:], *y.shape[2:], kernel, stride)
        self.call("run_max_pool", x.dtype, x, y, len(x), shape)
        return y

    def max_pool2d_backward(
        self, grad: Tensor, x: Tensor, y: Tensor, kernel: int, stride: int, in_front=False
    ) -> Tensor:
        grad_x = self.empty(x.shape, x.dtype, CHANNELS_LAST, in_front)
        shape = (*x.shape[1:], *y.shape[2:], kernel, stride)
        self.call("run_max_pool_backward", x.dtype, grad, x, y, grad_x, len(x), shape)
        return grad_x


@pytest.fixture(scope="session")
def library() -> Emulator:
    return Emulator(emulation_library("run_trunk"))


@pytest.fixture
def emulator(library: Emulator) -> Iterator[Emulator]:
    library.thread_order = library.ends = 0
    yield library
    library.release()
    assert not library.races()


def random_images(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def address_space(size: int) -> mmap.mmap:
    """Memory that is taken where it is touched alone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(-1, size, flags=flags)
    except (OSError, ValueError, MemoryError):
        pytest.skip(f"no address space for {size >> 30} GiB")


# --------------------------------------------------------------------------- races, in every kernel


def test_every_kernel_runs_without_a_race(emulator):
    """Every instantiation, in memory that the race detector watches."""
    emulator.launched()
    for dtype in DTYPES:
        for channels in (32, 7):  # loads of vectors, and of elements
            x = emulator.copy(
                random_images((2, channels, 9, 11), dtype, fresh_seed()), CHANNELS_LAST
            )
            emulator.bias_relu_(x, emulator.copy(x[0, :, 0, 0]))
            for kernel in (2, 3, 4):
                y = emulator.max_pool2d(x, kernel, 2, True)
                emulator.max_pool2d_backward(y, x, y, kernel, 2)
        for order, result in itertools.product((CHANNELS_LAST, CHANNELS_FIRST), DTYPES):
            images = emulator.copy(random_images((2, 3, 6, 32), dtype, fresh_seed()), order)
            images[:, :, 2] = torch.nan
            flags = emulator.copy(torch.zeros(2))
            emulator.scale_images([images], True, result, flags=flags)
            emulator.scale_images([images[..., 1:]], False, result, flags=flags)
        emulator.release()
    assert emulator.launched() == set(emulator.kernels.values())
    assert not emulator.races()


# --------------------------------------------------------------------------------- bias and ReLU


def torchs_bias_relu(y: Tensor, bias: Tensor) -> Tensor:
    return (y + bias.view(1, -1, 1, 1)).relu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestBiasRelu:
    @pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 33, 48, 64, 100, 192, 1000, 5000])
    def test_same_bits_as_torch(self, emulator, dtype, channels):
        seed = fresh_seed()
        bias = emulator.copy(random_images((channels,), dtype, seed + 1))
        for shape in ((2, channels, 5, 7), (1, channels, 1, 1), (3, channels, 1, 9)):
            y = random_images(shape, dtype, seed)
            for in_front in (False, True):
                result = emulator.copy(y, CHANNELS_LAST, in_front)
                assert emulator.bias_relu_(result, bias) == 1
                assert torch.equal(result, torchs_bias_relu(y, bias))

    def test_misaligned(self, emulator, dtype):
        """One element behind an aligned address: the images, or the bias."""
        seed, (n, c, h, w) = fresh_seed(), (2, 32, 3, 5)
        images, biases = random_images((n, c, h, w), dtype, seed), random_images((c,), dtype, seed)
        wide = VECTOR_BYTES // dtype.itemsize
        for skew in ((1, 0), (0, 1)):
            flat, flat_bias = (
                emulator.empty((size + 2 * wide,), dtype) for size in (images.numel(), c)
            )
            first, first_bias = (
                -(f.data_ptr() // dtype.itemsize) % wide + s
                for f, s in zip((flat, flat_bias), skew)
            )
            y = flat.as_strided((n, c, h, w), (h * w * c, 1, w * c, c), first).copy_(images)
            bias = flat_bias[first_bias : first_bias + c].copy_(biases)
            before = flat.isnan()
            emulator.bias_relu_(y, bias)
            assert torch.equal(y, torchs_bias_relu(images, biases))
            assert torch.equal(flat.isnan(), before), "wrote beside the images"

    def test_nan_and_infinity_pass(self, emulator, dtype):
        y = emulator.copy(random_images((1, 16, 4, 4), dtype, fresh_seed()), CHANNELS_LAST)
        y[0, 3, 2, 2], y[0, 4, 0, 0], y[0, 5, 1, 1] = torch.nan, torch.inf, -torch.inf
        expected = torchs_bias_relu(y, torch.zeros(16, dtype=dtype))
        emulator.bias_relu_(y, emulator.copy(torch.zeros(16, dtype=dtype)))
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)

    def test_same_bits_in_any_order_of_threads(self, emulator, dtype):
        y = random_images((2, 24, 9, 11), dtype, fresh_seed())
        bias = emulator.copy(random_images((24,), dtype, 0))
        for emulator.thread_order in THREAD_ORDERS:
            result = emulator.copy(y, CHANNELS_LAST)
            emulator.bias_relu_(result, bias)
            assert torch.equal(result, torchs_bias_relu(y, bias))

    def test_empty(self, emulator, dtype):
        bias = emulator.copy(random_images((8,), dtype, 0))
        for shape in ((0, 8, 3, 3), (2, 8, 0, 3)):
            assert emulator.bias_relu_(torch.empty(shape, dtype=dtype), bias) == 0
        assert emulator.bias_relu_(torch.empty((2, 0, 3, 3), dtype=dtype), bias) == 0


@pytest.mark.parametrize("channels", [8, 7])
def test_bias_relu_beyond_32_bits(emulator, channels):
    """More than 2^32 elements, as vectors or alone: the first and the last blocks."""
    count = (2**32 // channels + 999) * channels
    memory = address_space(2 * count)
    flat = torch.frombuffer(memory, dtype=torch.float16)
    ends = [flat[:4096], flat[-4096:]]
    before = [random_images((4096,), torch.float16, fresh_seed()) for _ in ends]
    for end, values in zip(ends, before):
        end.copy_(values)
    bias = random_images((channels,), torch.float16, 0)
    emulator.ends = 8
    emulator.call("run_bias_relu", torch.float16, flat, bias, count // channels, channels)
    for end, values, first in zip(ends, before, (0, count - 4096)):
        at = bias[(first + torch.arange(4096)) % channels]
        assert torch.equal(end, (values + at).relu())


def test_bias_relu_refuses_too_many_blocks(emulator):
    y = torch.zeros(1)
    with pytest.raises(ValueError, match="smaller batches"):
        emulator.call("run_bias_relu", torch.float32, y, y, 2**42, 7)
    with pytest.raises(ValueError, match="channels are not supported"):
        emulator.call("run_bias_relu", torch.float32, y, y, 1, 2**28)


# --------------------------------------------------------------------------------- image scaling


def torchs_scaling(batches: Sequence[Tensor], unit_range: bool, dtype: torch.dtype) -> Tensor:
    """The composed formula: float32 (float64 for float64 images), rounded once at the end."""
    parts = []
    for images in batches:
        x = images.to(composed.accumulator_dtype(images.dtype))
        x = 2 * x - 1 if unit_range else x
        shift, scale = (t.to(x.dtype).view(1, 3, 1, 1) for t in (SHIFT, SCALE))
        parts.append(((x - shift) / scale).to(dtype))
    return torch.cat(parts)


ORDERS = [CHANNELS_LAST, CHANNELS_FIRST]


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestScaleImages:
    @pytest.mark.parametrize("unit_range", [False, True])
    def test_same_bits_as_the_formula(self, emulator, dtype, result, order, unit_range):
        # Vectors by rows and by adjoining rows; odd sizes, a row or column of one, several blocks.
        for shape in ((2, 3, 6, 8), (1, 3, 5, 16), (2, 3, 7, 5), (1, 3, 1, 33), (2, 3, 9, 1)):
            images = emulator.copy(random_images(shape, dtype, fresh_seed()), order)
            got = emulator.scale_images([images], unit_range, result)
            assert torch.equal(got, torchs_scaling([images], unit_range, result)), shape

    def test_batches_behind_each_other(self, emulator, dtype, result, order):
        """Of different dtypes, the second from an odd address on."""
        for shape in ((1, 3, 5, 7), (3, 3, 4, 8)):
            batches = [
                emulator.copy(random_images(shape, d, fresh_seed()), order)
                for d in (dtype, torch.float32, dtype)
            ]
            got = emulator.scale_images(batches, True, result)
            assert torch.equal(got, torchs_scaling(batches, True, result))

    @pytest.mark.parametrize("kind", STRIDED)
    def test_any_strides(self, emulator, dtype, result, order, kind):
        for shape in ((2, 3, 5, 8), (2, 3, 8, 24)):
            images = random_images(shape, dtype, fresh_seed())
            view = strided(emulator, images, order, kind)
            got = emulator.scale_images([view], False, result)
            assert torch.equal(got, torchs_scaling([images], False, result))

    def test_flipped_channels_and_shared_ones(self, emulator, dtype, result, order):
        images = emulator.copy(random_images((2, 3, 4, 8), dtype, fresh_seed()), order)
        for view in (
            images[:, :1].expand(-1, 3, -1, -1),  # gray
            images[:1].expand(4, -1, -1, -1),
            images.transpose(2, 3),
            images[:, :, 1:, ::2],
        ):
            got = emulator.scale_images([view], False, result)
            assert torch.equal(got, torchs_scaling([view], False, result))

    @pytest.mark.parametrize("odd", ["image", "channel", "row"])
    def test_odd_strides_behind_an_aligned_address(self, emulator, dtype, result, order, odd):
        shape = (2, 3, 4, 8)
        strides = [97, 32, 8, 1] if order == CHANNELS_FIRST else [97, 1, 24, 3]
        if odd == "channel" and order == CHANNELS_FIRST:
            strides = [128, 33, 8, 1]
        elif odd == "row":
            strides = [128, 40, 9, 1] if order == CHANNELS_FIRST else [128, 1, 25, 3]
        wide = emulator.empty((256,), dtype, in_front=True).as_strided(shape, strides)
        images = wide.copy_(random_images(shape, dtype, fresh_seed()))
        got = emulator.scale_images([images], False, result)
        assert torch.equal(got, torchs_scaling([images], False, result))

    def test_misaligned_result(self, emulator, dtype, result, order):
        images = emulator.copy(random_images((1, 3, 4, 16), dtype, fresh_seed()), order)
        got = emulator.scale_images([images], True, result, skew=1)
        assert torch.equal(got, torchs_scaling([images], True, result))


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_images_flags_what_is_not_finite(emulator, dtype, result, order):
    for size in ((4, 16), (3, 5), (40, 16)):  # rows of vectors, of elements, several blocks
        for emulator.thread_order in THREAD_ORDERS:
            images = random_images((5, 3, *size), dtype, fresh_seed())
            images[1, 2, -1, -1], images[2, 0, 0, 0] = torch.nan, -torch.inf
            images[3, 1, 1, 2] = torch.finfo(dtype).max  # beyond some results' range
            batches = [emulator.copy(part, order) for part in images.split([2, 3])]
            flags = emulator.copy(torch.zeros(5))
            got = emulator.scale_images(batches, False, result, flags=flags)
            expected = torchs_scaling(batches, False, result)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            is_finite = expected.isfinite().flatten(1).all(dim=1)
            assert torch.equal(flags.isnan(), ~is_finite) and not flags[is_finite].any()
            assert not is_finite[1:3].any() and is_finite[[0, 4]].all()


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_images_reads_vectors_where_it_can(emulator, dtype, result):
    planes, interleaved, singles = 0, 1, 2
    pixels = VECTOR_BYTES // result.itemsize
    out = emulator.empty((4096,), result, in_front=True)  # a page's start

    def order_of(images: Tensor, to: Tensor = out) -> int:
        sizes = (len(images), *images.shape[2:])
        return emulator.ask("order_of_pixels", dtype, result, images, sizes, images.stride(), to)

    for order, expected in ((CHANNELS_FIRST, planes), (CHANNELS_LAST, interleaved)):
        if torch.float64 in (dtype, result):
            expected = singles
        images = emulator.empty((2, 3, 4, 2 * pixels), dtype, order, in_front=True)
        assert order_of(images) == expected
        assert order_of(images, out[1:]) == singles
        assert order_of(images[..., 1:]) == singles
        assert order_of(images[..., : 2 * pixels - 1]) == singles
        assert order_of(images[:, :, 1:3]) == expected  # a crop of whole rows


@pytest.mark.parametrize("size", [(8, 600), (700, 5)], ids=str)
def test_scale_images_in_any_order_of_threads(emulator, size):
    for order in ORDERS:
        images = emulator.copy(random_images((2, 3, *size), torch.float32, fresh_seed()), order)
        for emulator.thread_order in THREAD_ORDERS:
            got = emulator.scale_images([images], False, torch.float16)
            assert torch.equal(got, torchs_scaling([images], False, torch.float16))


def test_scale_images_empty(emulator):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        images = torch.empty(shape)
        assert emulator.scale_images([images], False, torch.float32).shape == shape


@pytest.mark.parametrize("far", ["image", "channel", "row", "result"])
def test_scale_images_beyond_32_bits(emulator, far):
    """Elements 2^32 apart in the images, or a result of more than 2^32."""
    distance = 2**32 + 64
    if far == "result":
        width = distance // 3
        images = torch.frombuffer(address_space(2 * width), dtype=torch.float16)
        images = images.as_strided((1, 3, 1, width), (width, 0, width, 1))
        result = torch.frombuffer(address_space(2 * 3 * width), dtype=torch.float16)
        ends = (slice(0, 64), slice(width - 64, width))
        for end in ends:
            images[0, 0, 0, end] = random_images((64,), torch.float16, fresh_seed())
        emulator.ends = 4
        emulator.call(
            *("run_scale_images", torch.float16, torch.float16, images, (1, 1, width)),
            *(images.stride(), SHIFT, SCALE, False, result, 0),
        )
        got = result.as_strided(images.shape, (3 * width, 1, 3 * width, 3))
        for end in ends:
            expected = torchs_scaling([images[..., end]], False, torch.float16)
            assert torch.equal(got[..., end], expected)
        return
    strides = {
        "image": (distance, 64, 8, 1),
        "channel": (8, distance, 8, 1),
        "row": (8, 8, distance, 1),
    }[far]
    shape = {"image": (2, 3, 1, 8), "channel": (1, 3, 1, 8), "row": (1, 3, 2, 8)}[far]
    memory = address_space(2 * (sum((n - 1) * s for n, s in zip(shape, strides)) + 1))
    images = random_images(shape, torch.float16, fresh_seed())
    wide = torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides).copy_(images)
    got = emulator.scale_images([wide], False, torch.float16)
    assert torch.equal(got, torchs_scaling([wide], False, torch.float16))


# ----------------------------------------------------------------------------------- max-pooling

WINDOWS = [(3, 2, False), (3, 2, True), (2, 2, False), (2, 2, True), (3, 1, False)]
WINDOWS += [(1, 1, False), (1, 2, True), (2, 3, True), (5, 3, True), (4, 1, False)]


def like_features(shape: Sequence[int], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    x = random_images(shape, torch.float32, seed)
    if kind == "ties":
        x = (x * 2).round()
    elif kind == "relu":
        x = x.relu()
    elif kind == "not finite":
        chance = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
        x = torch.where(chance < 0.06, torch.nan, x)
        x = torch.where((chance > 0.06) & (chance < 0.12), torch.inf, x)
        x[:, ::2] = torch.where(chance < 0.5, -torch.inf, x)[:, ::2]
    return x.to(dtype)


def check_pooling(emulator: Emulator, x: Tensor, window, seed: int, in_front: bool) -> None:
    """The forward and the backward of one window, against torch, float64 and the CPU's kernel."""
    kernel, stride, ceil_mode = window
    x = emulator.copy(x, CHANNELS_LAST, in_front)
    y = emulator.max_pool2d(x, *window)
    expected = F.max_pool2d(x, kernel, stride, ceil_mode=ceil_mode)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)

    upstream = emulator.copy(random_images(y.shape, x.dtype, seed), CHANNELS_LAST, in_front)
    got = emulator.max_pool2d_backward(upstream, x, y, kernel, stride, in_front)
    accumulator = composed.accumulator_dtype(x.dtype)
    on_cpu = torch.ops.lpips_fast.max_pool2d_backward(
        *(t.to(accumulator) for t in (upstream, x, y)), kernel, stride
    )
    assert torch.equal(got, on_cpu.to(x.dtype))
    if not x.isfinite().all():  # among several NaN torch picks another
        return

    def gradient(upstream: Tensor) -> Tensor:
        leaf = x.double().requires_grad_()
        pooled = F.max_pool2d(leaf, kernel, stride, ceil_mode=ceil_mode)
        return torch.autograd.grad(pooled, leaf, upstream)[0]

    reference, magnitude = gradient(upstream.double()), gradient(upstream.double().abs())
    bound = torch.finfo(x.dtype).eps * reference.abs()
    bound += 16 * torch.finfo(accumulator).eps * magnitude
    assert bool(((got.double() - reference).abs() <= bound).all())


@pytest.mark.parametrize("kind", ["plain", "ties", "relu", "not finite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestMaxPool:
    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_every_window(self, emulator, dtype, kind, window):
        for shape, in_front in (((2, 24, 13, 12), False), ((1, 7, 8, 9), True)):
            seed = fresh_seed()
            x = like_features(shape, dtype, kind, seed)
            check_pooling(emulator, x, window, seed, in_front)

    @pytest.mark.parametrize("channels", [1, 2, 3, 8, 33, 64, 100, 1000])
    def test_every_width(self, emulator, dtype, kind, channels):
        for window in ((3, 2, True), (2, 2, False)):
            seed = fresh_seed()
            x = like_features((2, channels, 5, 4), dtype, kind, seed)
            check_pooling(emulator, x, window, seed, channels % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestMaxPoolEdges:
    @pytest.mark.parametrize("shape", [(1, 8, 3, 40), (2, 16, 31, 3), (1, 8, 2, 2)], ids=str)
    def test_narrow_images(self, emulator, dtype, shape):
        for window in ((3, 2, True), (2, 2, False), (2, 2, True)):
            seed = fresh_seed()
            x = like_features(shape, dtype, "ties", seed)
            check_pooling(emulator, x, window, seed, False)

    def test_misaligned(self, emulator, dtype):
        """Each tensor in turn, one element behind an aligned address."""
        seed = fresh_seed()
        x = like_features((2, 16, 5, 6), dtype, "ties", seed).contiguous(
            memory_format=CHANNELS_LAST
        )
        y = F.max_pool2d(x, 3, 2)
        grad = random_images(y.shape, dtype, seed).contiguous(memory_format=CHANNELS_LAST)
        expected = emulator.max_pool2d_backward(grad, x, y, 3, 2)
        for skewed in range(3):
            tensors = [grad, x, y]
            tensors[skewed] = strided(emulator, tensors[skewed], CHANNELS_LAST, "misaligned")
            assert torch.equal(emulator.max_pool2d_backward(*tensors, 3, 2), expected)
        skew = strided(emulator, x, CHANNELS_LAST, "misaligned")
        assert torch.equal(emulator.max_pool2d(skew, 3, 2, False), y)

    def test_same_bits_in_any_order_of_threads(self, emulator, dtype):
        x = emulator.copy(like_features((2, 40, 9, 21), dtype, "ties", fresh_seed()), CHANNELS_LAST)
        results = []
        for emulator.thread_order in THREAD_ORDERS:
            y = emulator.max_pool2d(x, 3, 2, True)
            grad = emulator.copy(random_images(y.shape, dtype, 0), CHANNELS_LAST)
            results.append((y, emulator.max_pool2d_backward(grad, x, y, 3, 2)))
        for y, grad_x in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(grad_x, results[0][1])

    def test_empty(self, emulator, dtype):
        x = torch.empty((0, 8, 5, 5), dtype=dtype)
        y = emulator.max_pool2d(x, 3, 2, False)
        assert y.shape == (0, 8, 2, 2)
        assert emulator.max_pool2d_backward(y, x, y, 3, 2).shape == x.shape
        for images, channels in ((0, 8), (2, 0)):
            sizes = (channels, 5, 5, 2, 2, 3, 2)
            assert emulator.call("run_max_pool", dtype, x, y, images, sizes) == 0


def test_nan_is_the_largest_and_the_first_of_them_gets_the_gradient(emulator):
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = x[0, 0, 2, 2] = torch.nan
    x = x.contiguous(memory_format=CHANNELS_LAST)
    y = emulator.max_pool2d(x, 3, 2, False)
    assert y.isnan().all()
    grad = emulator.max_pool2d_backward(torch.full((1, 1, 1, 1), 5.0), x, y, 3, 2)
    assert grad.flatten().tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("channels", [8, 7])
def test_max_pool_beyond_32_bits(emulator, channels):
    """Images of more than 2^32 elements: the first and the last blocks."""
    height, width = 2 * (2**31 // channels // 1024 + 3), 2048
    count, pooled = channels * height * width, channels * (height // 2) * (width // 2)
    sizes = (channels, height, width, height // 2, width // 2, 2, 2)
    x, y, grad, grad_x = (
        torch.frombuffer(address_space(2 * n), dtype=torch.float16)
        for n in (count, pooled, pooled, count)
    )
    rows = channels * width * 2  # two rows, and the one row that they are pooled to
    ends = ((slice(0, rows), slice(0, rows // 4)), (slice(-rows, None), slice(-rows // 4, None)))
    for of_x, of_y in ends:
        x[of_x] = random_images((rows,), torch.float16, fresh_seed())
        grad[of_y] = random_images((rows // 4,), torch.float16, fresh_seed())
    emulator.ends = 128  # at least two rows
    emulator.call("run_max_pool", torch.float16, x, y, 1, sizes)
    emulator.call("run_max_pool_backward", torch.float16, grad, x, y, grad_x, 1, sizes)
    for of_x, of_y in ends:
        image = x[of_x].view(1, 2, width, channels).permute(0, 3, 1, 2)
        leaf = image.double().requires_grad_()
        expected = F.max_pool2d(leaf, 2)
        assert torch.equal(y[of_y].view(1, 1, width // 2, channels).permute(0, 3, 1, 2), expected)
        upstream = grad[of_y].view(1, 1, width // 2, channels).permute(0, 3, 1, 2)
        (reference,) = torch.autograd.grad(expected, leaf, upstream.double())
        got = grad_x[of_x].view(1, 2, width, channels).permute(0, 3, 1, 2)
        assert torch.equal(got.double(), reference)


def test_max_pool_refusals(emulator):
    x = torch.zeros(1)
    for images, sizes, message in (
        (1, (8, 2**30, 2, 2**29, 1, 2, 2), "rows or columns"),
        (1, (2**28, 2, 2, 1, 1, 2, 2), "vectors"),
        (1, (2**20, 2, 2**20, 1, 2**19, 2, 2), "vectors"),
        (2**22, (64, 2**10, 2**10, 2**9, 2**9, 2, 2), "smaller batches"),
    ):
        with pytest.raises(ValueError, match=message):
            emulator.call("run_max_pool", torch.float32, x, x, images, sizes)
