"""Which convolution runs on CUDA, without a GPU: cuDNN's call and our kernel are played on the CPU.

What a GPU alone can show (that cuDNN has the engines, and speed) is in tests/kernels/test_cuda.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast import kernels
from lpips_fast.trunk import cuda_convolution, fire, slices
from lpips_fast.trunk.convolution import Convolution
from lpips_fast.trunk.cuda_convolution import WITHOUT_ENGINE, convolve, input_gradient
from lpips_fast.trunk.legality import device_fault

CONVOLUTIONS = [
    {"in_channels": 3, "out_channels": 64, "kernel_size": 11, "stride": 4, "padding": 2},
    {"in_channels": 3, "out_channels": 16, "kernel_size": 3, "stride": 2},
    {"in_channels": 33, "out_channels": 65, "kernel_size": 3, "padding": 1},
    {"in_channels": 64, "out_channels": 16, "kernel_size": 1},
]


class Device:
    """Plays cuDNN and our kernel: counts their calls, and refuses what it is told to."""

    def __init__(self) -> None:
        self.fused = self.two_passes = 0
        self.refusal: Exception | None = None

    def cudnn_convolution_relu(self, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        self.fused += 1
        if self.refusal is not None:
            raise self.refusal
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return torch.where(y > 0, y, torch.zeros_like(y))  # NaN is lost

    def bias_relu_(self, y: Tensor, bias: Tensor) -> None:
        assert y.is_contiguous(memory_format=torch.channels_last)
        self.two_passes += 1
        y.add_(bias.view(1, -1, 1, 1)).relu_()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    played = Device()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    WITHOUT_ENGINE.clear()
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library("lpips_fast", "IMPL") as ours,
    ):
        aten.impl("cudnn_convolution_relu", played.cudnn_convolution_relu, "CPU")
        ours.impl("bias_relu_", played.bias_relu_, "CPU")
        yield played
    WITHOUT_ENGINE.clear()


@pytest.fixture
def played_trunk(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Has slices that run by hand take the way of CUDA."""
    of_cuda = slices._convolutions

    def convolutions(layers, parameters, x):
        return of_cuda(layers, parameters, SimpleNamespace(is_cuda=True, dtype=x.dtype))

    monkeypatch.setattr(slices, "_convolutions", convolutions)
    monkeypatch.setattr(slices, "_backend", lambda x: cuda_convolution)
    monkeypatch.setattr(fire, "has_border", lambda x: False)
    return device


def frozen(**options) -> nn.Conv2d:
    return nn.Conv2d(**options).requires_grad_(False)


def of(conv: nn.Conv2d) -> Convolution:
    """As a slice hands it on: weights channels-last, nothing packed."""
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    return Convolution(weight, conv.bias, conv.stride[0], conv.padding[0], None)


def image(conv: nn.Conv2d, shape=(2, 19, 23), dtype=torch.float32) -> Tensor:
    x = torch.randn(shape[0], conv.in_channels, *shape[1:], dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("way", ["fused", "no engine", "keep_nan"])
def test_value(device, options, way):
    if way == "no engine":
        device.refusal = RuntimeError("GET was unable to find an engine")
    conv = frozen(**options)
    x = image(conv)
    y = convolve(of(conv), x, keep_nan=way == "keep_nan")
    assert (device.fused, device.two_passes) == {
        "fused": (1, 0),
        "no engine": (1, 1),
        "keep_nan": (0, 1),
    }[way]
    assert error(y, copy.deepcopy(conv).double()(x.double()).relu()) < 1e-6
    assert torch.equal(convolve(of(conv), x, keep_nan=way == "keep_nan"), y)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("through_relu", [False, True])
@pytest.mark.parametrize("has_addend", [False, True])
def test_image_gradient(options, through_relu, has_addend):
    conv = frozen(**options)
    x = image(conv).relu()
    x64 = x.double().requires_grad_()
    y64 = copy.deepcopy(conv).double()(x64)
    grad = torch.randn_like(y64, dtype=torch.float32)
    add = torch.randn_like(x) if has_addend else None
    (expected,) = torch.autograd.grad(y64, x64, grad.double())
    if add is not None:
        expected = expected + add.double()
    if through_relu:
        expected = expected * (x > 0)
    assert error(input_gradient(of(conv), grad, x, through_relu, add), expected) < 1e-5


class TestWithoutAnEngine:
    def test_it_is_asked_once_for_a_layer(self, device):
        device.refusal = RuntimeError("GET was unable to find an engine")
        first = frozen(in_channels=8, out_channels=4, kernel_size=3)
        second = frozen(in_channels=8, out_channels=4, kernel_size=3, stride=2)
        for _ in range(3):
            for size in ((1, 9, 9), (2, 12, 7)):
                x = image(first, size)
                torch.testing.assert_close(convolve(of(first), x), first(x).relu())
        assert (device.fused, device.two_passes) == (1, 6)
        convolve(of(second), image(second))
        assert (device.fused, device.two_passes) == (2, 7)
        convolve(of(first.bfloat16()), image(first, dtype=torch.bfloat16))
        assert (device.fused, device.two_passes) == (3, 8)
        device.refusal = None
        convolve(of(first), image(first, dtype=torch.bfloat16))
        assert (device.fused, device.two_passes) == (3, 9)

    def test_tf32_is_asked_for_apart(self, device):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        device.refusal = RuntimeError("GET was unable to find an engine")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            convolve(of(conv), image(conv))
        device.refusal = None
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            convolve(of(conv), image(conv))
        assert (device.fused, device.two_passes) == (2, 1)

    def test_short_memory_is_no_missing_engine(self, device):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        device.refusal = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError):
            convolve(of(conv), image(conv))
        assert not WITHOUT_ENGINE and device.two_passes == 0

    def test_wrong_arguments_are_no_missing_engine(self, device):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        device.refusal = RuntimeError("cuDNN error")
        with pytest.raises(RuntimeError, match=r"expected input.* to have 8 channels"):
            convolve(of(conv), torch.randn(1, 5, 9, 9))
        assert not WITHOUT_ENGINE


class TestWhereFusingIsNotWanted:
    def way(self, device, conv) -> str:
        device.fused = device.two_passes = 0
        convolve(of(conv), image(conv))
        return {(1, 0): "fused", (0, 1): "two passes"}[device.fused, device.two_passes]

    def test_deterministic_algorithms(self, device, poisoned):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        assert self.way(device, conv) == "two passes"
        torch.use_deterministic_algorithms(False)
        assert self.way(device, conv) == "fused"
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            assert self.way(device, conv) == "two passes"

    def test_cudnn_disabled_or_absent(self, device, monkeypatch):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        with torch.backends.cudnn.flags(enabled=False):
            assert self.way(device, conv) == "two passes"
        assert self.way(device, conv) == "fused"
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
        assert self.way(device, conv) == "two passes"

    def test_more_elements_than_32_bits_count(self, device):
        conv = frozen(in_channels=3, out_channels=64, kernel_size=3, padding=1)
        for side, fits in ((1024, True), (8192, False)):  # 64 * 8192^2 = 2^32
            x = torch.empty(1, 3, side, side, device="meta")
            assert cuda_convolution._cudnn_may_fuse(of(conv), x) is fits

    def test_nan_comes_through(self, device):
        conv = frozen(in_channels=3, out_channels=8, kernel_size=3)
        x = image(conv)
        x[0, 1, 4, 4] = torch.nan
        assert convolve(of(conv), x, keep_nan=True).isnan().any()
        assert not convolve(of(conv), x).isnan().any()  # as this cuDNN has it

    def test_results_of_another_order(self, device, monkeypatch):
        """torch's convolution without cuDNN returns NCHW, which our kernel does not take."""
        conv = frozen(in_channels=3, out_channels=8, kernel_size=3)
        plain = torch.conv2d
        monkeypatch.setattr(
            "torch.nn.functional.conv2d", lambda *arguments: plain(*arguments).contiguous()
        )
        x = image(conv)
        torch.testing.assert_close(convolve(of(conv), x, keep_nan=True), conv(x).relu())
        assert device.two_passes == 0


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_weights_come_in_the_images_dtype_and_channels_last(self, dtype):
        """Autocast leaves the weights as they are, and cuDNN wants one dtype."""
        layers = slices.slice_layers("squeeze", 2)
        weights = [p for k, p in trunk_weights("squeeze").items() if k.startswith("features.3.")]
        x = SimpleNamespace(is_cuda=True, dtype=dtype)
        pool, convolutions, *_ = slices._convolutions(layers, weights * 2, x)
        assert pool == [] and [conv.padding for conv in convolutions] == [0, 0, 1]
        for conv, weight, bias in zip(convolutions, weights[::2], weights[1::2]):
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(conv.weight, weight.to(dtype))
            assert torch.equal(conv.bias, bias.to(dtype))

    def test_what_is_left_to_torch(self, monkeypatch):
        monkeypatch.setattr(kernels.dispatch, "LOADED_LIBRARIES", ["_cpu_default", "_cuda"])
        cuda = torch.device("cuda")
        for dtype in cuda_convolution.DTYPES:
            assert device_fault(cuda, dtype) is None
        assert "torch.float64 on CUDA" in str(device_fault(cuda, torch.float64))


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("engine", [True, False])
def test_whole_model(played_trunk, net, engine):
    """Value and gradient as by torch's own operators."""
    if not engine:
        played_trunk.refusal = RuntimeError("GET was unable to find an engine")
    model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
    by_modules = copy.deepcopy(model)
    for block in by_modules.net.slices():
        block.register_forward_hook(lambda *_: None)
    outcomes = []
    for each in (model, by_modules):
        played_trunk.fused = played_trunk.two_passes = 0
        in0, in1 = image_pair(2, 67, 83, torch.float32, seed=0)
        in0.requires_grad_()
        value = each(in0, in1)
        (grad,) = torch.autograd.grad(value.sum(), in0)
        outcomes.append((value, grad))
        by_hand = each is model
        assert (played_trunk.fused > 0 and played_trunk.two_passes > 0) is by_hand
    (value, grad), (expected, expected_grad) = outcomes
    assert error(value, expected.double()) < 1e-5
    assert error(grad, expected_grad.double()) < 1e-4


class TestSwitch:
    def test_off_in_the_environment(self, run_python):
        code = """
            import torch
            from lpips_fast import kernels
            kernels.LOADED_LIBRARIES.append("_cuda")
            print(*(kernels.has_trunk_kernels(torch.device(d)) for d in ("cpu", "cuda", "meta")))
            print(kernels.has_kernel(torch.device("cuda")))
        """
        assert run_python(code, LPIPS_FAST_CUDA_TRUNK="0").split() == [
            *("True", "False", "False", "True")
        ]
        assert run_python(code, LPIPS_FAST_CUDA_TRUNK="1").split() == [
            *("True", "True", "False", "True")
        ]

    def test_without_our_library_all_is_torchs(self, monkeypatch):
        monkeypatch.setattr(kernels.dispatch, "LOADED_LIBRARIES", ["_cpu_default"])
        assert not kernels.has_trunk_kernels(torch.device("cuda"))
        assert not kernels.has_kernel(torch.device("cuda"))
