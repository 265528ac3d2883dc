"""The operators as torch sees them: registrations, derivatives, compilation, refusals."""

from __future__ import annotations

import pytest
import torch

import lpips_fast  # noqa: F401  (loads the operators)
from lpips_fast import functional, kernels
from lpips_fast.kernels.libraries import library_path


def features(*shape, dtype=torch.float32, order=torch.channels_last, grad=True):
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=order)
    return x.requires_grad_(grad)


@pytest.mark.parametrize("name", ["distance", "distance_map"])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
class TestOpcheck:
    """torch's own test of schema, autograd, fake kernels and dispatch through AOTAutograd."""

    def test_forward(self, name, order):
        a = [features(2, 5, 4, 3, order=order), features(2, 9, 2, 2, order=order)]
        b = [features(2, 5, 4, 3, order=order), features(2, 9, 2, 2, order=order)]
        w = [torch.rand(5, requires_grad=True), torch.rand(9, requires_grad=True)]
        operator = getattr(torch.ops.lpips_fast, name).default
        torch.library.opcheck(operator, (a, b, w, 1e-10))

    @pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
    def test_backward(self, name, order, needs):
        a, b, w = [features(2, 5, 4, 3, order=order)], [features(2, 5, 4, 3, order=order)], None
        w = [torch.rand(5, requires_grad=True)]
        grad = torch.rand(2, 1) if name == "distance" else [torch.rand(2, 1, 4, 3)]
        operator = getattr(torch.ops.lpips_fast, f"{name}_backward").default
        torch.library.opcheck(operator, (grad, a, b, w, 1e-10, *needs))

    def test_crop_has_the_fake_kernels_strides(self, name, order):
        x = features(2, 8, 6, 7, order=order, grad=False)[:, :, 1:4, 2:6].detach().requires_grad_()
        operator = getattr(torch.ops.lpips_fast, name).default
        torch.library.opcheck(operator, ([x], [x.detach()], [torch.rand(8)], 1e-10))


class TestDerivatives:
    @pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
    @pytest.mark.parametrize("spatial", [False, True], ids=["averaged", "map"])
    def test_gradcheck_twice(self, order, spatial):
        a = features(2, 5, 3, 2, dtype=torch.float64, order=order)
        b = features(2, 5, 3, 2, dtype=torch.float64, order=order)
        w = torch.rand(5, dtype=torch.float64, requires_grad=True)

        def distance(a, b, w):
            function = functional.distance_map if spatial else functional.distance
            result = function([a, b * 2], [b, a], [w, w])
            return tuple(result) if spatial else result

        assert torch.autograd.gradcheck(distance, (a, b, w))
        assert torch.autograd.gradgradcheck(distance, (a, b, w))

    def test_gradient_penalty(self):
        a, b = features(1, 8, 3, 3), features(1, 8, 3, 3, grad=False)
        (grad,) = torch.autograd.grad(functional.distance([a], [b]).sum(), a, create_graph=True)
        grad.square().sum().backward()
        assert a.grad.isfinite().all() and a.grad.abs().max() > 0


class TestCompile:
    @pytest.mark.parametrize("spatial", [False, True], ids=["averaged", "map"])
    def test_one_graph_same_numbers(self, spatial):
        def loss(a, b, w):
            if spatial:
                return functional.distance_map([a.relu()], [b.relu()], [w])[0].sum()
            return functional.distance([a.relu()], [b.relu()], [w]).sum()

        compiled = torch.compile(loss, fullgraph=True)
        a, b = features(2, 16, 8, 8), features(2, 16, 8, 8)
        w = torch.rand(16, requires_grad=True)
        eager = loss(a, b, w)
        result = compiled(a, b, w)
        torch.testing.assert_close(result, eager)
        for got, expected in zip(
            torch.autograd.grad(result, (a, b, w)), torch.autograd.grad(eager, (a, b, w))
        ):
            torch.testing.assert_close(got, expected)

    def test_export(self):
        class Distance(torch.nn.Module):
            def forward(self, a, b):
                return functional.distance([a], [b])

        a, b = features(2, 16, 8, 8, grad=False), features(2, 16, 8, 8, grad=False)
        program = torch.export.export(Distance(), (a, b))
        assert torch.equal(program.module()(a, b), functional.distance([a], [b]))


class TestLoading:
    def test_the_kernels_are_those_of_torchs_own_capability(self):
        capability = torch.backends.cpu.get_cpu_capability().lower()
        assert kernels.LOADED_LIBRARIES[0] == f"_cpu_{capability}" or capability not in (
            "default",
            "avx2",
            "avx512",
        )

    @pytest.mark.parametrize("capability", ["default", "avx2"])
    def test_other_capabilities_give_the_same_distances(self, capability, run_python):
        """In a process of its own: torch takes its capability from the environment once."""
        if library_path(f"_cpu_{capability}") is None:
            pytest.skip(f"built without the kernels for {capability}")
        result = run_python(
            """
            import torch, sys
            from lpips_fast import functional, kernels
            print(kernels.LOADED_LIBRARIES[0])
            torch.manual_seed(0)
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                for order in (torch.channels_last, torch.contiguous_format):
                    a, b = (torch.randn(2, 67, 9, 11).to(dtype).contiguous(memory_format=order)
                            .requires_grad_() for _ in range(2))
                    distance = functional.distance([a], [b])
                    grads = torch.autograd.grad(distance.sum(), (a, b))
                    reference = functional.composed.distance(
                        [a.double()], [b.double()], [torch.ones(67, dtype=torch.float64)])
                    expected = torch.autograd.grad(reference.sum(), (a, b))
                    assert (distance / reference - 1).abs().max() < 1e-6, dtype
                    for x, y in zip(grads, expected):
                        assert (x - y).norm() / y.norm() < 8e-3, dtype
            """,
            ATEN_CPU_CAPABILITY=capability,
        )
        assert result.split() == [f"_cpu_{capability}"]


class TestRefusals:
    """The operators check what a kernel relies on, whoever calls them."""

    def call(self, a, b, w):
        return torch.ops.lpips_fast.distance([a], [b], [w], 1e-10)

    def test_rank(self):
        with pytest.raises(RuntimeError, match=r"layer 0: features must be \(N, C, H, W\)"):
            self.call(torch.rand(3, 4, 4), torch.rand(3, 4, 4), torch.rand(3))

    def test_shape(self):
        with pytest.raises(RuntimeError, match="differ in shape"):
            self.call(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5), torch.rand(3))

    def test_weight(self):
        with pytest.raises(RuntimeError, match=r"weight must be \(3,\)"):
            self.call(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), torch.rand(4))
        with pytest.raises(RuntimeError, match="accumulator's dtype"):
            self.call(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), torch.rand(3).double())

    def test_integers(self):
        x = torch.ones(1, 3, 4, 4, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="features must be float32"):
            self.call(x, x, torch.rand(3))

    def test_gradient(self):
        x, w = torch.rand(1, 3, 4, 4), torch.rand(3)
        with pytest.raises(RuntimeError, match=r"gradient of the distance must be \(N, L\)"):
            torch.ops.lpips_fast.distance_backward(
                torch.rand(2, 1), [x], [x], [w], 1e-10, True, True, True
            )
        with pytest.raises(RuntimeError, match="gradient of the map"):
            torch.ops.lpips_fast.distance_map_backward(
                [torch.rand(1, 1, 4, 5)], [x], [x], [w], 1e-10, True, True, True
            )
