"""The trunk's CUDA kernels on the CPU: csrc/cuda, unmodified, through tests/emulation.

What passes here is proven of the kernels' indexing, tails and formulas in every dtype, against
torch or float64. What a GPU alone can show is left to tests/test_cuda.py.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cuda_emulation import (
    CHANNELS_LAST,
    DTYPES,
    THREAD_ORDERS,
    EmulatedLibrary,
    build_library,
    fresh_seed,
)
from torch import Tensor

VECTOR_BYTES = 16


def name_of(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


class Emulator(EmulatedLibrary):
    """The trunk's operators on CPU tensors, run by the CUDA kernels."""

    def __init__(self, library) -> None:
        super().__init__(library)
        self.ends = 0  # where not 0: only so many blocks at either end of a launch run

    def call(self, function: str, *arguments: Any) -> int:
        """Runs a function of tests/emulation/run_trunk.cpp; returns its number of launches."""
        converted = []
        for argument in (*arguments, self.thread_order, self.ends):
            if isinstance(argument, Tensor):
                converted.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, torch.dtype):
                converted.append(ctypes.c_char_p(name_of(argument)))
            else:
                converted.append(ctypes.c_int64(argument))
        launches = getattr(self.library, function)(*converted)
        if launches < 0:
            raise ValueError(self.library.last_error().decode())
        return launches

    def bias_relu_(self, y: Tensor, bias: Tensor) -> int:
        n, c, h, w = y.shape
        return self.call("run_bias_relu", y.dtype, y, bias, n * h * w, c)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(build_library("run_trunk.cpp", tmp_path_factory.mktemp("emulation")))


@pytest.fixture
def emulator(library: Emulator) -> Iterator[Emulator]:
    library.thread_order = library.ends = 0
    yield library
    library.release()


def random_images(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def address_space(size: int) -> mmap.mmap:
    """Memory that is taken where it is touched alone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(-1, size, flags=flags)
    except (OSError, ValueError, MemoryError):
        pytest.skip(f"no address space for {size >> 30} GiB")


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
