"""Winograd's convolution, against the direct sum in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpips_fast.trunk import convolution
from lpips_fast.trunk.packing import packed_weight

OPS = torch.ops.lpips_fast
# Channels in and out: below, at and beyond a panel; then height and width: whole tiles, one beyond,
# less than one.
CHANNELS = [(64, 64), (33, 65), (1, 1), (5, 16), (130, 31)]
SIZES = [(8, 8), (9, 13), (1, 1), (3, 22), (4, 5)]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def convolve(
    x, weight, bias=None, relu=False, mask=None, add=None, stride=1, padding=None, precise=False
):
    packed = OPS.winograd_pack(convolution._block_weight(weight, stride))
    kernel = weight.shape[-1]
    padding = kernel // 2 if padding is None else padding
    return OPS.winograd_conv2d(
        x, packed, bias, relu, mask, len(weight), kernel, stride, padding, add, precise
    )


def assert_close(result, expected, x, weight):
    """To rounding, normwise: a small result beside large ones has the rounding of these."""
    scale = x.double().norm() * weight.double().norm() + expected.norm()
    assert result.shape == expected.shape
    assert (result.double() - expected).norm() < 2e-6 * scale


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
class TestAgainstFloat64:
    def test_sum(self, channels, size, kernel):
        x, weight = (
            channels_last(2, channels[0], *size),
            torch.randn(channels[1], channels[0], kernel, kernel),
        )
        expected = F.conv2d(x.double(), weight.double(), padding=kernel // 2)
        for precise in (False, True):
            y = convolve(x, weight, precise=precise)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert_close(y, expected, x, weight)

    def test_bias_addend_relu_and_mask(self, channels, size, kernel):
        x, weight = (
            channels_last(2, channels[0], *size),
            torch.randn(channels[1], channels[0], kernel, kernel),
        )
        bias = torch.randn(channels[1])
        add, mask = (channels_last(2, channels[1], *size) for _ in range(2))
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=kernel // 2)
        assert_close(convolve(x, weight, bias, True), expected.relu(), x, weight)
        # NCHW arguments are copied.
        expected = (expected + add) * (mask > 0)
        result = convolve(x.contiguous(), weight, bias, False, mask.contiguous(), add.contiguous())
        assert torch.equal(result == 0, mask <= 0)
        assert_close(result, expected, x, weight)


# Kernel, stride, padding: AlexNet's first layer, and what else becomes 3x3 or 5x5 blocks.
STRIDED = [(11, 4, 2), (12, 4, 0), (5, 2, 2), (6, 2, 3), (7, 3, 1), (9, 2, 4), (3, 1, 0), (5, 1, 4)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("geometry", STRIDED, ids=str)
@pytest.mark.parametrize("channels", [(3, 64), (1, 5), (20, 33)], ids=str)
@pytest.mark.parametrize("size", [(12, 12), (31, 45), (64, 18)], ids=str)
def test_strides_and_padding(geometry, channels, size):
    kernel, stride, padding = geometry
    x, weight = channels_last(2, channels[0], *size), torch.randn(*channels[::-1], kernel, kernel)
    bias = torch.randn(channels[1])
    y = convolve(x, weight, bias, relu=True, stride=stride, padding=padding)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected.relu(), x, weight)
    # Blocks are read where they lie, or else copied: some channels of an image, a crop of one.
    wide = channels_last(2, channels[0] + 2, size[0] + 1, size[1] + 3)
    part = wide[:, 1:-1, 1:, 2:-1]
    dense = part.contiguous(memory_format=torch.channels_last)
    arguments = {"bias": bias, "stride": stride, "padding": padding}
    assert torch.equal(convolve(part, weight, **arguments), convolve(dense, weight, **arguments))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_magnitudes(scale, kernel):
    x, weight = channels_last(1, 64, 9, 9) * scale, torch.randn(32, 64, kernel, kernel)
    expected = F.conv2d(x.double(), weight.double(), padding=kernel // 2)
    assert_close(convolve(x, weight), expected, x, weight)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", [(3, 1, 1), (5, 1, 2), (11, 4, 2)], ids=str)
@pytest.mark.parametrize("channels", [(3, 64), (33, 65), (16, 7)], ids=str)
def test_half_precision_is_only_read_and_written(dtype, geometry, channels):
    kernel, stride, padding = geometry
    x = channels_last(2, channels[0], 17, 22).to(dtype)
    weight, bias = torch.randn(*channels[::-1], kernel, kernel), torch.randn(channels[1])
    exact = convolve(x.float(), weight, bias, stride=stride, padding=padding)
    y = convolve(x, weight, bias, stride=stride, padding=padding)
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))
    add, mask = (channels_last(*y.shape).to(dtype) for _ in range(2))
    arguments = {"stride": stride, "padding": padding}
    exact = convolve(x.float(), weight, bias, True, mask.float(), add.float(), **arguments)
    y = convolve(x, weight, bias, True, mask, add, **arguments)
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("kernel", [3, 5])
def test_rounding_of_what_a_relu_leaves(kernel):
    # All of one sign, so that transforms cancel. What csrc/cpu/winograd_kernels.h says of it.
    x, weight = channels_last(1, 64, 31, 31).relu(), torch.randn(192, 64, kernel, kernel)
    expected = F.conv2d(x.double(), weight.double(), padding=kernel // 2)
    y = convolve(x, weight, precise=True)
    error = (y.double() - expected).norm() / expected.norm()
    assert error < {3: 8e-7, 5: 2.5e-6}[kernel]


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("channels, kernel", [(512, 3), (192, 5)])
def test_an_image_has_the_same_bits_in_any_batch(channels, kernel, precise):
    # Enough tiles for several blocks, and rows of products in every place of one.
    x, weight = channels_last(13, channels, 12, 11), torch.randn(96, channels, kernel, kernel)
    together = convolve(x, weight, precise=precise)
    for k in range(len(x)):
        assert torch.equal(convolve(x[k : k + 1], weight, precise=precise), together[k : k + 1])
    assert torch.equal(convolve(x.flip(0), weight, precise=precise), together.flip(0))


@pytest.mark.parametrize("precise", [False, True])
def test_a_shifted_image_gives_the_shifted_bits(precise):
    # Inside, by whole tiles: nothing depends on where a tile lies.
    x, weight = channels_last(1, 40, 24, 24), torch.randn(24, 40, 3, 3)
    shifted = convolve(torch.roll(x, (4, 8), (2, 3)), weight, precise=precise)
    assert torch.equal(
        shifted[:, :, 8:-4, 12:-4], convolve(x, weight, precise=precise)[:, :, 4:-8, 4:-12]
    )


@pytest.mark.parametrize("precise", [False, True])
def test_same_bits_with_any_number_of_threads(precise):
    x, weight = channels_last(3, 64, 30, 30), torch.randn(64, 64, 3, 3)
    expected = convolve(x, weight, precise=precise)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(convolve(x, weight, precise=precise), expected)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_do_not_get_lost():
    x, weight = channels_last(1, 32, 16, 16), torch.randn(32, 32, 3, 3)
    for value in (torch.nan, torch.inf):
        poisoned = x.clone()
        poisoned[0, 3, 5, 6] = value
        reached = convolve(poisoned, weight, relu=True)[0, :, 4:7, 5:8]
        assert not reached.isfinite().all()
        assert convolve(poisoned, weight, relu=True)[0, :, 12:, 12:].isfinite().all()


@pytest.mark.parametrize("geometry", [(3, 1, 1), (5, 1, 2), (11, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [3e3, -6e4, torch.inf, torch.nan])
class TestOutliers:
    """Numbers beyond a bound reach what the kernel takes them to, and nothing else."""

    def test_what_they_do_not_reach_is_as_without_them(self, geometry, dtype, value):
        kernel, stride, padding = geometry
        x = channels_last(2, 5, 37, 41).to(dtype)
        weight = torch.randn(33, 5, kernel, kernel)
        x[1, 2, 17, 22] = 0
        without = convolve(x, weight, stride=stride, padding=padding, precise=True)
        x[1, 2, 17, 22] = value
        y = convolve(x, weight, stride=stride, padding=padding, precise=True)
        impulse = torch.zeros(2, 1, 37, 41)
        impulse[1, 0, 17, 22] = 1
        reached = F.conv2d(impulse, torch.ones(1, 1, kernel, kernel), None, stride, padding) > 0
        untouched = ~reached.expand_as(y)
        assert torch.equal(y[untouched], without[untouched])
        expected = F.conv2d(x.double(), weight.double(), None, stride, padding)
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-2}
        if dtype == torch.float16:  # which ends at 65504
            expected = expected.to(dtype).double()
        touched = ~untouched
        if math.isfinite(value):
            torch.testing.assert_close(y[touched].double(), expected[touched], **tolerance)
        else:
            assert not y[touched].isfinite().any()
            assert torch.equal(y[touched].isnan(), expected[touched].isnan())


def test_outliers_are_looked_for_where_one_asks():
    # 32 channels are one chain, asked or not.
    x, weight = channels_last(1, 32, 16, 16), torch.randn(32, 32, 3, 3)
    assert torch.equal(convolve(x, weight, precise=True), convolve(x, weight))
    part = channels_last(1, 40, 18, 18)[:, 4:36, 1:-1, 1:-1]
    part[0, 5, 7, 8] = 1e9
    dense = part.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(part, weight, precise=True), convolve(dense, weight, precise=True))
    everywhere = 1e6 * x
    expected = F.conv2d(everywhere.double(), weight.double(), padding=1)
    assert_close(convolve(everywhere, weight, precise=True), expected, everywhere, weight)


def test_a_sum_of_features_is_one_of_short_chains():
    """512 channels as features are, none negative: rounding grows with a chain's length."""
    x, weight = channels_last(1, 512, 24, 24).relu(), torch.randn(32, 512, 3, 3)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    errors = [
        float((convolve(x, weight, precise=precise) - expected).norm() / expected.norm())
        for precise in (True, False)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_some_channels_of_an_image_are_read_where_they_lie():
    x, weight = channels_last(2, 96, 9, 10), torch.randn(40, 32, 3, 3)
    part = x[:, 32:64]
    expected = convolve(part.contiguous(memory_format=torch.channels_last), weight)
    assert torch.equal(convolve(part, weight), expected)
    crop = x[:, 32:64, 1:8, 2:9]
    dense = crop.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(crop, weight), convolve(dense, weight))


@pytest.mark.parametrize("precise", [False, True])
def test_both_divisions_of_the_work_give_the_same_bits(precise):
    # Few threads have enough tiles for blocks of their own; many share them.
    x, weight = channels_last(2, 64, 60, 60), torch.randn(64, 64, 3, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        apart = convolve(x, weight, precise=precise)
        torch.set_num_threads(64)
        assert torch.equal(convolve(x, weight, precise=precise), apart)
    finally:
        torch.set_num_threads(threads)


def test_empty_batch():
    assert convolve(channels_last(0, 32, 8, 8), torch.randn(16, 32, 3, 3)).shape == (0, 16, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: convolve(torch.randn(1, 8, 5, 5).double(), torch.randn(8, 8, 3, 3)), "float32"),
        (
            lambda: convolve(torch.randn(1, 7, 5, 5), torch.randn(8, 8, 3, 3)),
            "not packed for these channels",
        ),
        (lambda: OPS.winograd_pack(torch.randn(8, 8, 7, 7)), r"\(C_out, C_in, 3, 3\)"),
        (
            lambda: OPS.winograd_conv2d(
                torch.randn(1, 0, 9, 9), torch.randn(0), None, False, None, 0, 3, 1, 1
            ),
            "out_channels must be at least 1",
        ),
        (
            lambda: convolve(torch.randn(1, 8, 2, 9), torch.randn(8, 8, 5, 5), padding=1),
            "smaller than the kernel",
        ),
        (
            lambda: OPS.winograd_conv2d(
                torch.randn(1, 8, 9, 9), torch.randn(1), None, False, None, 8, 7, 1, 3
            ),
            "3 or 5 times the stride, rounded up, got 7",
        ),
        (
            lambda: convolve(torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3), torch.randn(7)),
            "bias of 8",
        ),
        (
            lambda: convolve(
                torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3), mask=torch.randn(1, 8, 5, 4)
            ),
            "mask must have the shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_fake_kernel():
    x, weight = channels_last(2, 8, 6, 5), OPS.winograd_pack(torch.randn(16, 8, 3, 3))
    torch.library.opcheck(
        OPS.winograd_conv2d.default,
        (x, weight, torch.randn(16), True, None, 16, 3, 1, 1, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def frozen(in_channels, out_channels, kernel, stride=1, padding=0) -> convolution.Convolution:
    conv = nn.Conv2d(in_channels, out_channels, kernel).requires_grad_(False)
    packed = packed_weight(conv.weight)
    return convolution.Convolution(conv.weight, conv.bias, stride, padding, packed)


class TestChoice:
    @pytest.mark.skipif(not convolution._WINOGRAD, reason="there are no wide vectors here")
    def test_where_it_is_taken(self):
        def takes(conv, channels=64, grid=(8, 8), dtype=torch.float32):
            return convolution.uses_winograd(conv, channels, torch.Size(grid), dtype)

        conv = frozen(64, 64, 3, padding=1)
        assert takes(conv)
        assert not takes(conv, grid=(8, 6))
        assert not takes(conv, channels=16)
        assert not takes(conv, dtype=torch.float64)
        for dtype in (torch.bfloat16, torch.float16):
            assert takes(conv, dtype=dtype) == (dtype in convolution._WINOGRAD_DTYPES)
            narrow = frozen(64, 48, 3, padding=1)
            assert takes(narrow)
            # Where there is no oneDNN for it, it is float32's choice.
            assert takes(narrow, dtype=dtype) == (dtype not in convolution.ONEDNN_DTYPES)
        for kernel, stride, taken in ((5, 1, True), (11, 4, True), (1, 1, False), (3, 2, False)):
            other = frozen(64, 64, kernel, stride)
            assert takes(other) == taken

    def test_a_unit_for_half_precision_goes_first(self, monkeypatch):
        for amx in (False, True):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
            assert (torch.bfloat16 in convolution._half_dtypes_without_amx()) == (not amx)

    def test_environment_turns_it_off(self):
        code = "from lpips_fast.trunk import convolution; print(convolution._WINOGRAD)"
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LPIPS_FAST_WINOGRAD": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == "False"


@pytest.mark.parametrize("size", [(33, 33), (37, 50)], ids=str)
@pytest.mark.parametrize("channels", [(64, 64), (3, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("geometry", [(3, 1, 1), (5, 1, 2), (11, 4, 2), (5, 2, 0)], ids=str)
def test_input_gradient(channels, size, geometry):
    kernel, stride, padding = geometry
    conv = frozen(*channels, kernel, stride, padding)
    x64 = channels_last(2, channels[0], *size).double().requires_grad_()
    y64 = F.conv2d(x64, conv.weight.double(), None, stride, padding)
    x, grad, add = x64.detach().float(), channels_last(*y64.shape), channels_last(*x64.shape)
    (expected,) = torch.autograd.grad(y64, x64, grad.double())
    flipped = conv.weight.flip(2, 3).transpose(0, 1)
    assert_close(convolution.input_gradient(conv, grad, x), expected, grad, flipped)
    masked = convolution.input_gradient(conv, grad, x, through_relu=True, add=add)
    assert_close(masked, (expected + add) * (x > 0), grad, flipped)
