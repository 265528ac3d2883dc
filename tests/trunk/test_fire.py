"""The fire module in one call, against three convolutions and a concatenation in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from served import needs
from torch import Tensor

from lpips_fast import kernels
from lpips_fast.trunk import convolution, fire
from lpips_fast.trunk.convolution import Convolution
from lpips_fast.trunk.fire import FireConvolutions, FireModule
from lpips_fast.trunk.packing import packed_weight

OPS = torch.ops.lpips_fast
# Channels in, squeezed and expanded: SqueezeNet's, then below, at and beyond vectors and panels.
CHANNELS = [(64, 16, 64), (128, 32, 128), (96, 48, 192), (5, 1, 3), (7, 33, 65), (16, 17, 31)]
# Height and width: less than a group of positions, whole ones, one more; with and without Winograd.
SIZES = [(1, 1), (3, 3), (7, 8), (5, 13), (12, 24), (30, 25)]


def some_images(*shape: int, part: bool = False) -> Tensor:
    """ReLU's results; as a part of wider and larger images, if so asked."""
    batch, channels, height, width = shape
    if part:
        wide = torch.randn(batch, channels + 3, height + 2, width + 1).relu()
        wide = wide.contiguous(memory_format=torch.channels_last)
        return wide[:, 2:-1, 1:-1, 1:]
    return torch.randn(shape).relu().contiguous(memory_format=torch.channels_last)


def packed(module: FireModule, winograd: bool) -> list:
    pack3x3 = OPS.winograd_pack if winograd else OPS.direct_pack
    return [
        OPS.direct_pack(module.squeeze.weight),
        module.squeeze.bias,
        OPS.direct_pack(module.expand1x1.weight),
        module.expand1x1.bias,
        pack3x3(module.expand3x3.weight),
        module.expand3x3.bias,
        winograd,
    ]


def packed_gradients(module: FireModule, winograd: bool) -> list[Tensor]:
    def gradient(conv):
        return conv.weight.flip(2, 3).transpose(0, 1)

    pack3x3 = OPS.winograd_pack if winograd else OPS.direct_pack
    return [
        OPS.direct_pack(gradient(module.squeeze)),
        OPS.direct_pack(gradient(module.expand1x1)),
        pack3x3(gradient(module.expand3x3)),
    ]


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    # Terms are about 1 in size, and all that a ReLU leaves may be what cancelled.
    scale = max(expected.norm().item(), expected.numel() ** 0.5)
    assert (result.double() - expected).norm() <= tolerance * scale


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("part", [False, True], ids=["dense", "part"])
@pytest.mark.parametrize("winograd", [False, True], ids=["direct", "winograd"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
class TestAgainstFloat64:
    def test_forward(self, channels, size, winograd, part):
        module = FireModule(*channels).requires_grad_(False)
        x = some_images(2, channels[0], *size, part=part)
        squeezed, y = OPS.fire(x, *packed(module, winograd))
        module.double()
        expected = module.squeeze(x.double()).relu()
        assert_close(squeezed, torch.nn.functional.pad(expected, (1, 1, 1, 1)))
        both = [conv(expected).relu() for conv in (module.expand1x1, module.expand3x3)]
        assert_close(y, torch.cat(both, dim=1))

    def test_backward(self, channels, size, winograd, part):
        module = FireModule(*channels).requires_grad_(False)
        x = some_images(2, channels[0], *size)
        squeezed, _ = OPS.fire(x, *packed(module, False))
        grad = some_images(2, 2 * channels[2], *size, part=part) - 0.5
        weights = packed_gradients(module, winograd)
        results = [OPS.fire_backward(grad, x, squeezed, *weights, r, winograd) for r in (0, 1)]

        module.double()
        x64 = x.double().requires_grad_()
        # The mask of the float32 pass: within rounding of 0 a value may fall on either side.
        narrow = module.squeeze(x64) * (squeezed[:, :, 1:-1, 1:-1] > 0)
        both = torch.cat((module.expand1x1(narrow), module.expand3x3(narrow)), dim=1)
        (expected,) = torch.autograd.grad(both, x64, grad.double())
        assert_close(results[0], expected, 4e-6)
        assert_close(results[1], expected * (x > 0), 4e-6)


def test_an_image_has_the_same_bits_in_any_batch_and_with_any_threads():
    module = FireModule(64, 16, 64).requires_grad_(False)
    x = some_images(9, 64, 31, 29)
    _, together = OPS.fire(x, *packed(module, False))
    for k in range(len(x)):
        assert torch.equal(OPS.fire(x[k : k + 1], *packed(module, False))[1], together[k : k + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(OPS.fire(x, *packed(module, False))[1], together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_magnitudes(scale):
    module = FireModule(8, 4, 16).requires_grad_(False)
    for conv in (module.squeeze, module.expand1x1, module.expand3x3):
        conv.bias.zero_()
    x = some_images(1, 8, 6, 7)
    _, expected = OPS.fire(x, *packed(module, False))
    _, y = OPS.fire(x * scale, *packed(module, False))
    torch.testing.assert_close(y / scale, expected)


@pytest.mark.parametrize("winograd", [False, True], ids=["direct", "winograd"])
def test_nan_and_infinity_do_not_get_lost(winograd):
    module = FireModule(8, 4, 16).requires_grad_(False)
    module.squeeze.weight[:, 3].abs_()  # minus infinity would end in the ReLU
    for value in (torch.nan, torch.inf):
        x = some_images(1, 8, 20, 20)
        x[0, 3, 5, 6] = value
        _, y = OPS.fire(x, *packed(module, winograd))
        assert not y[0, :, 4:7, 5:8].isfinite().all()
        assert y[0, :, 14:, 14:].isfinite().all()


def test_no_rows():
    module = FireModule(8, 4, 16).requires_grad_(False)
    with pytest.raises(RuntimeError, match="at least one channel, row and column"):
        OPS.fire(torch.empty(2, 8, 0, 5), *packed(module, False))


def test_nothing_at_all():
    module = FireModule(8, 4, 16).requires_grad_(False)
    shape = (0, 8, 5, 5)
    x = torch.empty(shape)
    squeezed, y = OPS.fire(x, *packed(module, False))
    assert y.shape == (0, 32, 5, 5)
    grad = OPS.fire_backward(y, x, squeezed, *packed_gradients(module, False), True, False)
    assert grad.shape == x.shape


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, p: OPS.fire(x.double(), *p), "float32 images"),
        (lambda x, p: OPS.fire(x[0], *p), "float32 images"),
        (lambda x, p: OPS.fire(x[:, :, :0], *p), "at least one channel, row and column"),
        (lambda x, p: OPS.fire(x[:, :7], *p), "not packed for these channels"),
        (lambda x, p: OPS.fire(x, *p[:-1], True), "not packed for these channels"),
        (lambda x, p: OPS.fire(x, *p[:5], p[5][:-1], False), "bias of 16 channels"),
        (lambda x, p: OPS.fire(x, p[0], p[1].double(), *p[2:]), "float32 bias of 4 channels"),
        (
            lambda x, p: OPS.fire_backward(x, x, x, p[0], p[2], p[4], True, False),
            "do not belong together",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    module = FireModule(8, 4, 16).requires_grad_(False)
    with pytest.raises(RuntimeError, match=message):
        call(some_images(1, 8, 5, 5), packed(module, False))


def test_fake_kernels():
    module = FireModule(8, 4, 16).requires_grad_(False)
    x, grad = some_images(2, 8, 5, 6), some_images(2, 32, 5, 6)
    squeezed, _ = OPS.fire(x, *packed(module, False))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.fire.default, (x, *packed(module, False)), test_utils=checks)
    arguments = (grad, x, squeezed, *packed_gradients(module, False), True, False)
    torch.library.opcheck(OPS.fire_backward.default, arguments, test_utils=checks)


def convolutions(module: FireModule) -> FireConvolutions:
    """As a slice hands them on."""
    return FireConvolutions(
        *(
            Convolution(conv.weight, conv.bias, 1, conv.padding[0], packed_weight(conv.weight))
            for conv in (module.squeeze, module.expand1x1, module.expand3x3)
        )
    )


def in_float64(module: FireModule, x: Tensor) -> Tensor:
    return copy.deepcopy(module).double()(x.double())


@pytest.mark.parametrize("size", [(3, 4), (9, 9)], ids=str)
class TestModule:
    def test_ways_agree(self, size, monkeypatch):
        module = FireModule(64, 32, 48).requires_grad_(False)
        x = some_images(2, 64, *size)
        grad = some_images(2, 96, *size) - 0.5
        x64 = x.double().requires_grad_()
        expected = in_float64(module, x64)
        assert_close(module(x), expected)
        (reference,) = torch.autograd.grad(expected, x64, grad.double())
        for one_call in (True, False):
            if not one_call:
                monkeypatch.setattr(kernels, "has_wide_vectors", lambda: False)
            squeezed, y = fire.record(convolutions(module), x, convolution)
            assert_close(y, expected)
            # As a slice calls it: from behind the ReLUs.
            before_relu = torch.ops.aten.threshold_backward(grad, y, 0)
            for through_relu in (False, True):
                got = fire.input_gradient(
                    convolutions(module), before_relu, x, squeezed, through_relu, convolution
                )
                assert_close(got, reference * (x > 0) if through_relu else reference, 1e-5)

    @pytest.mark.skipif(not kernels.has_wide_vectors(), reason="there are no wide vectors here")
    def test_where_it_is_one_call(self, size, monkeypatch):
        x = some_images(1, 64, *size)
        assert fire.has_border(x)
        assert not fire.has_border(x.bfloat16())
        assert not fire.has_border(x.double())
        assert not fire.has_border(x.to("meta"))
        monkeypatch.setattr(kernels, "has_wide_vectors", lambda: False)
        assert not fire.has_border(x)

    @needs(torch.bfloat16)
    def test_half_precision(self, size):
        module = FireModule(64, 32, 48).requires_grad_(False)
        x = some_images(2, 64, *size)
        expected = in_float64(module, x)
        module.bfloat16()
        _, y = fire.record(convolutions(module), x.bfloat16(), convolution)
        assert y.dtype == torch.bfloat16
        assert_close(y, expected, 0.01)

    def test_weights_that_changed_are_packed_anew(self, size):
        module = FireModule(64, 32, 48).requires_grad_(False)
        x = some_images(1, 64, *size)
        fire.record(convolutions(module), x, convolution)
        module.expand3x3.weight.mul_(-2)
        module.squeeze.weight.data.add_(0.1)
        _, y = fire.record(convolutions(module), x, convolution)
        assert_close(y, in_float64(module, x))
