"""Convolution, bias and ReLU in one call, and the gradient to the images, against float64."""

from __future__ import annotations

import pytest
import torch
from served import HALF_DTYPES, needs
from torch import Tensor, nn

from lpips_fast.trunk.convolution import Convolution, convolve, input_gradient
from lpips_fast.trunk.packing import packed_weight

CONVOLUTIONS = [
    {"in_channels": 3, "out_channels": 64, "kernel_size": 11, "stride": 4, "padding": 2},
    {"in_channels": 3, "out_channels": 64, "kernel_size": 3, "stride": 2},
    {"in_channels": 64, "out_channels": 48, "kernel_size": 5, "padding": 2},
    {"in_channels": 33, "out_channels": 65, "kernel_size": 3, "padding": 1},
    {"in_channels": 64, "out_channels": 16, "kernel_size": 1},
]
SHAPES = [(1, 19, 23), (2, 40, 31), (1, 12, 12)]


def frozen(*arguments, **options) -> nn.Conv2d:
    return nn.Conv2d(*arguments, **options).requires_grad_(False)


def packed(conv: nn.Conv2d) -> Convolution:
    """As a slice hands it on."""
    stride, padding = conv.stride[0], conv.padding[0]
    return Convolution(conv.weight, conv.bias, stride, padding, packed_weight(conv.weight))


def image(conv: nn.Conv2d, shape, dtype=torch.float32) -> Tensor:
    x = torch.randn(shape[0], conv.in_channels, *shape[1:], dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def exactly(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution in float64, before its ReLU."""
    options = {"stride": conv.stride, "padding": conv.padding}
    return torch.conv2d(x.double(), conv.weight.double(), conv.bias.double(), **options)


def error(result, expected):
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstFloat64:
    @pytest.mark.parametrize("keep_nan", [False, True])
    def test_value(self, options, shape, keep_nan):
        conv = frozen(**options)
        x = image(conv, shape)
        y = convolve(packed(conv), x, keep_nan)
        # Winograd's 5x5 rounds five times as much: csrc/cpu/winograd_kernels.h.
        assert error(y, exactly(conv, x).relu()) < (6e-6 if conv.kernel_size == (5, 5) else 1.5e-6)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(convolve(packed(conv), x, keep_nan), y)

    @pytest.mark.parametrize("through_relu", [False, True])
    @pytest.mark.parametrize("has_addend", [False, True])
    def test_image_gradient(self, options, shape, through_relu, has_addend):
        conv = frozen(**options)
        x = image(conv, shape).relu()
        x64 = x.double().requires_grad_()
        y64 = exactly(conv, x64)
        grad = torch.randn_like(y64, dtype=torch.float32)
        grad = grad.contiguous(memory_format=torch.channels_last)
        add = torch.randn_like(x) if has_addend else None
        (expected,) = torch.autograd.grad(y64, x64, grad.double())
        if add is not None:
            expected = expected + add.double()
        if through_relu:
            expected = expected * (x > 0)
        # The addend may be given up: it is summed into.
        got = input_gradient(packed(conv), grad, x, through_relu, add)
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("channels", [(64, 32), (8, 8), (3, 64)], ids=str)
def test_half_precision(dtype, channels):
    conv = frozen(*channels, 3, padding=1)
    x = image(conv, (2, 15, 17))
    expected = exactly(conv, x).relu()
    assert error(convolve(packed(conv.to(dtype)), x.to(dtype)), expected) < 0.01


@needs(torch.bfloat16)
def test_images_of_lower_precision_than_the_weights():
    """As under autocast: both dtypes of a weight are packed side by side."""
    conv = frozen(64, 32, 3, padding=1)
    x = image(conv, (2, 15, 17))
    expected = exactly(conv, x).relu()
    for dtype, bound in ((torch.bfloat16, 0.01), (torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        y = convolve(packed(conv), x.to(dtype))
        assert y.dtype == dtype and error(y, expected) < bound


@pytest.mark.parametrize("channels", [(3, 8), (3, 64), (64, 64)], ids=str)
def test_nan_passes_where_it_must(channels):
    conv = frozen(*channels, 3)
    x = image(conv, (1, 9, 9))
    x[0, 1, 4, 4] = torch.nan
    assert convolve(packed(conv), x, keep_nan=True).isnan().any()
