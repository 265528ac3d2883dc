"""The same numbers as the unmodified ``lpips`` 0.1.4."""

from __future__ import annotations

import pytest
import torch
from parity import (
    AS_A_LOSS,
    LOSS_MODES,
    MODES,
    NETS,
    VERSIONS,
    compare,
    image_pair,
    models,
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
    """richzhang/PerceptualSimilarity, issues 95 and 120, on the repository's example images."""

    @pytest.mark.parametrize(
        ("pair", "published"),
        [(("ref", "p0"), 0.721881), (("ref", "p1"), 0.138), (("p0", "p1"), 0.719658)],
    )
    def test_alex(self, real_weights, example_images, pair, published):
        model = lpips_fast.LPIPS(net="alex", weights=real_weights, verbose=False)
        images = [
            lpips_fast.im2tensor(lpips_fast.load_image(str(example_images[name]))) for name in pair
        ]
        digits = len(str(published).split(".")[1])
        assert round(model(*images).item(), digits) == published

    def test_squeeze_equals_the_original(self, real_weights, example_images, reference):
        model = lpips_fast.LPIPS(net="squeeze", weights=real_weights, verbose=False)
        theirs = reference.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
        theirs.load_state_dict(model.state_dict())
        images = [
            lpips_fast.im2tensor(lpips_fast.load_image(str(example_images[name])))
            for name in ("ref", "p0")
        ]
        assert f"{model(*images).item():.6f}" == f"{theirs(*images).item():.6f}"
