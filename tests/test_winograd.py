"""Winograd's convolution, against the direct sum in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpips_fast import convolution

OPS = torch.ops.lpips_fast
# Channels in and out: below, at and beyond a panel; then height and width: whole tiles, one beyond,
# less than one.
CHANNELS = [(64, 64), (33, 65), (1, 1), (5, 16), (130, 31)]
SIZES = [(8, 8), (9, 13), (1, 1), (3, 22), (4, 5)]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def convolve(x, weight, bias=None, relu=False, mask=None, add=None):
    packed = OPS.winograd_pack(weight)
    return OPS.winograd_conv2d(x, packed, bias, relu, mask, len(weight), weight.shape[-1], add)


def assert_close(result, expected, x, weight):
    """To rounding, normwise: a small result beside large ones has the rounding of these."""
    scale = x.double().norm() * weight.double().norm() + expected.norm()
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
        y = convolve(x, weight)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(
            y, F.conv2d(x.double(), weight.double(), padding=weight.shape[-1] // 2), x, weight
        )

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


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_magnitudes(scale):
    x, weight = channels_last(1, 64, 9, 9) * scale, torch.randn(32, 64, 3, 3)
    assert_close(
        convolve(x, weight),
        F.conv2d(x.double(), weight.double(), padding=weight.shape[-1] // 2),
        x,
        weight,
    )


def test_an_image_has_the_same_bits_in_any_batch():
    # Enough tiles for several blocks, and rows of products in every place of one.
    x, weight = channels_last(13, 512, 12, 11), torch.randn(96, 512, 3, 3)
    together = convolve(x, weight)
    for k in range(len(x)):
        assert torch.equal(convolve(x[k : k + 1], weight), together[k : k + 1])
    assert torch.equal(convolve(x.flip(0), weight), together.flip(0))


def test_a_shifted_image_gives_the_shifted_bits():
    # Inside, by whole tiles: nothing depends on where a tile lies.
    x, weight = channels_last(1, 40, 24, 24), torch.randn(24, 40, 3, 3)
    shifted = convolve(torch.roll(x, (4, 8), (2, 3)), weight)
    assert torch.equal(shifted[:, :, 8:-4, 12:-4], convolve(x, weight)[:, :, 4:-8, 4:-12])


def test_same_bits_with_any_number_of_threads():
    x, weight = channels_last(3, 64, 30, 30), torch.randn(64, 64, 3, 3)
    expected = convolve(x, weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(convolve(x, weight), expected)
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


def test_some_channels_of_an_image_are_read_where_they_lie():
    x, weight = channels_last(2, 96, 9, 10), torch.randn(40, 32, 3, 3)
    part = x[:, 32:64]
    expected = convolve(part.contiguous(memory_format=torch.channels_last), weight)
    assert torch.equal(convolve(part, weight), expected)
    crop = x[:, 32:64, 1:8, 2:9]
    dense = crop.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(crop, weight), convolve(dense, weight))


def test_empty_batch():
    assert convolve(channels_last(0, 32, 8, 8), torch.randn(16, 32, 3, 3)).shape == (0, 16, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: convolve(torch.randn(1, 8, 5, 5).double(), torch.randn(8, 8, 3, 3)), "float32"),
        (lambda: convolve(torch.randn(1, 7, 5, 5), torch.randn(8, 8, 3, 3)), "not packed for 7"),
        (lambda: OPS.winograd_pack(torch.randn(8, 8, 7, 7)), r"\(C_out, C_in, 3, 3\)"),
        (
            lambda: convolve(torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3), torch.randn(7)),
            "bias of 8",
        ),
        (
            lambda: convolve(
                torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3), mask=torch.randn(1, 8, 5, 4)
            ),
            "mask and add",
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
        (x, weight, torch.randn(16), True, None, 16, 3, None),
        test_utils=("test_schema", "test_faketensor"),
    )


class TestChoice:
    @pytest.mark.skipif(not convolution._WINOGRAD, reason="there are no wide vectors here")
    def test_where_it_is_taken(self):
        conv = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
        assert convolution._uses_winograd(conv, channels_last(1, 64, 8, 8))
        assert not convolution._uses_winograd(conv, channels_last(1, 64, 7, 7))
        assert not convolution._uses_winograd(conv, channels_last(1, 64, 8, 8).bfloat16())
        learning = nn.Conv2d(64, 64, 3, padding=1)
        assert not convolution._uses_winograd(learning, channels_last(1, 64, 8, 8))
        assert convolution._uses_winograd(
            nn.Conv2d(64, 64, 5, padding=2).requires_grad_(False), channels_last(1, 64, 8, 8)
        )
        for other in (nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 64, 5, 1, 1)):
            other.requires_grad_(False)
            assert not convolution._uses_winograd(other, channels_last(1, 64, 8, 8))

    def test_environment_turns_it_off(self):
        code = "from lpips_fast import convolution; print(convolution._WINOGRAD)"
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LPIPS_FAST_WINOGRAD": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == "False"


@pytest.mark.parametrize("size", [(8, 8), (17, 12)], ids=str)
@pytest.mark.parametrize("channels", [(64, 64), (64, 32), (48, 80)], ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
def test_input_gradient(channels, size, kernel):
    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2).requires_grad_(False)
    x, grad = channels_last(2, channels[0], *size), channels_last(2, channels[1], *size)
    add = channels_last(2, channels[0], *size)
    x64 = x.double().requires_grad_()
    y64 = F.conv2d(x64, conv.weight.double(), padding=kernel // 2)
    (expected,) = torch.autograd.grad(y64, x64, grad.double())
    flipped = conv.weight.flip(2, 3).transpose(0, 1)
    assert_close(convolution.input_gradient(conv, grad, x), expected, grad, flipped)
    masked = convolution.input_gradient(conv, grad, x, through_relu=True, add=add)
    assert_close(masked, (expected + add) * (x > 0), grad, flipped)
