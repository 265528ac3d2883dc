"""The direct convolution, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpips_fast import kernels
from lpips_fast.trunk import convolution
from lpips_fast.trunk.packing import packed_weight

OPS = torch.ops.lpips_fast
# Kernel, stride, padding: the trunks' first layers, 1x1, and what else there may be.
GEOMETRIES = [(3, 1, 1), (3, 2, 0), (1, 1, 0), (1, 2, 0), (5, 2, 3), (4, 3, 2), (2, 1, 0)]
# Borders wider than the kernel, and strides that step over more than it.
GEOMETRIES += [(3, 1, 4), (2, 3, 1)]
# Channels in and out: images', and below, at and beyond a vector and a panel.
CHANNELS = [(3, 64), (1, 1), (20, 17), (33, 48), (64, 97)]
SIZES = [(5, 5), (9, 26), (24, 7)]


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def convolve(x, weight, bias=None, relu=False, stride=1, padding=0):
    packed = OPS.direct_pack(weight)
    shape = (len(weight), weight.shape[-1])
    return OPS.direct_conv2d(x, packed, bias, relu, *shape, stride, padding)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(geometry, channels, size):
    kernel, stride, padding = geometry
    weight = torch.randn(*channels[::-1], kernel, kernel)
    bias = torch.randn(channels[1])
    wide = channels_last(2, channels[0] + 2, size[0] + 2, size[1] + 1)
    for x in (
        channels_last(2, channels[0], *size),
        torch.randn(2, channels[0], *size),
        wide[:, 1:-1, 1:-1, 1:],  # read where it lies
    ):
        expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
        scale = x.double().norm() * weight.double().norm() + expected.norm()
        y = convolve(x, weight, bias, False, stride, padding)
        assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
        assert (y.double() - expected).norm() <= 1e-6 * scale
        rectified = convolve(x, weight, bias, True, stride, padding)
        assert torch.equal(rectified, y.relu())
        plain = convolve(x, weight, None, False, stride, padding)
        torch.testing.assert_close(plain + bias.view(-1, 1, 1), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_magnitudes(scale):
    x, weight = channels_last(1, 3, 9, 9), torch.randn(16, 3, 3, 3)
    torch.testing.assert_close(convolve(x * scale, weight) / scale, convolve(x, weight))


def test_same_bits_in_any_batch_and_with_any_threads():
    x, weight = channels_last(7, 3, 40, 61), torch.randn(64, 3, 3, 3)
    together = convolve(x, weight, padding=1)
    for k in range(len(x)):
        assert torch.equal(convolve(x[k : k + 1], weight, padding=1), together[k : k + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(convolve(x, weight, padding=1), together)
    finally:
        torch.set_num_threads(threads)


def test_nan_goes_through_the_relu():
    x, weight = channels_last(1, 3, 9, 9), torch.randn(16, 3, 3, 3)
    x[0, 1, 4, 4] = torch.nan
    y = convolve(x, weight, relu=True, padding=1)
    assert y[:, :, 3:6, 3:6].isnan().all()
    assert y.isnan().sum() == 9 * 16


def test_empty_batch():
    assert convolve(channels_last(0, 3, 8, 9), torch.randn(16, 3, 3, 3)).shape == (0, 16, 6, 7)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: convolve(x.double(), w), "float32 images"),
        (lambda x, w: convolve(x[0], w), "float32 images"),
        (lambda x, w: convolve(x[:, :2], w), "not packed for these channels"),
        (lambda x, w: convolve(x, w, torch.randn(3)), "float32 bias of 8"),
        (lambda x, w: convolve(x[:, :, :0], w, padding=2), "at least one channel, row"),
        (lambda x, w: convolve(x, w, stride=0), "stride must be at least 1"),
        (
            lambda x, w: convolve(x[:, :, :2], w),
            "2x5 with a padding of 0 are smaller than the kernel",
        ),
        (lambda x, w: OPS.direct_pack(w[..., :2]), r"\(C_out, C_in, k, k\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(channels_last(1, 3, 5, 5), torch.randn(8, 3, 3, 3))


def test_fake_kernel():
    x, packed = channels_last(2, 3, 7, 6), OPS.direct_pack(torch.randn(16, 3, 3, 3))
    torch.library.opcheck(
        OPS.direct_conv2d.default,
        (x, packed, torch.randn(16), True, 16, 3, 2, 1),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.skipif(not kernels.has_wide_vectors(), reason="there are no wide vectors here")
def test_where_it_is_taken():
    def frozen(inputs, outputs, kernel):
        conv = nn.Conv2d(inputs, outputs, kernel).requires_grad_(False)
        packed = packed_weight(conv.weight)
        return convolution.Convolution(conv.weight, conv.bias, 1, 0, packed)

    first = frozen(3, 64, 3)
    assert convolution._is_direct(first, torch.float32)
    assert not convolution._is_direct(first, torch.bfloat16)
    for options in ((3, 64, 11), (64, 64, 3)):
        assert not convolution._is_direct(frozen(*options), torch.float32)
