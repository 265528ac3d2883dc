"""LPIPS of some of its layers: values, gradients, checkpoints, features, and what is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast import LPIPS, trunk
from lpips_fast.pairs.all_pairs import plan
from lpips_fast.pairs.embedding import embedding_size

SUBSETS = [(0,), (0, 2), (1, 4), (3,), (0, 1, 2, 3, 4)]


@functools.cache
def weights_of(net: str) -> dict[str, Tensor]:
    return trunk_weights(net)


def model_of(net: str = "alex", **options: Any) -> LPIPS:
    return LPIPS(net=net, weights=weights_of(net), verbose=False, **options)


@pytest.fixture(scope="module")
def full() -> LPIPS:
    return model_of()


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return image_pair(2, 48, 56, torch.float32, seed=0)


class TestValues:
    @pytest.mark.parametrize("layers", SUBSETS)
    def test_every_layer_has_the_bits_that_it_has_among_all(self, full, pair, layers):
        part = model_of(layers=layers)
        value, found = part(*pair, retPerLayer=True)
        _, all_layers = full(*pair, retPerLayer=True)
        assert len(found) == len(layers)
        for k, one in zip(layers, found):
            assert torch.equal(one, all_layers[k])
        assert torch.equal(value, functools.reduce(torch.add, found))

    def test_it_is_a_lower_bound_of_the_whole(self, full, pair):
        assert (model_of(layers=(0, 2))(*pair) < full(*pair)).all()

    @pytest.mark.parametrize("net", ["squeeze"])
    def test_another_trunk(self, net, pair):
        _, all_layers = model_of(net)(*pair, retPerLayer=True)
        _, found = model_of(net, layers=(1, 3))(*pair, retPerLayer=True)
        assert torch.equal(found[0], all_layers[1]) and torch.equal(found[1], all_layers[3])

    def test_baseline_and_old_version(self, pair):
        for options in ({"lpips": False}, {"version": "0.0"}):
            _, all_layers = model_of(**options)(*pair, retPerLayer=True)
            (found,) = model_of(layers=[2], **options)(*pair, retPerLayer=True)[1]
            assert torch.equal(found, all_layers[2])

    def test_maps_are_those_of_the_layers(self, pair):
        _, all_layers = model_of(spatial=True)(*pair, retPerLayer=True)
        value, found = model_of(spatial=True, layers=(1, 2))(*pair, retPerLayer=True)
        assert value.shape == (2, 1, 48, 56)
        assert torch.equal(found[0], all_layers[1]) and torch.equal(found[1], all_layers[2])

    def test_large_images_are_compared_tap_by_tap(self, full):
        pair = image_pair(1, 520, 520, torch.float32, seed=1)  # from here taps are streamed
        found = model_of(layers=(0, 2))(*pair, retPerLayer=True)[1]
        expected = full(*pair, retPerLayer=True)[1]
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[2])

    def test_low_precision_and_chunks(self, pair):
        part = model_of(layers=(0, 3), dtype=torch.bfloat16)
        whole = part(*pair)
        part.max_batch = 1
        with torch.no_grad():
            torch.testing.assert_close(part(*pair), whole, rtol=1e-2, atol=0)

    def test_training_mode_drops_in_the_compared_layers_alone(self, pair):
        part = model_of(layers=(1,)).train()
        torch.manual_seed(0)
        (first,) = part(*pair, retPerLayer=True)[1]
        torch.manual_seed(0)
        a, b = (part.encode(x).taps[0] for x in pair)
        squared = (lpips_fast.normalize_tensor(a) - lpips_fast.normalize_tensor(b)) ** 2
        expected = part.lin1(squared).mean((2, 3), keepdim=True)
        torch.testing.assert_close(first, expected)

    def test_compiled(self, pair):
        part = model_of(layers=(0, 1))
        compiled = torch.compile(part, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*pair), part(*pair), rtol=1e-5, atol=1e-8)
        features = part.encode(pair[1])
        torch.testing.assert_close(compiled(pair[0], features), part(*pair), rtol=1e-5, atol=1e-8)


class TestTheTrunkStops:
    @pytest.mark.parametrize(("layers", "last"), [((0,), 1), ((0, 2), 3), ((4,), 5)])
    def test_behind_the_last_layer(self, pair, layers, last, run_by_hand):
        expected = [f"slice{k}" for k in range(1, last + 1)]
        part = model_of(layers=layers)
        part(*pair)
        assert run_by_hand == expected
        called: list[str] = []
        for k, block in enumerate(part.net.slices(), start=1):
            block.register_forward_hook(lambda *_, name=f"slice{k}": called.append(name))
        part(*pair)  # as modules, one image after the other
        assert called == expected * 2 and run_by_hand == expected

    def test_broken_weights_behind_it_do_not_matter(self, pair):
        part = model_of(layers=(0, 1))
        expected = part(*pair)
        with torch.no_grad():
            for block in part.net.slices()[2:]:
                for parameter in block.parameters():
                    parameter.fill_(float("nan"))
        assert torch.equal(part(*pair), expected)

    def test_features_hold_the_compared_taps_alone(self, pair):
        features = model_of(layers=(0, 2)).encode(pair[0])
        assert [tap.shape[1] for tap in features.taps] == [64, 384]
        assert features.layers == (0, 2) and features.net == "alex"
        assert features[:1].to(torch.float64).layers == (0, 2)

    @pytest.mark.parametrize("net", list(trunk.TRUNKS))
    def test_minimum_size_is_that_of_what_runs(self, net):
        alone = trunk.Trunk(net, weights_of(net))
        layers = range(len(trunk.TRUNKS[net].taps))
        sizes = [trunk.minimum_size(net, (layer,)) for layer in layers]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == trunk.minimum_size(net)
        for layer, size in zip(layers, sizes):
            (tap,) = alone.taps(torch.rand(1, 3, size, size), layers=(layer,))
            assert tap.numel() and torch.isfinite(tap).all()
            assert trunk.tap_shapes(net, (size, size))[layer] == tap.shape[1:]
            if size > 1:  # one pixel less leaves nothing
                assert min(trunk.tap_shapes(net, (size, size - 1))[layer]) == 0

    @pytest.mark.parametrize(("layers", "size"), [((0,), 7), ((0, 1), 15), ((2,), 31)])
    def test_a_model_takes_images_from_that_size(self, layers, size):
        part = model_of(layers=layers)
        image = torch.rand(1, 3, size, size + 3)
        assert part.minimum_size == size and part(image, 1 - image) > 0
        with pytest.raises(ValueError, match=f"at least {size}x{size}"):
            part(image[:, :, 1:], image[:, :, 1:])


class TestGradients:
    @pytest.mark.parametrize("layers", [(0, 2), (3,)])
    @pytest.mark.parametrize("target", ["image", "features", "learns"])
    def test_are_those_of_the_same_layers_among_all(self, full, pair, layers, target):
        def gradients(model: LPIPS, chosen: tuple[int, ...]) -> list[Tensor]:
            in0, in1 = (x.clone().requires_grad_() for x in pair)
            other: Any = in1 if target == "learns" else in1.detach()
            if target == "features":
                other = model.encode(other).detach()
            parts = model(in0, other, retPerLayer=True)[1]
            loss = sum((parts[k] * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)).sum() for k in chosen)
            return list(torch.autograd.grad(loss, [in0, in1] if target == "learns" else [in0]))

        found = gradients(model_of(layers=layers), tuple(range(len(layers))))
        for one, expected in zip(found, gradients(full, layers), strict=True):
            assert (one - expected).norm() <= 1e-5 * expected.norm()

    def test_parameters_that_are_not_compared_get_none(self, pair):
        part = model_of(layers=(0, 1), pnet_tune=True)
        part(*pair).sum().backward()
        for name, parameter in part.named_parameters():
            is_part = name.startswith(("net.slice1.", "net.slice2.", "lin0", "lin1", "lins.0"))
            assert (parameter.grad is not None) == is_part, name

    def test_checkpointing(self, pair):
        grads = []
        for checkpoint in (False, True):
            image = pair[0].clone().requires_grad_()
            model_of(layers=(1, 3), checkpoint=checkpoint)(image, pair[1]).sum().backward()
            grads.append(image.grad)
        torch.testing.assert_close(*grads)


class TestCheckpoints:
    def test_state_dict_has_all_keys_and_loads_both_ways(self, full, reference, pair):
        part = model_of(layers=(0, 2))
        assert list(part.state_dict()) == list(full.state_dict())
        assert part.L == 5 and part.chns == full.chns and len(part.lins) == 5
        theirs = reference.LPIPS(pnet_rand=True, verbose=False)
        theirs.load_state_dict(part.state_dict(), strict=True)
        expected = theirs(*pair, retPerLayer=True)[1]
        loaded = LPIPS(pnet_rand=True, pretrained=False, layers=(0, 2), verbose=False)
        loaded.load_state_dict(theirs.state_dict(), strict=True)
        for k, one in zip((0, 2), loaded(*pair, retPerLayer=True)[1]):
            torch.testing.assert_close(one, expected[k], rtol=1e-5, atol=0)

    def test_copies_keep_their_layers(self, pair):
        part = model_of(layers=(0, 2))
        assert torch.equal(copy.deepcopy(part)(*pair), part(*pair))


class TestManyImages:
    def test_all_pairs_nearest_and_vectors(self, pair):
        part = model_of(layers=(0, 2))
        images = torch.cat(pair)
        expected = torch.cat([part(image[None], images).flatten()[None] for image in images])
        torch.testing.assert_close(part.pairwise(images), expected, rtol=5e-5, atol=1e-6)
        torch.testing.assert_close(part.pairwise(part.encode(images)), part.pairwise(images))
        distances, indices = part.nearest(images, images, k=2)
        assert indices[:, 0].tolist() == [0, 1, 2, 3] and not distances[:, 0].any()
        vectors = part.embed(images)
        assert vectors.shape == (4, embedding_size(part, (48, 56)))
        squared = (vectors[:, None] - vectors).square().sum(-1)
        torch.testing.assert_close(squared, expected, rtol=1e-4, atol=1e-6)

    def test_vectors_of_one_of_the_compared_layers(self, full, pair):
        part = model_of(layers=(0, 2))
        assert torch.equal(part.embed(pair[0], layers=[2]), full.embed(pair[0], layers=[2]))
        with pytest.raises(ValueError, match=r"of which the model compares 0, 2"):
            part.embed(pair[0], layers=[1])

    def test_a_plan_counts_what_runs(self, full):
        part = plan(model_of(layers=(0, 1)), 10, (64, 64))
        assert part.floats_per_image == 14400 + 9408 < plan(full, 10, (64, 64)).floats_per_image
        assert part.peak_bytes < plan(full, 10, (64, 64)).peak_bytes

    def test_learning_the_weights_of_the_compared_layers(self, pair):
        from lpips_fast.judgements.training import Trainer, TrainingOptions

        part = model_of(layers=(0, 2))
        before = copy.deepcopy(part.state_dict())
        ref, other = pair
        triplets = [
            {"ref": r, "p0": o, "p1": -o, "judge": torch.full((1, 1, 1), 0.9)}
            for r, o in zip(ref, other)
        ]
        options = TrainingOptions(epochs=1, decay_epochs=0, batch_size=2, learning_rate=0.01)
        trainer = Trainer(part, triplets, options, progress=False)
        assert trainer.caches
        trainer.train_epoch()
        after = part.state_dict()
        moved = {k for k in range(5) if not torch.equal(*(s[_key(k)] for s in (before, after)))}
        assert moved == {0, 2}

    def test_in_torchmetrics(self, pair):
        metrics = pytest.importorskip("lpips_fast.metrics", reason="torchmetrics is not installed")
        metric = metrics.LPIPSMetric(weights=weights_of("alex"), layers=(0, 2))
        metric.update(*pair)
        torch.testing.assert_close(metric.compute(), model_of(layers=(0, 2))(*pair).mean())


def _key(layer: int) -> str:
    return f"lin{layer}.model.1.weight"


class TestWhatItIs:
    def test_is_told(self, full, capsys):
        assert "layers=(0, 2)" in model_of(layers=(2, 0)).extra_repr()
        assert "layers" not in full.extra_repr()
        LPIPS(weights=weights_of("alex"), layers=(0, 2))
        assert "layers [0, 2]" in capsys.readouterr().out

    def test_any_order_of_integers(self):
        assert model_of(layers=torch.tensor([3, 1])).layers == (1, 3)
        assert model_of(layers=range(2)).layers == (0, 1)

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ((), ValueError, r"layers is empty, .* 0 \(relu1\) to 4 \(relu5\)"),
            ((0, 0), ValueError, "names a layer twice"),
            ((0, 5), ValueError, "layers holds 5"),
            ((-1,), ValueError, "layers holds -1"),
            ((0.0,), TypeError, r"for example layers=\(0, 1, 2\)"),
            ((True,), TypeError, "expected indices"),
            ("01", TypeError, "expected indices"),
            (2, TypeError, "layers is 2, expected indices"),
        ],
    )
    def test_refusals(self, layers, error, message):
        with pytest.raises(error, match=message):
            LPIPS(pnet_rand=True, layers=layers, verbose=False)

    def test_layers_of_another_trunk(self):
        assert model_of("squeeze", layers=(6,)).layers == (6,)
        with pytest.raises(ValueError, match=r"layers of 'vgg', 0 \(relu1_2\) to 4 \(relu5_3\)"):
            model_of("vgg", layers=(6,))

    def test_the_trunk_alone(self):
        alone = trunk.Trunk("alex", weights_of("alex"))
        image = torch.rand(1, 3, 48, 48)
        by_hand = alone.fast_slices(image.device, image.dtype)
        taps = list(alone.taps(image, layers=(1,), fast=by_hand))
        assert len(taps) == 1 and torch.equal(taps[0], alone(image)[1])
        assert isinstance(alone.slices()[0], nn.Module)
