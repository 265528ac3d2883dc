"""Memory that runs out in an operator: torch's own class and text, and half the batch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import parity
import pytest
import torch
from operator_calls import CALLS, Draw, Seeded
from torch.utils import cpp_extension

import lpips_fast
from lpips_fast.kernels import is_out_of_memory

OPS = torch.ops.lpips_fast


class LimitedAllocator:
    """Torch's CPU allocator, which can be told to have no more for a tensor than some bytes."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.set_limit.argtypes = [ctypes.c_int64]
        self._library.largest.restype = ctypes.c_int64
        self._library.install()

    @contextmanager
    def limit(self, most: int) -> Iterator[None]:
        self._library.set_limit(most)
        try:
            yield
        finally:
            self._library.set_limit(-1)

    def largest_of(self, call) -> int:
        self._library.set_limit(-1)
        call()
        return self._library.largest()


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> LimitedAllocator:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the limited allocator needs g++, and there is none")
    target = tmp_path_factory.mktemp("allocator") / "limited_allocator.so"
    source = Path(__file__).with_name("limited_allocator.cpp")
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared"]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10"]
    command = [compiler, *flags, *includes, str(source), "-o", str(target), *libraries]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return LimitedAllocator(target)


@pytest.mark.parametrize("name", CALLS)
def test_every_operator_raises_what_torch_raises(name, allocator):
    """At whichever of its allocations memory runs out, those of its threads too."""
    operator, refused = getattr(OPS, name), 0
    for seed in range(8):
        arguments, _ = CALLS[name](Draw(Seeded(seed)))
        for limit in (0, 1 << 8, 1 << 12, 1 << 16):
            try:
                with allocator.limit(limit):
                    operator(*arguments)
            except torch.OutOfMemoryError as error:
                refused += 1
                assert str(error).startswith("played out of memory: tried to allocate")
    assert refused > 0


def test_scratch_of_threads(allocator):
    """Whose exceptions cross torch's parallel_for: a batch large enough for blocks of their own."""
    x = torch.randn(8, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    packed = OPS.winograd_pack(torch.randn(1, 32, 3, 3))
    result = 8 * 62 * 62 * 4
    with allocator.limit(result), pytest.raises(torch.OutOfMemoryError, match="played"):
        OPS.winograd_conv2d(x, packed, None, False, None, 1, 3, 1, 0)


def test_text_is_torchs(allocator):
    images, three = torch.ones(2, 3, 40, 50), torch.ones(3)
    with allocator.limit(1000), pytest.raises(torch.OutOfMemoryError) as of_torch:
        torch.empty(2, 3, 40, 50)
    with allocator.limit(1000), pytest.raises(torch.OutOfMemoryError) as ours:
        OPS.scale_images([images], three, three, False, torch.float32)
    assert str(ours.value) == str(of_torch.value)


def test_on_the_cpu_it_is_a_runtime_error():
    shape = (1 << 20, 3, 1 << 10, 1 << 10)
    with pytest.raises(RuntimeError, match="can't allocate memory") as of_torch:
        torch.empty(shape)
    images, three = torch.ones(1, 3, 1, 1).expand(shape), torch.ones(3)
    with pytest.raises(RuntimeError, match="can't allocate memory") as ours:
        OPS.scale_images([images], three, three, False, torch.float32)
    assert type(ours.value) is type(of_torch.value) is RuntimeError
    assert str(ours.value) == str(of_torch.value)
    assert is_out_of_memory(ours.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("layer 0: the two features differ in shape"))


class TestBatch:
    @pytest.fixture
    def model(self):
        weights = parity.trunk_weights("alex")
        return lpips_fast.LPIPS(net="alex", weights=weights, verbose=False).requires_grad_(False)

    def test_is_halved(self, model, allocator):
        x, y = torch.rand(2, 8, 3, 64, 64) * 2 - 1
        expected = model(x, y)
        of_three = allocator.largest_of(lambda: model(x[:3], y[:3]))
        assert of_three < allocator.largest_of(lambda: model(x, y))
        with allocator.limit(of_three), torch.no_grad():
            torch.testing.assert_close(model(x, y), expected, rtol=1e-6, atol=0)

    def test_is_not_where_a_graph_is_kept(self, model, allocator):
        x, y = torch.rand(2, 4, 3, 64, 64) * 2 - 1
        with allocator.limit(4096), pytest.raises(torch.OutOfMemoryError):
            model(x.requires_grad_(), y)

    def test_of_one_image_raises(self, model, allocator):
        x, y = torch.rand(2, 1, 3, 64, 64) * 2 - 1
        with allocator.limit(4096), pytest.raises(torch.OutOfMemoryError), torch.no_grad():
            model(x, y)
