"""LPIPS as a user meets it: arguments, checkpoints, shapes, gradients, compilation, refusals."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from parity import image_pair, trunk_weights

import lpips_fast
from lpips_fast.comparison import routes
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.comparison.scaling import scaled_batch
from lpips_fast.weights import WeightsError


@pytest.fixture(scope="module")
def alex_weights():
    return trunk_weights("alex")


@pytest.fixture
def model(alex_weights):
    return lpips_fast.LPIPS(weights=alex_weights, verbose=False)


@pytest.fixture
def pair():
    return image_pair(2, 48, 56, torch.float32, seed=0)


class TestArguments:
    def test_positional_order_is_the_originals(self, alex_weights, capsys):
        model = lpips_fast.LPIPS(
            True, "alex", "0.0", True, True, True, True, False, None, False, True
        )
        assert model.version == "0.0" and model.spatial and model.pnet_tune and model.training
        assert "trunk [alex], v[0.0], spatial [on]" in capsys.readouterr().out

    def test_attributes(self, model):
        assert model.L == 5 and model.chns == [64, 192, 384, 256, 256]
        assert model.lin0 is model.lins[0] and model.lin4 is model.lins[4]
        assert model.scaling_layer.shift.shape == (1, 3, 1, 1)
        assert not model.training

    def test_verbose_false_is_silent(self, model, capsys):
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("name", ["vgg", "vgg16"])
    def test_both_names_of_vgg(self, name):
        model = lpips_fast.LPIPS(net=name, pnet_rand=True, verbose=False)
        packaged = lpips_fast.weights.load_lin_weights("vgg", "0.1")
        assert torch.equal(linear_weight(model.lin0), packaged["lin0.model.1.weight"])

    @pytest.mark.parametrize("use_dropout", [True, False])
    def test_linear_weights_load_with_and_without_dropout(self, alex_weights, use_dropout):
        model = lpips_fast.LPIPS(weights=alex_weights, use_dropout=use_dropout, verbose=False)
        packaged = lpips_fast.weights.load_lin_weights("alex", "0.1")
        for k in range(5):
            assert torch.equal(linear_weight(model.lins[k]), packaged[f"lin{k}.model.1.weight"])

    def test_not_pretrained_is_random(self, alex_weights):
        one, two = (
            lpips_fast.LPIPS(pretrained=False, weights=alex_weights, verbose=False)
            for _ in range(2)
        )
        assert not torch.equal(linear_weight(one.lin0), linear_weight(two.lin0))

    def test_unknown_net_version_reduction(self):
        with pytest.raises(ValueError, match=r"unknown trunk 'resnet'.*alex, vgg, squeeze"):
            lpips_fast.LPIPS(net="resnet")
        with pytest.raises(ValueError, match=r"unknown version '0\.2'.*0\.0, 0\.1"):
            lpips_fast.LPIPS(version="0.2")
        with pytest.raises(ValueError, match=r"unknown reduction 'avg'.*none, mean, sum"):
            lpips_fast.LPIPS(reduction="avg")


class TestCheckpoints:
    def test_ours_and_theirs_load_each_other(self, model, reference, pair):
        theirs = reference.LPIPS(pnet_rand=True, verbose=False)
        assert list(model.state_dict()) == list(theirs.state_dict())
        model.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(model(*pair), theirs(*pair), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("saved_with", [True, False])
    @pytest.mark.parametrize("loaded_with", [True, False])
    def test_dropout_does_not_change_what_loads(self, alex_weights, saved_with, loaded_with):
        first = lpips_fast.LPIPS(
            pretrained=False, weights=alex_weights, use_dropout=saved_with, verbose=False
        )
        second = lpips_fast.LPIPS(weights=alex_weights, use_dropout=loaded_with, verbose=False)
        second.load_state_dict(first.state_dict())
        assert torch.equal(linear_weight(first.lin3), linear_weight(second.lin3))

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_model_path(self, alex_weights, tmp_path, suffix):
        wanted = {
            f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1)
            for k, c in enumerate([64, 192, 384, 256, 256])
        }
        path = tmp_path / f"lin{suffix}"
        if suffix == ".pth":
            torch.save(wanted, path)
        else:
            import safetensors.torch

            safetensors.torch.save_file(wanted, path)
        model = lpips_fast.LPIPS(weights=alex_weights, model_path=path, verbose=False)
        assert torch.equal(linear_weight(model.lin2), wanted["lin2.model.1.weight"])

    def test_model_path_of_another_trunk(self, alex_weights, tmp_path):
        path = tmp_path / "vgg.pth"
        torch.save(lpips_fast.weights.load_lin_weights("vgg", "0.1"), path)
        with pytest.raises(RuntimeError, match="size mismatch for lin1"):
            lpips_fast.LPIPS(weights=alex_weights, model_path=path, verbose=False)

    @pytest.mark.parametrize("content", [{}, {"conv.weight": torch.zeros(1)}, [1, 2]])
    def test_model_path_without_linear_weights(self, alex_weights, tmp_path, content):
        path = tmp_path / "foreign.pth"
        torch.save(content, path)
        with pytest.raises(WeightsError, match=r"foreign\.pth"):
            lpips_fast.LPIPS(weights=alex_weights, model_path=path, verbose=False)

    def test_model_path_truncated_or_missing(self, alex_weights, tmp_path):
        path = tmp_path / "cut.pth"
        torch.save(lpips_fast.weights.load_lin_weights("alex", "0.1"), path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(WeightsError, match=r"cut\.pth cannot be read"):
            lpips_fast.LPIPS(weights=alex_weights, model_path=path, verbose=False)
        with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
            lpips_fast.LPIPS(weights=alex_weights, model_path=tmp_path / "none.pth", verbose=False)

    def test_some_linear_weights_missing_is_an_error_even_without_strict(self, model):
        state = model.state_dict()
        for key in list(state):
            if "lin2" in key or "lins.2" in key:
                del state[key]
        with pytest.raises(RuntimeError, match=r"1 of 5 layers are missing, first 'lin2'"):
            model.load_state_dict(state, strict=False)

    def test_a_state_dict_without_any_may_be_loaded_without_strict(self, model):
        """Models with a perceptual loss inside often save themselves without it."""

        class Autoencoder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.decoder, self.loss = torch.nn.Conv2d(3, 3, 1), copy.deepcopy(model)

        state = {k: v for k, v in Autoencoder().state_dict().items() if "loss" not in k}
        other = Autoencoder()
        other.load_state_dict(state, strict=False)
        assert torch.equal(other.decoder.weight, state["decoder.weight"])


class TestOutputs:
    def test_shapes(self, model, pair):
        value, layers = model(*pair, retPerLayer=True)
        assert value.shape == (2, 1, 1, 1) and len(layers) == 5
        assert all(layer.shape == (2, 1, 1, 1) for layer in layers)
        torch.testing.assert_close(sum(layers), value)
        model.spatial = True
        value, layers = model(*pair, retPerLayer=True)
        assert value.shape == (2, 1, 48, 56) == layers[0].shape

    def test_reduction(self, alex_weights, pair):
        model = lpips_fast.LPIPS(weights=alex_weights, verbose=False)
        each = model(*pair)
        for reduction, expected in (("mean", each.mean()), ("sum", each.sum())):
            reduced = lpips_fast.LPIPS(weights=alex_weights, reduction=reduction, verbose=False)
            result, layers = reduced(*pair, retPerLayer=True)
            assert result.shape == () == layers[0].shape
            torch.testing.assert_close(result, expected)

    def test_identical_images_give_exactly_zero(self, model, pair):
        assert (model(pair[0], pair[0].clone()) == 0).all()

    def test_symmetric_and_deterministic_to_the_bit(self, model, pair):
        first = model(*pair)
        assert torch.equal(first, model(*pair))
        torch.testing.assert_close(first, model(pair[1], pair[0]), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_bad_pixel_reaches_the_distance(self, net, value):
        model = lpips_fast.LPIPS(net=net, pnet_rand=True, verbose=False)
        a, b = image_pair(1, 48, 48, torch.float32, seed=0)
        b[0, 1, 20, 20] = value
        assert model(a, b).isnan().all()

    def test_empty_batch(self, model):
        x = torch.zeros(0, 3, 64, 64, requires_grad=True)
        value = model(x, x)
        assert value.shape == (0, 1, 1, 1)
        value.sum().backward()
        assert x.grad.shape == x.shape

    def test_single_image_and_gray(self, model, pair):
        a, b = pair
        torch.testing.assert_close(model(a[0], b[0]), model(a[:1], b[:1]))
        gray = a[:, :1]
        torch.testing.assert_close(model(gray, b), model(gray.expand(-1, 3, -1, -1), b))

    def test_one_against_many(self, model, pair):
        a, b = pair
        expected = torch.cat([model(a[:1], b[:1]), model(a[:1], b[1:])])
        torch.testing.assert_close(model(a[:1], b), expected)
        assert model(a[:1], b[:0]).shape == (0, 1, 1, 1)

    def test_half_precision_gives_a_float32_distance(self, model, pair):
        expected = model(*pair)
        model = model.to(torch.bfloat16)
        result = model(*(x.to(torch.bfloat16) for x in pair))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0)

    def test_autocast_with_mixed_dtypes(self, model, pair):
        """A decoder under autocast hands over bfloat16, the target is float32."""
        expected = model(*pair)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(pair[0].bfloat16(), pair[1])
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0)


class TestGradients:
    def test_constant_images_have_finite_gradients(self, model):
        """The original gives NaN: a dead position is a zero vector, a kink of its norm."""
        dead = copy.deepcopy(model)
        for module in dead.net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.bias.fill_(-1e3)
        x = torch.zeros(1, 3, 64, 64, requires_grad=True)
        dead(x, torch.ones(1, 3, 64, 64)).sum().backward()
        assert x.grad.isfinite().all()
        model(x, x.detach().clone()).sum().backward()
        assert x.grad.isfinite().all()

    def test_a_target_without_gradient_has_no_graph(self, model, pair):
        a, b = pair
        seen = []
        model.net.slice1.register_forward_hook(lambda m, args, out: seen.append(out.requires_grad))
        x = a.clone().requires_grad_()
        model(x, b).sum().backward()
        assert sorted(seen) == [False, True]
        both = torch.cat([a, b]).requires_grad_()
        model(*both.chunk(2)).sum().backward()
        torch.testing.assert_close(x.grad, both.grad[:2], rtol=1e-4, atol=1e-8)

    def test_only_the_linear_layers_learn(self, model, pair):
        model(*pair).sum().backward()
        assert all(linear_weight(lin).grad is not None for lin in model.lins)
        assert all(p.grad is None for p in model.net.parameters())

    def test_no_grad_saves_nothing(self, model, pair):
        with torch.no_grad():
            assert not model(*pair).requires_grad

    def test_a_descent_step_reduces_the_distance(self, model, pair):
        x = pair[1].clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.01)
        distances = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(x, pair[0]).mean()
            loss.backward()
            optimizer.step()
            distances.append(loss.item())
        assert distances[-1] < 0.8 * distances[0]

    def test_dropout_in_training_mode_only(self, alex_weights, pair):
        model = lpips_fast.LPIPS(weights=alex_weights, eval_mode=False, verbose=False)
        assert not torch.equal(model(*pair), model(*pair))
        model.spatial = True
        assert model(*pair).std() > 0
        model.eval()
        assert torch.equal(model(*pair), model(*pair))


class TestScaling:
    """Images to what a trunk takes, in one pass: the bits of the scaling layer."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("unit_range", [False, True])
    def test_same_bits(self, dtype, unit_range):
        layer = lpips_fast.ScalingLayer()
        images = [torch.rand(2, 3, 37, 300), torch.rand(1, 3, 37, 300)]
        views = [
            images,
            [image.contiguous(memory_format=torch.channels_last) for image in images],
            [image[:, :1].expand(-1, 3, -1, -1) for image in images],
            [image[..., ::2] for image in images],
            [images[0].transpose(2, 3)],
        ]
        for view in views:
            x = torch.cat(tuple(view))
            expected = layer(2 * x - 1 if unit_range else x).to(dtype)
            result = scaled_batch(layer, view, unit_range, dtype)
            assert torch.equal(result, expected)
            assert result.is_contiguous(memory_format=torch.channels_last)
            unscaled = scaled_batch(layer, view, unit_range, dtype, version="0.0")
            assert torch.equal(unscaled, (2 * x - 1 if unit_range else x).to(dtype))

    def test_gradients_and_registrations(self):
        layer = lpips_fast.ScalingLayer().double()
        images = [torch.rand(n, 3, 4, 5, dtype=torch.float64, requires_grad=True) for n in (2, 1)]
        for unit_range in (False, True):
            arguments = (layer.shift, layer.scale, unit_range, torch.float64)
            operator = torch.ops.lpips_fast.scale_images.default
            assert torch.autograd.gradcheck(
                lambda *x, call=operator, rest=arguments: call(list(x), *rest), images
            )
            torch.library.opcheck(operator, (images, *arguments))

    def test_refusals(self):
        layer = lpips_fast.ScalingLayer()
        with pytest.raises(RuntimeError, match="of one size"):
            scaled_batch(
                layer, [torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5)], False, torch.float32
            )


class TestFeatures:
    """Encode once, compare often: the same bits as the plain call."""

    @pytest.mark.parametrize("spatial", [False, True])
    def test_encoded_target(self, model, pair, spatial):
        model.spatial = spatial
        x, y = (pair[0].clone().requires_grad_() for _ in range(2))
        with torch.no_grad():
            target = model.encode(pair[1])
        plain, encoded = model(x, pair[1]), model(y, target)
        assert torch.equal(plain, encoded)
        plain.sum().backward()
        encoded.sum().backward()
        assert torch.equal(x.grad, y.grad)

    def test_both_encoded(self, model, pair):
        a, b = (model.encode(x) for x in pair)
        value, layers = model.distance(a, b, retPerLayer=True)
        expected, expected_layers = model(*pair, retPerLayer=True)
        assert torch.equal(value, expected)
        assert all(torch.equal(x, y) for x, y in zip(layers, expected_layers))

    def test_images_in_0_1(self, model, pair):
        a, b = (x / 2 + 0.5 for x in pair)
        target = model.encode(b, normalize=True)
        assert torch.equal(model(a, target, normalize=True), model(a, b, normalize=True))

    def test_slices_and_conversions(self, model, pair):
        features = model.encode(pair[0])
        assert len(features) == 2 and len(features[1:]) == 1
        assert torch.equal(model(pair[1][1:], features[1:]), model(pair[1], features)[1:])
        assert torch.equal(model(pair[1], features[:1]), model(pair[1], pair[0][:1]))
        assert features.to(torch.float64).taps[0].dtype == torch.float64
        assert features.nbytes() == sum(tap.nbytes for tap in features.taps)
        with pytest.raises(TypeError, match=r"\[1:2\]"):
            features[1]

    def test_sizes_that_differ(self, model, pair):
        features = model.encode(pair[0][..., :40])
        with pytest.raises(ValueError, match=r"differ in size, 48x56 and 48x40"):
            model(pair[1], features)

    def test_gradient_through_both(self, model, pair):
        x, y = (image.clone().requires_grad_() for image in pair)
        model(model.encode(x), model.encode(y)).sum().backward()
        grads = x.grad.clone(), y.grad.clone()
        x.grad = y.grad = None
        model(x, y).sum().backward()
        for grad, expected in zip(grads, (x.grad, y.grad)):
            assert (grad - expected).norm() / expected.norm() < 1e-4


class TestMemory:
    def test_streamed_taps_give_the_same_numbers(self, model, pair, monkeypatch):
        with torch.no_grad():
            expected, layers = model(*pair, retPerLayer=True)
            monkeypatch.setattr("lpips_fast.comparison.routes._STREAMED_FROM", 0)
            streamed, streamed_layers = model(*pair, retPerLayer=True)
        assert torch.equal(streamed, expected)
        assert all(torch.equal(a, b) for a, b in zip(streamed_layers, layers))

    @pytest.mark.parametrize("max_batch", [1, 2, 4, 5, 9])
    def test_max_batch(self, alex_weights, max_batch):
        a, b = image_pair(5, 40, 40, torch.float32, seed=3)
        plain = lpips_fast.LPIPS(weights=alex_weights, verbose=False)
        chunked = lpips_fast.LPIPS(weights=alex_weights, max_batch=max_batch, verbose=False)
        with torch.no_grad():
            for in0, in1 in ((a, b), (a[:1], b), (a, plain.encode(b)), (a[:0], b[:0])):
                value, layers = chunked(in0, in1, retPerLayer=True)
                expected = plain(in0, in1)
                torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
                assert layers[0].shape == expected.shape

    def test_max_batch_must_be_positive(self):
        with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
            lpips_fast.LPIPS(max_batch=0)

    def test_halves_the_batch_when_memory_runs_out(self, model, monkeypatch):
        a, b = image_pair(5, 40, 40, torch.float32, seed=3)
        with torch.no_grad():
            expected = model(a, b)
            inner, seen = routes._layers, []

            def small_memory(call, in0, in1):
                seen.append(len(in0))
                if len(in0) > 2:
                    raise torch.OutOfMemoryError
                return inner(call, in0, in1)

            monkeypatch.setattr(routes, "_layers", small_memory)
            torch.testing.assert_close(model(a, b), expected, rtol=2e-6, atol=0)
        assert max(seen) == 5
        with pytest.raises(torch.OutOfMemoryError):
            model(a, b)  # with a graph, the batch is the user's to choose

    def test_checkpoint(self, alex_weights, pair):
        model = lpips_fast.LPIPS(weights=alex_weights, checkpoint=True, verbose=False)
        plain = lpips_fast.LPIPS(weights=alex_weights, verbose=False)
        x, y = (pair[0].clone().requires_grad_() for _ in range(2))
        result, expected = model(x, pair[1]), plain(y, pair[1])
        assert torch.equal(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, y.grad)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_reduced_precision_trunk(self, alex_weights, pair, dtype):
        model = lpips_fast.LPIPS(weights=alex_weights, dtype=dtype, verbose=False)
        expected = lpips_fast.LPIPS(weights=alex_weights, verbose=False)(*pair)
        result = model(pair[0], pair[1].to(dtype))  # images of any floating dtype
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0)
        x = pair[0].clone().requires_grad_()
        model(x, pair[1]).sum().backward()
        assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


class TestCompile:
    @pytest.mark.parametrize("spatial", [False, True])
    def test_one_graph_forward_and_backward(self, alex_weights, pair, spatial):
        torch._dynamo.reset()  # or earlier tests' models count as compiled again and again
        model = lpips_fast.LPIPS(weights=alex_weights, spatial=spatial, verbose=False)
        compiled = torch.compile(model, fullgraph=True)
        x, y = pair[0].clone().requires_grad_(), pair[0].clone().requires_grad_()
        result, expected = compiled(x, pair[1]), model(y, pair[1])
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
        result.sum().backward()
        expected.sum().backward()
        assert (x.grad - y.grad).norm() / y.grad.norm() < 1e-3

    def test_other_sizes_afterwards(self, model):
        # From the second size on, torch compiles for sizes that it does not know.
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        for size in (48, 64):
            errors = []
            for _ in range(3):
                images = torch.rand(2, 1, 3, size, size) * 2 - 1
                x, y = (images[0].clone().requires_grad_() for _ in range(2))
                result, expected = compiled(x, images[1]), model(y, images[1])
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
                result.sum().backward()
                expected.sum().backward()
                errors.append((x.grad - y.grad).norm() / y.grad.norm())
            assert min(errors) < 1e-3  # a tie in a pooling window goes either way now and then

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_trace(self, model, pair):
        with torch.no_grad():
            traced = torch.jit.trace(model, pair)
            torch.testing.assert_close(traced(*pair), model(*pair), rtol=1e-5, atol=0)

    def test_after_inference_mode(self, model, pair):
        with torch.inference_mode():
            expected = model(*pair)
        x = pair[0].clone().requires_grad_()
        result = model(x, pair[1])
        result.sum().backward()
        torch.testing.assert_close(result, expected.clone(), rtol=1e-5, atol=0)

    def test_forward_mode(self, model, pair):
        (x, target), direction = pair, torch.randn_like(pair[0])
        image = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(image, target).sum(), image)
        with forward_ad.dual_level():
            dual = model(forward_ad.make_dual(x, direction), target)
            tangent = forward_ad.unpack_dual(dual).tangent.sum()
        _, transformed = torch.func.jvp(lambda x: model(x, target).sum(), (x,), (direction,))
        expected = (grad * direction).sum()
        scale = (grad * direction).norm()  # a sum of both signs
        assert abs(tangent - expected) < 2e-2 * scale and abs(transformed - expected) < 2e-2 * scale

    def test_second_derivative(self, model, pair):
        x = pair[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x, pair[1]).sum(), x, create_graph=True)
        grad.square().sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0

    def test_export(self, model, pair):
        program = torch.export.export(model, pair)
        torch.testing.assert_close(program.module()(*pair), model(*pair))


class TestRefusals:
    """Everything wrong is told in one sentence, before any work is done."""

    @pytest.mark.parametrize(
        ("in0", "in1", "error", "message"),
        [
            ((2, 3, 64, 64), (2, 3, 64, 65), ValueError, r"differ in size, 64x64 and 64x65"),
            ((2, 3, 64, 64), (3, 3, 64, 64), ValueError, r"2 and 3 images.*must match"),
            (
                (2, 4, 64, 64),
                (2, 4, 64, 64),
                ValueError,
                r"\(2, 4, 64, 64\), expected \(N, 3, H, W",
            ),
            ((64, 64), (64, 64), ValueError, r"shape \(64, 64\), expected \(N, 3, H, W\)"),
            ((1, 1, 3, 64, 64), (1, 1, 3, 64, 64), ValueError, r"expected \(N, 3, H, W\)"),
            ((1, 3, 30, 64), (1, 3, 30, 64), ValueError, r"30x64 pixels is too small.*31x31"),
        ],
    )
    def test_shapes(self, model, in0, in1, error, message):
        with pytest.raises(error, match=message):
            model(torch.zeros(in0), torch.zeros(in1))

    @pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
    def test_smallest_images_work_and_smaller_ones_are_refused(self, net):
        model = lpips_fast.LPIPS(net=net, pnet_rand=True, verbose=False)
        size = model.minimum_size
        assert model(*image_pair(1, size, size, torch.float32, seed=0)).isfinite().all()
        with pytest.raises(ValueError, match=f"needs at least {size}x{size}"):
            model(*image_pair(1, size - 1, size, torch.float32, seed=0))

    def test_integers(self, model):
        x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        with pytest.raises(TypeError, match=r"in0 is torch\.uint8.*x\.float\(\) / 127\.5 - 1"):
            model(x, x)

    def test_dtypes(self, model, pair):
        with pytest.raises(TypeError, match=r"in1 is torch\.float64 but the model is .*float32"):
            model(pair[0], pair[1].double())

    def test_arrays(self, model, pair):
        with pytest.raises(TypeError, match=r"in1 must be a torch\.Tensor.*ndarray.*im2tensor"):
            model(pair[0], pair[1].numpy())

    def test_devices(self, model, pair):
        with pytest.raises(ValueError, match=r"in0 is on meta but the model is on cpu"):
            model(pair[0].to("meta"), pair[1])


class TestCheckInputs:
    @pytest.fixture
    def checking(self, alex_weights):
        return lpips_fast.LPIPS(weights=alex_weights, check_inputs=True, verbose=False)

    @pytest.mark.parametrize(
        ("change", "normalize", "message"),
        [
            (lambda x: x / 2 + 0.5, False, r"in0 has values .* pass normalize=True"),
            (lambda x: (x + 1) * 127.5, False, r"in0 has values .*x / 127\.5 - 1"),
            (lambda x: x * 3, False, r"expected \[-1, 1\]"),
            (lambda x: x, True, r"expected \[0, 1\] with normalize=True"),
            (
                lambda x: x.clone().index_fill_(3, torch.tensor([0]), torch.nan),
                False,
                rf"{48 * 3} NaN",
            ),
            (lambda x: x.clone().index_fill_(3, torch.tensor([0]), torch.inf), False, r"infinite"),
        ],
    )
    def test_warns(self, checking, pair, change, normalize, message):
        a = pair[0][:1].expand(1, 3, 48, 56)
        with pytest.warns(UserWarning, match=message):
            checking(change(a), pair[1][:1], normalize=normalize)

    def test_silent_on_good_images(self, checking, pair):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checking(*pair)
            checking(*(x / 2 + 0.5 for x in pair), normalize=True)
            checking(pair[0][:0], pair[1][:0])

    def test_warns_where_the_user_called(self, checking, pair):
        with pytest.warns(UserWarning) as record:
            checking(pair[0] * 3, pair[1])
        assert record[0].filename == __file__
