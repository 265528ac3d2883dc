"""The CUDA kernels on the CPU: csrc/cuda, unmodified, through tests/emulation.

What passes here is proven of the kernels' indexing, tails, reductions, formulas and launch plan, for
every dtype and order, against the composed formula in float64. What a GPU alone can show (races,
the memory model, speed) is not: tests/test_cuda.py is for that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import mmap
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lpips_fast import composed

REPOSITORY = Path(__file__).resolve().parents[1]
CHANNELS_LAST, CHANNELS_FIRST = torch.channels_last, torch.contiguous_format
ORDERS = [CHANNELS_LAST, CHANNELS_FIRST]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WIDTHS = [1, 2, 3, 5, 8, 31, 32, 33, 64, 100, 192, 256, 384, 512, 1000, 2048]
AVERAGE, MAP, BACKWARD = 0, 1, 2
THREAD_ORDERS = [0, 1, 2]  # ascending, descending, shuffled
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


class LayerWork(ctypes.Structure):
    _fields_ = [
        ("layer", LayerView),
        ("map", ctypes.c_void_p),
        ("upstream", UpstreamView),
        ("upstream_scale", ctypes.c_double),
        ("grad0", FeatureView),
        ("grad1", FeatureView),
        ("grad_weight", ctypes.c_void_p),
    ]


def view(tensor: Tensor | None) -> FeatureView:
    if tensor is None:
        return FeatureView(None, (0, 0, 0, 0))
    return FeatureView(tensor.data_ptr(), tensor.stride())


class Emulator:
    """The operators of csrc/ops.cpp on CPU tensors, run by the CUDA kernels."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.last_error.restype = ctypes.c_char_p
        self.library.guarded_allocate.restype = ctypes.c_void_p
        self.library.guarded_allocate.argtypes = [ctypes.c_int64, ctypes.c_int]
        self.library.guarded_free.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.library.size_of_layer_work.restype = ctypes.c_int64
        assert self.library.size_of_layer_work() == ctypes.sizeof(LayerWork)
        self.multiprocessors = 4
        self.thread_order = 0
        self.launches = 0
        self.guarded: list[tuple[int, int, int]] = []

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, order=CHANNELS_FIRST, in_front=False
    ) -> Tensor:
        """A tensor full of NaN whose neighbouring memory may not be touched."""
        model = torch.empty(shape, dtype=dtype, device="meta", memory_format=order)
        size = model.numel() * model.element_size()
        if size == 0:
            return torch.empty(shape, dtype=dtype, memory_format=order)
        address = self.library.guarded_allocate(size, in_front)
        self.guarded.append((address, size, in_front))
        memory = (ctypes.c_char * size).from_address(address)
        flat = torch.frombuffer(memory, dtype=dtype)
        return flat.as_strided(model.shape, model.stride())

    def copy(self, tensor: Tensor, order=CHANNELS_FIRST, in_front=False) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype, order, in_front).copy_(tensor)

    def release(self) -> None:
        for block in self.guarded:
            self.library.guarded_free(*block)
        self.guarded.clear()

    @staticmethod
    def works(feats0, feats1, weights) -> list[LayerWork]:
        works = []
        for a, b, w in zip(feats0, feats1, weights):
            work = LayerWork(upstream_scale=1.0)
            order = 0 if a.stride(1) == 1 else 1  # the rule of csrc/lpips_distance.h
            work.layer = LayerView(tuple(a.shape), order, view(a), view(b), w.data_ptr())
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

    def distance(self, feats0, feats1, weights, eps=EPS) -> Tensor:
        out = self.empty((feats0[0].shape[0], len(feats0)), weights[0].dtype)
        self.run(AVERAGE, feats0[0].dtype, self.works(feats0, feats1, weights), eps, out)
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
                work.grad0 = view(grads0[-1])
            if need1:
                grads1.append(self.empty(f.shape, f.dtype, order))
                work.grad1 = view(grads1[-1])
            if need_weights:
                grads_weight.append(self.empty(w.shape, w.dtype))
                work.grad_weight = grads_weight[-1].data_ptr()
        self.run(BACKWARD, feats0[0].dtype, works, eps, None)
        return grads0, grads1, grads_weight

    def plan(self, operation: int, work: LayerWork, element_size: int) -> dict[str, int]:
        names = "vectors blocks threads lanes team_warps slabs tiles tile_positions workspace"
        facts = (ctypes.c_int64 * 9)()
        if self.library.plan_of_layer(
            element_size, operation, ctypes.byref(work), self.multiprocessors, facts
        ):
            raise ValueError(self.library.last_error().decode())
        return dict(zip(names.split(), facts))


def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h, in a toolkit or in NVIDIA's Python packages."""
    path = REPOSITORY / "scripts" / "check_cuda_compile.py"
    spec = importlib.util.spec_from_file_location("check_cuda_compile", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    home = module.cuda_home()
    return home / "include" if home is not None else None


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None:
        pytest.skip("the CUDA emulation needs g++, and there is none")
    if headers is None or not (headers / "cuda_fp16.h").exists():
        pytest.skip("the CUDA emulation needs the toolkit's cuda_fp16.h, and no toolkit is here")
    target = tmp_path_factory.mktemp("emulation") / "run_distance.so"
    source = REPOSITORY / "tests" / "emulation" / "run_distance.cpp"
    # No fortified longjmp: fibers are switched with it. No fused multiply-add: see unit_vectors.cuh.
    flags = "-O2 -std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-clobbered -fPIC -shared"
    command = [compiler, *flags.split(), "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
    command += ["-isystem", str(headers), str(source), "-o", str(target)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return Emulator(target)


@pytest.fixture
def emulator(library: Emulator) -> Iterator[Emulator]:
    library.multiprocessors, library.thread_order = 4, 0
    yield library
    library.release()


# ---------------------------------------------------------------------------- inputs, reference


def make_features(shape, dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features like a ReLU's, with zero vectors and positions where both images agree; a weight."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator).relu_()
    b = (a + 0.5 * torch.randn(shape, generator=generator)).relu_()
    n, _, h, w = shape
    kind = torch.randint(0, 12, (n, 1, h, w), generator=generator)
    a = torch.where(kind == 0, 0, a)
    b = torch.where((kind == 1) | ((kind == 0) & (torch.rand(kind.shape) < 0.5)), 0, b)
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


def maps(feats0, feats1, weights) -> list[Tensor]:
    return [composed.distance_map(a, b, w) for a, b, w in zip(feats0, feats1, weights)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of the reference; NaN if anything is."""
    error = (actual.double() - expected).norm()
    scale = expected.norm()
    return float(error / scale) if scale > 0 else float(error)


def without_zero_vectors(grad: Tensor, feat: Tensor) -> Tensor:
    # On a zero vector the gradient is t/eps, many orders beyond all others.
    return grad.double() * (feat.double().norm(dim=1, keepdim=True) > 0)


def check_all(emulator: Emulator, feats0, feats1, weights, seed: int) -> None:
    """Averages, maps, and the backward of both, against float64."""
    dtype = feats0[0].dtype
    error = DISTANCE_ERROR.get(dtype, 2e-6)
    exact = [[t.double() for t in group] for group in (feats0, feats1, weights)]

    distances = emulator.distance(feats0, feats1, weights)
    expected = averaged(*exact)
    magnitude = averaged(exact[0], exact[1], [w.abs() for w in exact[2]])
    assert bool(((distances - expected).abs() <= error * magnitude).all())

    results = emulator.distance_map(feats0, feats1, weights)
    magnitudes = maps(exact[0], exact[1], [w.abs() for w in exact[2]])
    for result, reference, magnitude in zip(results, maps(*exact), magnitudes):
        # An error of a unit vector's rounding, whatever the distance.
        bound = error * magnitude + error**2 + 4 * error * magnitude.sqrt()
        assert bool(((result - reference).abs() <= bound).all())

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
        for feats, got, wanted in zip((feats0, feats1), actual, expected_grads):
            for feat, x, y in zip(feats, got, wanted):
                assert x.stride(1) == (1 if feats0[0].stride(1) == 1 else x.stride(1))
                assert bool(x.isfinite().all())
                limit = 65504 if dtype == torch.float16 else float("inf")
                zero = (feat.double().norm(dim=1, keepdim=True) == 0).expand_as(x)
                assert relative_error(
                    x.double()[zero], y.clamp(-limit, limit)[zero]
                ) < max(GRADIENT_ERROR[dtype], 1e-5)
                assert relative_error(
                    without_zero_vectors(x, feat), without_zero_vectors(y, feat)
                ) < GRADIENT_ERROR[dtype]
        for x, y in zip(actual[2], expected_grads[2]):
            assert relative_error(x, y) < max(error, 1e-12) * 10


# -------------------------------------------------------------------------------------- widths


@pytest.mark.parametrize("order", ORDERS, ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", WIDTHS)
def test_every_width(emulator, dtype, order, channels):
    h, w = (5, 7) if channels <= 256 else (3, 3)
    shape = (2, channels, h, w)
    a, b, weight = make_features(shape, dtype, seed=channels)
    if channels == 1 and order == CHANNELS_LAST:  # torch calls (N, 1, H, W) both; strides decide
        order = CHANNELS_FIRST
    a, b = emulator.copy(a, order), emulator.copy(b, order, in_front=True)
    weight = emulator.copy(weight)
    check_all(emulator, [a], [b], [weight], seed=channels)
