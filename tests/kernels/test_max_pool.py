"""Max-pooling without indices, against torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import lpips_fast  # noqa: F401  (registers the operator)

WINDOWS = [(3, 2, False), (3, 2, True), (2, 2, False), (2, 2, True), (3, 1, False)]
SHAPES = [(2, 70, 13, 12), (1, 3, 3, 3), (3, 64, 8, 9), (1, 129, 5, 31), (0, 8, 5, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def max_pool(x, window):
    return torch.ops.lpips_fast.max_pool2d(x, *window)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_same_bits_as_torch(dtype, shape, window, ties):
    x = torch.randn(shape).to(dtype)
    x = (x * 2).round() if ties else x
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    kernel, stride, ceil_mode = window
    y, expected = max_pool(x, window), F.max_pool2d(x, kernel, stride, ceil_mode=ceil_mode)
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    (reference,) = torch.autograd.grad(expected, x, grad)
    # Overlapping windows add up in another order.
    torch.testing.assert_close(
        got, reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 if dtype.itemsize == 2 else 1e-6
    )


def test_nan_and_infinity_pass():
    x = torch.randn(1, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2], x[0, 4, 2, 2], x[0, 5] = torch.nan, torch.inf, -torch.inf
    torch.testing.assert_close(
        max_pool(x, (3, 2, False)), F.max_pool2d(x, 3, 2), equal_nan=True, rtol=0, atol=0
    )


def test_other_memory_orders_are_copied():
    x = torch.randn(2, 5, 9, 9)
    assert torch.equal(max_pool(x, (3, 2, False)), F.max_pool2d(x, 3, 2))


def test_derivatives():
    x = torch.randn(1, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    for window in WINDOWS:
        assert torch.autograd.gradcheck(lambda t, w=window: max_pool(t, w), x)
        assert torch.autograd.gradgradcheck(lambda t, w=window: max_pool(t, w), x)


def test_opcheck():
    x = torch.randn(2, 5, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.lpips_fast.max_pool2d.default, (x, 3, 2, True))
    y = max_pool(x, (3, 2, True)).detach()
    torch.library.opcheck(
        torch.ops.lpips_fast.max_pool2d_backward.default, (torch.randn_like(y), x, y, 3, 2)
    )


def test_refusals():
    with pytest.raises(RuntimeError, match="2x5 is smaller than the pooling window of 3x3"):
        max_pool(torch.randn(1, 4, 2, 5), (3, 2, False))
    with pytest.raises(RuntimeError, match="float32, float64, float16 or bfloat16"):
        max_pool(torch.ones(1, 4, 5, 5, dtype=torch.int32), (3, 2, False))


class TestKeys:
    """Positions that are equal but for rounding: the first of a window gets the gradient."""

    def case(self, window, dtype=torch.float32):
        x = torch.randn(2, 70, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last)
        keys = torch.randint(0, 4, (2, 2, 9, 11))
        kernel, stride, ceil_mode = window
        y = F.max_pool2d(x, kernel, stride, ceil_mode=ceil_mode)
        return x, y.contiguous(memory_format=torch.channels_last), keys

    def expected(self, grad, x, keys, window):
        kernel, stride, _ = window
        result = torch.zeros_like(x)
        for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
            of_group = keys[n, c * keys.shape[1] // x.shape[1]]
            for r, q in itertools.product(*map(range, grad.shape[2:])):
                places = [
                    (h, w)
                    for h in range(r * stride, min(r * stride + kernel, x.shape[2]))
                    for w in range(q * stride, min(q * stride + kernel, x.shape[3]))
                ]
                largest = max(places, key=lambda p: x[n, c, p[0], p[1]])
                first = next(p for p in places if of_group[p] == of_group[largest])
                result[n, c, first[0], first[1]] += grad[n, c, r, q]
        return result

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_against_a_loop(self, window):
        x, y, keys = self.case(window)
        grad = torch.randn_like(y)
        operator = torch.ops.lpips_fast.max_pool2d_backward
        found = operator(grad, x, y, window[0], window[1], keys)
        torch.testing.assert_close(found, self.expected(grad, x, keys, window))
        one = keys[:, :1].contiguous()
        found = operator(grad, x, y, window[0], window[1], one)
        torch.testing.assert_close(found, self.expected(grad, x, one, window))

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize(
        "window", [*WINDOWS, (5, 3, False), (7, 2, True), (2, 5, False)], ids=str
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_an_image_cut_into_rows_has_the_bits_of_a_whole_one(self, window, dtype):
        """One image is shared out by rows, of sixteen each has a thread of its own."""
        kernel, stride, ceil_mode = window
        x = (3 * torch.randn(1, 22, 70, 9)).round().to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        keys = torch.randint(0, 20, (1, 2, 70, 9))
        y = max_pool(x, window)
        grad = torch.randn_like(y)
        operator = torch.ops.lpips_fast.max_pool2d_backward
        for of_one in (None, keys):
            of_many = None if of_one is None else of_one.repeat(16, 1, 1, 1)
            many = [
                t.repeat(16, 1, 1, 1).contiguous(memory_format=torch.channels_last)
                for t in (grad, x, y)
            ]
            found = operator(grad, x, y, kernel, stride, of_one)
            whole = operator(*many, kernel, stride, of_many)
            assert torch.equal(whole, found.expand_as(whole))
        x.requires_grad_()
        expected = F.max_pool2d(x.double(), kernel, stride, ceil_mode=ceil_mode)
        (expected,) = torch.autograd.grad(expected, x, grad.double())
        found = operator(grad, x.detach(), y, kernel, stride)
        tolerance = {2: 5e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    def test_derivative(self):
        for window in WINDOWS:
            x, y, keys = self.case(window, torch.float64)
            x, y = x[:, :4], y[:, :4]
            grad = torch.randn_like(y).requires_grad_()
            arguments = (x, y, window[0], window[1], keys)
            operator = torch.ops.lpips_fast.max_pool2d_backward
            function = lambda g, f=operator, a=arguments: f(g, *a)  # noqa: E731
            assert torch.autograd.gradcheck(function, grad, fast_mode=True)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda k: k.int(),
            lambda k: k[..., :-1],
            lambda k: k[:1],
            lambda k: k[:, [0, 1, 0]],
            lambda k: k.transpose(2, 3).contiguous().transpose(2, 3),
        ],
    )
    def test_others_are_refused(self, wrong):
        x, y, keys = self.case((3, 2, False))
        with pytest.raises(RuntimeError, match="contiguous int64 keys"):
            torch.ops.lpips_fast.max_pool2d_backward(y, x, y, 3, 2, wrong(keys))
