"""Every kernel against the composed formula in float64, on fresh random features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lpips_fast import composed, functional

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ORDERS = ["channels_last", "channels_first"]
# (N, C, H, W): every tail of every vector width, one channel, one position, many channels.
SHAPES = [
    (3, 1, 5, 2),
    (2, 2, 1, 1),
    (2, 3, 5, 7),
    (3, 31, 4, 9),
    (2, 64, 33, 17),
    (1, 100, 9, 9),
    (2, 192, 8, 1),
    (2, 257, 1, 13),
    (2, 512, 13, 11),
    (1, 2048, 3, 5),
    (1, 17, 70, 65),
]
# Relative to the norm of the reference: rounding of the accumulator, or of the stored gradient.
VALUE_TOLERANCE = {torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.usefixtures("poisoned")


def in_order(x: Tensor, order: str) -> Tensor:
    layout = torch.channels_last if order == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def random_pair(shape, dtype, order, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Features as a ReLU leaves them, the second near the first; no zero vectors.

    A single channel normalises to its sign, so that there both signs are drawn.
    """
    if shape[1] == 1:
        signed = torch.randn(2, *shape, dtype=torch.float64)
        signed[0, 0], signed[1, 0] = 1.0, -1.0
        return in_order(signed[0].to(dtype), order), in_order(signed[1].to(dtype), order)
    a = torch.randn(shape, dtype=torch.float64).relu() + 0.01
    b = (a + spread * torch.randn(shape, dtype=torch.float64)).relu() + 0.01
    # Of few channels, many vectors would be parallel: their distance is nothing but rounding.
    a[:, -1] += 1
    b[:, 0] += 1
    return in_order(a.to(dtype), order), in_order(b.to(dtype), order)


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.isfinite().all()
    scale = expected.norm()
    return ((result.double() - expected).norm() / (scale if scale > 0 else 1.0)).item()


def weights_for(dtype: torch.dtype, channels: int) -> Tensor:
    return torch.rand(channels, dtype=composed.accumulator_dtype(dtype))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAgainstFloat64:
    def test_distance(self, dtype, order, shape):
        a, b = random_pair(shape, dtype, order)
        w = weights_for(dtype, shape[1])
        expected = composed.distance([a.double()], [b.double()], [w.double()])
        result = functional.distance([a], [b], [w])
        assert result.dtype == composed.accumulator_dtype(dtype)
        assert result.shape == (shape[0], 1)
        assert relative_error(result, expected) < VALUE_TOLERANCE.get(dtype, 2e-6)

    def test_distance_map(self, dtype, order, shape):
        a, b = random_pair(shape, dtype, order)
        w = weights_for(dtype, shape[1])
        expected = composed.distance_map(a.double(), b.double(), w.double())
        (result,) = functional.distance_map([a], [b], [w])
        assert result.shape == (shape[0], 1, *shape[2:])
        assert relative_error(result, expected) < VALUE_TOLERANCE.get(dtype, 2e-6)

    @pytest.mark.parametrize("spatial", [False, True], ids=["averaged", "map"])
    def test_gradients(self, dtype, order, shape, spatial):
        a, b, w = leaves(*random_pair(shape, dtype, order), weights_for(dtype, shape[1]))
        a64, b64, w64 = leaves(a.double(), b.double(), w.double())
        positions = shape[2] * shape[3]
        grad_map = torch.randn(shape[0], 1, *shape[2:], dtype=w.dtype)
        if spatial:
            (result,) = functional.distance_map([a], [b], [w])
            results = torch.autograd.grad(result, (a, b, w), grad_map)
        else:
            grad_map = grad_map[:, :, :1, :1].expand_as(grad_map)
            result = functional.distance([a], [b], [w])
            # Times the positions: a gradient of order 1 at each, well inside float16's range.
            results = torch.autograd.grad(result, (a, b, w), grad_map[:, 0, 0, :1] * positions)
        expected = composed.distance_map(a64, b64, w64)
        references = torch.autograd.grad(expected, (a64, b64, w64), grad_map.double())
        scales = self.scales_of_terms(a64, b64, w64, grad_map.double())
        for name, got, reference, scale in zip("abw", results, references, scales):
            assert got.isfinite().all()
            assert got.shape == reference.shape
            assert got.dtype == (w.dtype if name == "w" else dtype)
            tolerance = {torch.float64: 1e-12}.get(dtype, 3e-6)  # of the accumulator
            if name != "w":
                tolerance = GRADIENT_TOLERANCE.get(dtype, tolerance)  # of what is stored
            # Below float16's normal numbers an error is a step of 2^-24, however small the value.
            step = 2**-24 * got.numel() ** 0.5 if got.dtype == torch.float16 else 0
            assert (got.double() - reference).norm() < tolerance * scale + step, name

    @staticmethod
    def scales_of_terms(a, b, w, grad):
        """Norms of the terms that may cancel in a gradient: what its rounding is relative to."""
        with torch.no_grad():
            difference = functional.normalize_tensor(a) - functional.normalize_tensor(b)
            t = 2 * grad * w.view(1, -1, 1, 1) * difference
            weight_terms = (grad.abs() * difference**2).sum(dim=(0, 2, 3))
            return [(t / x.norm(dim=1, keepdim=True)).norm() for x in (a, b)] + [
                weight_terms.norm()
            ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestExactness:
    def test_identical_features_give_exactly_zero(self, dtype, order):
        a, _ = random_pair((2, 67, 9, 11), dtype, order)
        (result,) = functional.distance_map([a], [a.clone()])
        assert (result == 0).all()
        assert (functional.distance([a], [a.clone()]) == 0).all()

    def test_symmetric_to_the_bit(self, dtype, order):
        a, b = random_pair((2, 67, 9, 11), dtype, order, spread=0.01)
        assert torch.equal(functional.distance([a], [b]), functional.distance([b], [a]))

    def test_same_bits_whatever_the_number_of_threads(self, dtype, order):
        a, b = random_pair((2, 64, 65, 63), dtype, order)
        w = weights_for(dtype, 64)
        threads, seen = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                x, y, v = leaves(a, b, w)
                distance = functional.distance([x], [y], [v])
                seen.append((distance, *torch.autograd.grad(distance.sum(), (x, y, v))))
        finally:
            torch.set_num_threads(threads)
        for other in seen[1:]:
            assert all(torch.equal(x, y) for x, y in zip(seen[0], other))


@pytest.mark.parametrize("order", ORDERS)
class TestMagnitudes:
    def test_tiny_difference_keeps_its_digits(self, order):
        # The expansion a^2 + b^2 - 2ab would leave nothing of a distance of 1e-10.
        a = in_order(torch.rand(2, 64, 9, 9, dtype=torch.float64) + 0.1, order)
        b = a + 1e-5 * torch.randn_like(a)
        expected = composed.distance([a.float().double()], [b.float().double()], [torch.ones(64)])
        result = functional.distance([a.float()], [b.float()])
        assert expected.max() < 1e-8
        # Bounded by the rounding of the normalised features themselves, 6e-8 of 1e-5 each.
        assert relative_error(result, expected) < 1e-3

    @pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e-10, 1e-4, 1e4, 1e15])
    def test_huge_and_tiny_features(self, order, scale):
        a, b = (scale * x for x in random_pair((2, 64, 5, 7), torch.float64, order))
        expected = composed.distance([a], [b], [torch.ones(64, dtype=torch.float64)])
        result = functional.distance([a.float()], [b.float()])
        assert relative_error(result, expected) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_squares_of_half_features_do_not_overflow(self, order, dtype):
        a, b = (3000 * x for x in random_pair((1, 96, 5, 7), torch.float64, order))
        a, b = a.to(dtype), b.to(dtype)
        ones = torch.ones(96, dtype=torch.float64)
        expected = composed.distance([a.double()], [b.double()], [ones])
        assert relative_error(functional.distance([a], [b]), expected) < 2e-6

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zero_vectors_have_finite_gradients(self, order, dtype):
        a, b = random_pair((2, 33, 6, 5), dtype, order)
        a[:, :, 0], b[:, :, 0] = 0, 0  # both
        a[:, :, 1] = 0  # one
        b[:, :, 2] = 0  # the other
        a, b = leaves(a, b)
        distance = functional.distance([a], [b])
        grad_a, grad_b = torch.autograd.grad(distance.sum(), (a, b))
        assert grad_a.isfinite().all() and grad_b.isfinite().all()
        assert (grad_a[:, :, 0] == 0).all() and (grad_b[:, :, 0] == 0).all()
        a64, b64 = leaves(a.double(), b.double())
        ones = torch.ones(33, dtype=torch.float64)
        expected = torch.autograd.grad(composed.distance([a64], [b64], [ones]).sum(), (a64, b64))
        for got, reference in zip((grad_a, grad_b), expected):
            limit = torch.finfo(dtype).max
            error = got[:, :, 1:].double() - reference[:, :, 1:].clamp(-limit, limit)
            assert error.norm() / reference[:, :, 1:].clamp(-limit, limit).norm() < 4e-3


class TestStrides:
    def views(self, order):
        """Pairs whose memory is not dense, each with what it must equal."""
        big_a, big_b = random_pair((4, 24, 12, 14), torch.float32, order)
        yield "crop", big_a[:, :, 2:9, 3:10], big_b[:, :, 1:8, 4:11]
        yield "every other row", big_a[:, :, ::2], big_b[:, :, ::2]
        yield "every other column", big_a[..., ::2], big_b[..., ::2]
        yield "one column", big_a[..., 3:4], big_b[..., 5:6]
        yield "channel slice", big_a[:, 3:20], big_b[:, 4:21]
        yield "every other channel", big_a[:, ::2], big_b[:, ::2]
        yield "batch slice", big_a[::2], big_b[1::2]
        yield "expanded batch", big_a[:1].expand(4, -1, -1, -1), big_b
        yield "transposed", big_a.transpose(2, 3), big_b.transpose(2, 3)
        yield "mixed orders", big_a, in_order(big_b, "channels_last")
        yield "mixed orders", in_order(big_a, "channels_last"), big_b.contiguous()

    @pytest.mark.parametrize("order", ORDERS)
    def test_any_strides(self, order):
        for name, a, b in self.views(order):
            w = torch.rand(a.shape[1])
            x, y, v = leaves(a, b, w)
            assert x.stride() == a.stride(), name
            result = functional.distance([x], [y], [v])
            x64, y64, v64 = leaves(a.double(), b.double(), w.double())
            expected = composed.distance([x64], [y64], [v64])
            assert relative_error(result, expected) < 2e-6, name
            (result_map,) = functional.distance_map([a], [b], [w])
            expected_map = composed.distance_map(a.double(), b.double(), w.double())
            assert relative_error(result_map, expected_map) < 2e-6, name
            grads = torch.autograd.grad(result.sum(), (x, y, v))
            references = torch.autograd.grad(expected.sum(), (x64, y64, v64))
            for got, reference in zip(grads, references):
                assert relative_error(got, reference) < 3e-6, name

    @pytest.mark.parametrize("order", ORDERS)
    def test_gradients_lie_in_the_order_of_the_features(self, order):
        a, b = leaves(*random_pair((2, 24, 5, 7), torch.float32, order))
        for grad in torch.autograd.grad(functional.distance([a], [b]).sum(), (a, b)):
            assert grad.stride() == a.stride()


class TestSeveralLayers:
    def test_layers_of_different_shapes_and_orders(self):
        pairs = [
            random_pair((2, 8, 9, 9), torch.float32, "channels_last"),
            random_pair((2, 33, 4, 5), torch.float32, "channels_first"),
            random_pair((2, 5, 1, 1), torch.float32, "channels_last"),
        ]
        feats0, feats1 = [a for a, _ in pairs], [b for _, b in pairs]
        weights = [torch.rand(a.shape[1]) for a in feats0]
        result = functional.distance(feats0, feats1, weights)
        assert result.shape == (2, 3)
        for layer, (a, b) in enumerate(pairs):
            alone = functional.distance([a], [b], [weights[layer]])
            assert torch.equal(result[:, layer], alone[:, 0])

    def test_only_what_is_asked_has_a_gradient(self):
        a, b = random_pair((1, 8, 3, 3), torch.float32, "channels_last")
        a.requires_grad_()
        functional.distance([a, a], [b, b]).sum().backward()
        assert a.grad is not None and b.grad is None

    def test_a_map_that_is_not_used(self):
        a, b = leaves(*random_pair((1, 8, 3, 3), torch.float32, "channels_last"))
        first, _ = functional.distance_map([a, a * 2], [b, b])
        first.sum().backward()
        expected = torch.autograd.grad(functional.distance_map([a], [b])[0].sum(), a)[0]
        torch.testing.assert_close(a.grad, expected)


class TestEmpty:
    @pytest.mark.parametrize("order", ORDERS)
    def test_empty_batch(self, order):
        a = in_order(torch.randn(0, 8, 3, 3), order).requires_grad_()
        distance = functional.distance([a], [a.detach()])
        assert distance.shape == (0, 1)
        assert functional.distance_map([a], [a])[0].shape == (0, 1, 3, 3)
        assert torch.autograd.grad(distance.sum(), a)[0].shape == a.shape

    def test_no_positions_is_nan_as_in_torch_mean(self):
        a = torch.randn(2, 8, 0, 3)
        assert functional.distance([a], [a]).isnan().all()
        assert functional.distance_map([a], [a])[0].shape == (2, 1, 0, 3)


class TestErrors:
    def test_shapes_that_differ(self):
        with pytest.raises(ValueError, match=r"layer 0.*\(1, 3, 4, 4\) and \(1, 3, 4, 5\)"):
            functional.distance([torch.rand(1, 3, 4, 4)], [torch.rand(1, 3, 4, 5)])

    def test_dtypes_that_differ(self):
        with pytest.raises(TypeError, match=r"float32 and torch\.float64.*\.to\(\)"):
            functional.distance([torch.rand(1, 3, 4, 4)], [torch.rand(1, 3, 4, 4).double()])

    def test_integers(self):
        x = torch.ones(1, 3, 4, 4, dtype=torch.int32)
        with pytest.raises(TypeError, match="int32"):
            functional.distance([x], [x])

    def test_layers_that_differ(self):
        x = torch.rand(1, 3, 4, 4)
        with pytest.raises(ValueError, match="2 and 1"):
            functional.distance([x, x], [x])
        with pytest.raises(ValueError, match="at least one layer"):
            functional.distance([], [])

    def test_weights_that_do_not_fit(self):
        x = torch.rand(1, 3, 4, 4)
        with pytest.raises(ValueError, match="expected 3 weights"):
            functional.distance([x], [x], [torch.rand(4)])
        with pytest.raises(ValueError, match="expected 1 weights"):
            functional.distance([x], [x], [torch.rand(3), torch.rand(3)])
