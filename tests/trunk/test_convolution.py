"""Convolution, bias and ReLU in one call, against torch's three."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lpips_fast.trunk.convolution import _PACKED, conv_relu, input_gradient

CONVOLUTIONS = [
    {"in_channels": 3, "out_channels": 64, "kernel_size": 11, "stride": 4, "padding": 2},
    {"in_channels": 3, "out_channels": 64, "kernel_size": 3, "stride": 2},
    {"in_channels": 64, "out_channels": 48, "kernel_size": 5, "padding": 2},
    {"in_channels": 33, "out_channels": 65, "kernel_size": 3, "padding": 1},
    {"in_channels": 64, "out_channels": 16, "kernel_size": 1},
]
SHAPES = [(1, 19, 23), (2, 40, 31), (1, 12, 12)]


def image(conv: nn.Conv2d, shape, dtype=torch.float32):
    x = torch.randn(shape[0], conv.in_channels, *shape[1:], dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def error(result, expected):
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep_nan", [False, True])
class TestAgainstFloat64:
    def test_value_and_image_gradient(self, options, shape, keep_nan):
        conv = nn.Conv2d(**options).requires_grad_(False)
        x = image(conv, shape).requires_grad_()
        y = conv_relu(conv, x, keep_nan)
        x64 = x.detach().double().requires_grad_()
        y64 = copy.deepcopy(conv).double()(x64)
        # Winograd's 5x5 rounds five times as much: csrc/cpu/winograd_kernels.h.
        assert error(y, y64.relu()) < (6e-6 if conv.kernel_size == (5, 5) else 1.5e-6)
        with torch.no_grad():
            assert torch.equal(conv_relu(conv, x, keep_nan), y)
        grad = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, x, grad)
        # Through our own mask: a value within rounding of 0 may fall on either side.
        (expected,) = torch.autograd.grad(y64, x64, grad.double() * (y > 0))
        assert error(got, expected) < 1e-5

    def test_weights_that_learn(self, options, shape, keep_nan):
        conv = nn.Conv2d(**options)
        x = image(conv, shape)
        y = conv_relu(conv, x, keep_nan)
        reference = copy.deepcopy(conv).double()
        y64 = reference(x.double())
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, conv.parameters(), grad)
        expected = torch.autograd.grad(y64, reference.parameters(), grad.double() * (y > 0))
        assert all(error(g, e) < 1e-5 for g, e in zip(got, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    conv = nn.Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    x = image(conv, (2, 15, 17))
    expected = conv.double()(x.double()).relu()
    assert error(conv_relu(conv.to(dtype), x.to(dtype)), expected) < 0.01


def test_autocast():
    conv = nn.Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    x = image(conv, (2, 15, 17)).requires_grad_()
    expected = conv(x).relu().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_relu(conv, x)
        assert y.dtype == conv(x).dtype == torch.bfloat16
    assert error(y, expected.double()) < 0.01
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_second_derivative():
    conv = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    x = image(conv, (1, 6, 6)).requires_grad_()
    results = []
    for function in (conv_relu, lambda conv, x: conv(x).relu()):
        (grad,) = torch.autograd.grad(function(conv, x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_nan_passes_where_it_must():
    conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
    x = image(conv, (1, 9, 9))
    x[0, 1, 4, 4] = torch.nan
    assert conv_relu(conv, x, keep_nan=True).isnan().any()


# By oneDNN, by Winograd's algorithm, and directly.
@pytest.mark.parametrize("channels", [(8, 8), (64, 64), (3, 64)], ids=str)
def test_packed_weights_follow_the_weights(channels):
    conv = nn.Conv2d(*channels, 3).requires_grad_(False)
    x = image(conv, (1, 9, 9))

    def check():
        expected = conv.double()(x.double())
        conv.float()
        assert error(conv_relu(conv, x), expected.relu()) < 1e-5
        grad = torch.randn_like(expected, dtype=torch.float32)
        grad = grad.contiguous(memory_format=torch.channels_last)
        x64 = x.double().requires_grad_()
        conv.double()
        (expected,) = torch.autograd.grad(conv(x64), x64, grad.double())
        conv.float()
        assert error(input_gradient(conv, grad, x), expected) < 1e-5

    check()
    assert conv in _PACKED
    conv.weight.mul_(2)  # written to
    check()
    conv.weight.data = torch.randn_like(conv.weight)  # replaced
    check()
    for _ in range(4):  # replaced when the old one is gone, whose memory is taken again
        new = torch.randn(conv.weight.shape)
        del conv.weight
        conv.weight = nn.Parameter(new, requires_grad=False)
        check_value(conv, x)
        conv.weight.data = torch.empty(0)
        conv.weight.data = torch.randn(new.shape)
        check_value(conv, x)
    conv.load_state_dict(nn.Conv2d(*channels, 3).state_dict())
    check()
    x = x.bfloat16()
    conv.bfloat16()  # converted
    torch.testing.assert_close(conv_relu(conv, x), conv(x).relu(), rtol=0.02, atol=0.02)
    conv.float()
    x = x.float()
    check()


def check_value(conv, x):
    assert error(conv_relu(conv, x), conv(x).relu()) < 1e-5


def test_both_dtypes_stay_packed():
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    x = image(conv, (1, 9, 9))
    for _ in range(2):
        conv_relu(conv, x)
        with torch.autocast("cpu"):
            conv_relu(conv, x)
    assert {dtype for _, dtype in _PACKED[conv]} == {torch.float32, torch.bfloat16}


def test_packed_weights_are_no_part_of_the_module():
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    x = image(conv, (1, 9, 9))
    y = conv_relu(conv, x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(conv_relu(other, x), y)
    before = len(_PACKED)
    del conv, other
    assert len(_PACKED) < before


def test_empty_batch():
    conv = nn.Conv2d(8, 4, 3)
    assert conv_relu(conv, torch.zeros(0, 8, 9, 9)).shape == (0, 4, 7, 7)


def test_functional_transforms_take_torchs_own_path():
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = image(conv, (1, 6, 6))
    grad = torch.func.grad(lambda x: conv_relu(conv, x).sum())(x)
    y = x.clone().requires_grad_()
    conv_relu(conv, y).sum().backward()
    torch.testing.assert_close(grad, y.grad)
