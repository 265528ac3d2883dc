"""The same numbers as the unmodified ``lpips`` 0.1.4."""

from __future__ import annotations

import pytest
import torch
from parity import (
    AS_A_LOSS,
    LOSS_MODES,
    MODES,
    NETS,
    PUBLISHED,
    VERSIONS,
    compare,
    compare_on_photographs,
    image_pair,
    models,
    photograph_crops,
    real_models,
    relative,
)

import lpips_fast


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("net", NETS)
class TestSameNumbers:
    def test_float32(self, reference, net, version, mode):
        # Where a ReLU or a max-pool stands within rounding of its kink, two float32 evaluations
        # send the gradient along different paths. That is the image's doing: draw another then.
        for seed in range(3):
            errors = compare(reference, net, version, mode, torch.float32, seed=seed)
            assert errors.values < 1e-5
            if max(errors) < 1e-4:
                return
        raise AssertionError(f"gradients differ on three images, last {errors}")

    def test_float64(self, reference, net, version, mode):
        errors = compare(reference, net, version, mode, torch.float64, batch=1, size=(37, 45))
        assert max(errors) < 1e-10


@pytest.mark.parametrize("mode", LOSS_MODES)
@pytest.mark.parametrize("net", NETS)
class TestAsALoss:
    def test_float32(self, reference, net, mode):
        for seed in range(6):  # kinks again, and more of them in larger images
            errors = compare(reference, net, "0.1", mode, torch.float32, seed=seed, **AS_A_LOSS)
            assert max(errors.values, errors.weight_gradients) < 1e-5
            if max(errors) < 2e-4:
                return
        raise AssertionError(f"gradients differ on six images, last {errors}")

    def test_float64(self, reference, net, mode):
        options = {**AS_A_LOSS, "size": (47, 55)}
        assert max(compare(reference, net, "0.1", mode, torch.float64, **options)) < 1e-10


@pytest.mark.parametrize("net", NETS)
class TestInputs:
    @pytest.mark.parametrize(
        ("batch", "size"), [(1, (64, 64)), (3, (33, 32)), (1, (97, 31)), (2, (40, 129))]
    )
    def test_batches_and_sizes(self, reference, net, batch, size):
        assert compare(reference, net, "0.1", "distance", torch.float32, batch, size).values < 1e-5
        assert max(compare(reference, net, "0.1", "distance", torch.float64, batch, size)) < 1e-10

    def test_images_in_0_1(self, reference, net):
        ours, theirs = models(reference, net, "0.1", torch.float32)
        in0, in1 = (x / 2 + 0.5 for x in image_pair(2, 64, 48, torch.float32, seed=2))
        result, expected = ours(in0, in1, normalize=True), theirs(in0, in1, normalize=True)
        assert relative(result, expected) < 1e-5

    def test_one_against_many_and_gray(self, reference, net):
        ours, theirs = models(reference, net, "0.1", torch.float32)
        in0, in1 = image_pair(3, 64, 48, torch.float32, seed=3)
        for a, b in ((in0[:1], in1), (in0, in1[:1]), (in0[:, :1], in1), (in0[0], in1[0])):
            result, expected = ours(a, b), theirs(a, b)
            assert result.shape == expected.shape
            assert relative(result, expected) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, reference, net, dtype):
        ours, theirs = models(reference, net, "0.1", torch.float32)
        in0, in1 = image_pair(2, 64, 48, torch.float32, seed=4)
        expected = theirs(in0, in1)
        result = ours.to(dtype)(in0.to(dtype), in1.to(dtype))
        # What half precision costs in the trunk; the original's own error is as large or larger.
        assert relative(result.float(), expected) < (0.01 if dtype == torch.float16 else 0.05)
        original = theirs.to(dtype)(in0.to(dtype), in1.to(dtype))
        assert relative(result.float(), original.float()) < 0.1

    def test_training_mode_without_dropout(self, reference, net):
        ours, theirs = models(
            reference, net, "0.1", torch.float32, eval_mode=False, use_dropout=False
        )
        assert ours.training and theirs.training
        pair = image_pair(2, 64, 48, torch.float32, seed=5)
        assert relative(ours(*pair), theirs(*pair)) < 1e-5

    def test_training_mode_with_dropout(self, reference, net):
        ours, theirs = models(reference, net, "0.1", torch.float32, eval_mode=False)
        pair = image_pair(1, 48, 48, torch.float32, seed=6)
        results = []
        for model in (ours, theirs):
            torch.manual_seed(7)
            results.append(torch.stack([model(*pair) for _ in range(8)]))
        # Dropout draws the same stream for tensors of one shape, whatever their memory order is.
        assert results[0].std() > 0
        assert abs(results[0].mean() / results[1].mean() - 1) < 0.1


class TestPublishedNumbers:
    """The original repository's example images, with ImageNet's weights."""

    @pytest.mark.parametrize(("net", "pair"), PUBLISHED)
    def test_published(self, request, monkeypatch, example_images, net, pair):
        if net == "alex":  # with nothing but the package
            monkeypatch.delenv("LPIPS_FAST_WEIGHTS", raising=False)
            weights = None
        else:
            weights = real_trunk(request.getfixturevalue("real_weights"), net)
        model = lpips_fast.LPIPS(net=net, weights=weights, verbose=False)
        value = model(*load(example_images, pair)).item()
        published = PUBLISHED[net, pair]
        assert f"{value:.{len(published.split('.')[1])}f}" == published

    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("net", NETS)
    def test_each_layer_equals_the_originals(
        self, real_weights, example_images, reference, net, version
    ):
        ours, theirs = real_models(reference, net, version, real_trunk(real_weights, net))
        for pair in (("ref", "p0"), ("ref", "p1"), ("p0", "p1")):
            images = load(example_images, pair)
            value, layers = ours(*images, retPerLayer=True)
            expected, expected_layers = theirs(*images, retPerLayer=True)
            assert relative(value, expected) < 1e-5
            assert len(layers) == len(expected_layers) == len(theirs.chns)
            for result, part in zip(layers, expected_layers):
                assert result.shape == part.shape
                assert relative(result, part) < 1e-5


@pytest.mark.parametrize("net", NETS)
def test_photographs(real_weights, reference, net):
    pytest.importorskip("skimage", reason="the photographs are scikit-image's")
    crops = photograph_crops(8, 48)
    errors = compare_on_photographs(
        reference, net, "0.1", crops, real_trunk(real_weights, net)
    ).from_lpips
    assert len(errors.value) == len(crops)
    assert errors.value.max() < 1e-5
    assert errors.layer.max() < 5e-5  # a layer's part may be near zero
    # A gradient may go another way at a kink; not in most images.
    assert errors.gradient.median() < 1e-3


def load(images, names):
    return [lpips_fast.im2tensor(lpips_fast.load_image(str(images[name]))) for name in names]


def real_trunk(folder, net):
    """The folder, if it holds this trunk."""
    source = lpips_fast.weights.TRUNK_SOURCES[net]
    if lpips_fast.weights.search.find_in_folder(source, folder) is None:
        pytest.skip(f"no weights of {net} in the folder of real weights")
    return folder
