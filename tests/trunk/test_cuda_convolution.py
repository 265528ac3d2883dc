"""Which convolution runs on CUDA, without a GPU: cuDNN's call and our kernel are played on the CPU.

What a GPU alone can show (that cuDNN has the engines, and speed) is in tests/kernels/test_cuda.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast import kernels
from lpips_fast.trunk import convolution, cuda_convolution
from lpips_fast.trunk.cuda_convolution import WITHOUT_ENGINE, conv_relu

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
    monkeypatch.setattr(cuda_convolution, "_is_served", lambda x: kernels.is_eager() and len(x) > 0)
    monkeypatch.setattr(convolution, "_cpu_dtype", lambda conv, x: None)
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


def frozen(**options) -> nn.Conv2d:
    conv = nn.Conv2d(**options).requires_grad_(False)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def image(conv: nn.Conv2d, shape=(2, 19, 23), dtype=torch.float32) -> Tensor:
    x = torch.randn(shape[0], conv.in_channels, *shape[1:], dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def takes(conv: nn.Conv2d, x: Tensor) -> bool:
    return conv_relu(conv, x) is not None


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("way", ["fused", "no engine", "keep_nan"])
def test_value_and_image_gradient(device, options, way):
    if way == "no engine":
        device.refusal = RuntimeError("GET was unable to find an engine")
    conv = frozen(**options)
    x = image(conv).requires_grad_()
    y = convolution.conv_relu(conv, x, keep_nan=way == "keep_nan")
    assert (device.fused, device.two_passes) == {
        "fused": (1, 0),
        "no engine": (1, 1),
        "keep_nan": (0, 1),
    }[way]
    x64 = x.detach().double().requires_grad_()
    y64 = copy.deepcopy(conv).double()(x64)
    assert error(y, y64.relu()) < 1e-6
    with torch.no_grad():
        assert torch.equal(convolution.conv_relu(conv, x, keep_nan=way == "keep_nan"), y)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    # Through our own mask: a value within rounding of 0 may fall on either side.
    (expected,) = torch.autograd.grad(y64, x64, grad.double() * (y > 0))
    assert error(got, expected) < 1e-5


@pytest.mark.parametrize("way", ["fused", "no engine"])
def test_second_derivative(device, way):
    if way == "no engine":
        device.refusal = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
    conv = frozen(in_channels=3, out_channels=4, kernel_size=3, padding=1)
    x = image(conv, (1, 6, 6)).requires_grad_()
    results = []
    for function in (conv_relu, lambda conv, x: conv(x).relu()):
        (grad,) = torch.autograd.grad(function(conv, x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class TestWithoutAnEngine:
    def test_it_is_asked_once_for_a_layer(self, device):
        device.refusal = RuntimeError("GET was unable to find an engine")
        first = frozen(in_channels=8, out_channels=4, kernel_size=3)
        second = frozen(in_channels=8, out_channels=4, kernel_size=3, stride=2)
        for _ in range(3):
            for size in ((1, 9, 9), (2, 12, 7)):
                x = image(first, size)
                torch.testing.assert_close(conv_relu(first, x), first(x).relu())
        assert (device.fused, device.two_passes) == (1, 6)
        conv_relu(second, image(second))
        assert (device.fused, device.two_passes) == (2, 7)
        conv_relu(first.bfloat16(), image(first, dtype=torch.bfloat16))
        assert (device.fused, device.two_passes) == (3, 8)
        device.refusal = None
        conv_relu(first, image(first, dtype=torch.bfloat16))
        assert (device.fused, device.two_passes) == (3, 9)

    def test_tf32_is_asked_for_apart(self, device):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        device.refusal = RuntimeError("GET was unable to find an engine")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            conv_relu(conv, image(conv))
        device.refusal = None
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            conv_relu(conv, image(conv))
        assert (device.fused, device.two_passes) == (2, 1)

    def test_short_memory_is_no_missing_engine(self, device):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        device.refusal = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError):
            conv_relu(conv, image(conv))
        assert not WITHOUT_ENGINE and device.two_passes == 0

    def test_wrong_arguments_are_no_missing_engine(self, device):
        conv = frozen(in_channels=8, out_channels=4, kernel_size=3)
        device.refusal = RuntimeError("cuDNN error")
        with pytest.raises(RuntimeError, match=r"expected input.* to have 8 channels"):
            conv_relu(conv, torch.randn(1, 5, 9, 9))
        assert not WITHOUT_ENGINE


class TestWhereFusingIsNotWanted:
    def way(self, device, conv) -> str:
        device.fused = device.two_passes = 0
        conv_relu(conv, image(conv))
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
            assert cuda_convolution._cudnn_may_fuse(conv, x) is fits

    def test_nan_comes_through(self, device):
        conv = frozen(in_channels=3, out_channels=8, kernel_size=3)
        x = image(conv)
        x[0, 1, 4, 4] = torch.nan
        assert conv_relu(conv, x, keep_nan=True).isnan().any()
        assert not conv_relu(conv, x).isnan().any()  # as this cuDNN has it

    def test_results_of_another_order(self, device, monkeypatch):
        """torch's convolution without cuDNN returns NCHW, which our kernel does not take."""
        conv = frozen(in_channels=3, out_channels=8, kernel_size=3)
        plain = torch.conv2d
        monkeypatch.setattr(
            "torch.nn.functional.conv2d", lambda *arguments: plain(*arguments).contiguous()
        )
        x = image(conv)
        torch.testing.assert_close(conv_relu(conv, x, keep_nan=True), conv(x).relu())
        assert device.two_passes == 0


class TestDtypes:
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast(self, device, weights):
        conv = frozen(in_channels=16, out_channels=32, kernel_size=3, padding=1).to(weights)
        x = image(conv).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = conv(x).relu()
            y = convolution.conv_relu(conv, x)
            assert y.dtype == expected.dtype == torch.bfloat16
        assert device.fused == 1
        (grad,) = torch.autograd.grad(y.float().sum(), x)
        (expected_grad,) = torch.autograd.grad(expected.float().sum(), x)
        assert grad.dtype == torch.float32
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, expected_grad, rtol=0.02, atol=0.02)

    def test_what_is_left_to_torch(self, device):
        conv = frozen(in_channels=3, out_channels=8, kernel_size=3)
        assert takes(conv, image(conv))
        for x in (
            image(conv, dtype=torch.float64),
            image(conv, dtype=torch.bfloat16),  # beside float32 weights: torch's own error
            torch.zeros(0, 3, 9, 9),
        ):
            assert not takes(conv, x)
        assert not takes(conv.double(), image(conv, dtype=torch.float64))
        with torch.autocast("cpu", dtype=torch.bfloat16):  # leaves float64 alone
            assert not takes(conv, image(conv, dtype=torch.float32))

    def test_learning_weights_are_torchs(self, device):
        conv = nn.Conv2d(3, 8, 3)
        x = image(conv)
        assert not takes(conv, x)
        with torch.no_grad():
            assert takes(conv, x)
            assert not conv_relu(conv, x).requires_grad
        conv.weight.requires_grad_(False)
        assert not takes(conv, x)  # a bias that learns
        y = convolution.conv_relu(conv, x)
        y.sum().backward()
        assert conv.bias is not None and conv.bias.grad is not None

    def test_transforms_are_torchs(self, device):
        conv = frozen(in_channels=3, out_channels=4, kernel_size=3)
        grad = torch.func.grad(lambda x: convolution.conv_relu(conv, x).sum())(image(conv))
        assert grad.abs().max() > 0 and device.fused == 0


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("engine", [True, False])
def test_whole_model(device, net, engine, monkeypatch):
    """Value and gradient as by torch's own operators."""
    if not engine:
        device.refusal = RuntimeError("GET was unable to find an engine")
    model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
    outcomes = []
    for served in (True, False):
        monkeypatch.setattr(cuda_convolution, "_is_served", lambda x, served=served: served)
        in0, in1 = image_pair(2, 67, 83, torch.float32, seed=0)
        in0.requires_grad_()
        value = model(in0, in1)
        (grad,) = torch.autograd.grad(value.sum(), in0)
        outcomes.append((value, grad))
        if served:
            assert device.fused > 0 and device.two_passes > 0
    (value, grad), (expected, expected_grad) = outcomes
    assert error(value, expected.double()) < 1e-5
    assert error(grad, expected_grad.double()) < 1e-4


class TestSwitch:
    def test_off_in_the_environment(self, run_python):
        code = """
            import torch
            from lpips_fast import ops
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
        monkeypatch.setattr(kernels, "LOADED_LIBRARIES", ["_cpu_default"])
        assert not kernels.has_trunk_kernels(torch.device("cuda"))
        assert not kernels.has_kernel(torch.device("cuda"))
