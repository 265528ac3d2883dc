"""Every normalisation against its formula in NumPy's float64, its properties, and the model."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, declare_torchvision_operators
from image_folders import call
from many_images import model_of, some_images
from parity import trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast import LPIPS, functional
from lpips_fast.analysis import attention_map
from lpips_fast.cli.model import metric_name
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.judgements.cached_triplets import channel_means, dropout_deviations
from lpips_fast.normalization import (
    EPS,
    NORMALIZATIONS,
    LearnedNorm,
    accumulator_dtype,
    channel_norms,
    check_normalization,
    cosine_distance_map,
    normalize_features,
    normalize_tensor,
    scale_sensitivity,
)
from lpips_fast.weights import WeightsError

KINDS = tuple(NORMALIZATIONS)
STANDARDIZED = ("layer", "instance", "batch")
OTHERS = tuple(kind for kind in KINDS if kind != "l2")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14}

each = pytest.mark.parametrize("kind", KINDS)
others = pytest.mark.parametrize("kind", OTHERS)


@pytest.fixture(scope="module")
def models() -> dict[str, LPIPS]:
    return {kind: model_of("squeeze", normalization=kind) for kind in KINDS}


def some_features(
    generator: torch.Generator,
    shape: tuple[int, ...] = (2, 7, 3, 4),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Both signs, a vector of zeros, one of equal numbers, and single zeros."""
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    features[:, ::3, -1] = 0
    features[0, :, 0, 0] = 0
    features[1, :, 0, 1] = 0.3
    return features.to(dtype)


def oracle(features: Tensor, kind: str, eps: float = EPS) -> Tensor:
    """The tables of the module, vector by vector."""
    values = features.detach().double().numpy()
    result = np.empty_like(values)
    if kind in STANDARDIZED:  # (images, channels) that share a mean and a deviation
        n, c = values.shape[:2]
        together = {
            "layer": [(slice(k, k + 1), slice(None)) for k in range(n)],
            "instance": [(slice(k, k + 1), slice(m, m + 1)) for k in range(n) for m in range(c)],
            "batch": [(slice(None), slice(m, m + 1)) for m in range(c)],
        }
        for where in together[kind]:
            a = values[where]
            result[where] = (a - a.mean()) * (np.ptp(a) > 0) / (a.std() + eps)
        return torch.from_numpy(result)
    for n, y, x in np.ndindex(values.shape[0], *values.shape[2:]):
        a = values[n, :, y, x]
        result[n, :, y, x] = {
            "l2": lambda a: a / (math.sqrt(sum(v * v for v in a)) + eps),
            "l1": lambda a: a / (sum(abs(v) for v in a) + eps),
            "max": lambda a: a / (max(abs(v) for v in a) + eps),
            # Of equal numbers nothing is left; their mean is not to the bit what they are.
            "std": lambda a: (a - a.mean()) * (np.ptp(a) > 0) / (a.std() + eps),
            "none": lambda a: a,
        }[kind](a)
    return torch.from_numpy(result)


class TestFormula:
    @each
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_the_oracle(self, kind: str, dtype: torch.dtype, generator) -> None:
        features = some_features(generator, dtype=dtype)
        result = normalize_features(features, kind)
        assert result.dtype == accumulator_dtype(dtype) and result.shape == features.shape
        # Of the half's own value, for the features are what they are: only sums are rounded.
        torch.testing.assert_close(
            result.double(), oracle(features, kind), rtol=1e-5, atol=ROUNDING.get(dtype, 1e-6)
        )
        eps = 0.25
        torch.testing.assert_close(
            normalize_features(features.double(), kind, eps), oracle(features, kind, eps)
        )

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("channels", [2, 64, 513])
    @pytest.mark.parametrize("value", [0.1, -3e4, 1e-7, 1 / 3])
    def test_equal_numbers_have_no_deviation(self, layout, channels, value) -> None:
        features = torch.full((1, channels, 3, 5), value).contiguous(memory_format=layout)
        assert (normalize_features(features, "std") == 0).all()

    def test_nearly_equal_numbers_have_one(self, generator) -> None:
        features = 1 + 1e-4 * torch.randn(1, 64, 3, 3, generator=generator)
        norms = channel_norms(normalize_features(features, "std"))
        torch.testing.assert_close(norms, torch.full_like(norms, 8.0), rtol=1e-4, atol=0)

    def test_l2_is_normalize_tensor(self, generator) -> None:
        features = some_features(generator)
        assert torch.equal(normalize_features(features), normalize_tensor(features))
        assert lpips_fast.normalize_tensor is normalize_tensor
        assert functional.normalize_features is lpips_fast.normalize_features is normalize_features

    @each
    def test_half_precision_neither_overflows_nor_vanishes(self, kind: str) -> None:
        features = torch.full((1, 300, 1, 2), 6e4, dtype=torch.float16)
        features[:, ::2] *= -1
        features[..., 1].sign_().mul_(2**-24)  # float16's smallest number
        result = normalize_features(features, kind)
        assert result.isfinite().all() and (result != 0).all()
        torch.testing.assert_close(result.double(), oracle(features, kind), rtol=1e-4, atol=1e-7)

    @each
    def test_nothing_is_written_over(self, kind: str, generator) -> None:
        features = some_features(generator)
        before = features.clone()
        normalize_features(features, kind)
        assert torch.equal(features, before)


class TestGradients:
    @each
    def test_gradcheck(self, kind: str, generator) -> None:
        a, b = (some_features(generator, (2, 5, 2, 2)) for _ in range(2))
        if kind == "max":  # has no derivative where channels share the maximum, but for zeros
            a[1, :, 0, 1], b[1, :, 0, 1] = torch.randn(2, 5, generator=generator).double()
        a, b = a.requires_grad_(), b.requires_grad_()
        w = torch.rand(5, generator=generator, dtype=torch.float64, requires_grad=True)
        # With a large eps differences of the function can be taken at vectors of zeros too.
        for eps in (0.3, 0.03):
            assert torch.autograd.gradcheck(lambda x, e=eps: normalize_features(x, kind, e), (a,))
            assert torch.autograd.gradcheck(
                lambda a, b, w, e=eps: functional.distance([a], [b], [w], e, normalization=kind),
                (a, b, w),
            )

    @each
    def test_gradgradcheck_away_from_kinks(self, kind: str, generator) -> None:
        x = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: normalize_features(x, kind, 0.1), (x,))

    @each
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_finite_everywhere(self, kind: str, dtype: torch.dtype, generator) -> None:
        a = some_features(generator, dtype=dtype)
        b = some_features(generator, dtype=dtype)
        b[:, :, 1] = 0  # zeros against others, zeros against zeros, equal numbers against others
        b[1, :, 0, 2] = 2.5
        b[1, :, 0, 1] = 0.3
        w = torch.rand(7, generator=generator, dtype=accumulator_dtype(dtype))
        a, b, w = (x.requires_grad_() for x in (a, b, w))
        for grads in (
            torch.autograd.grad(m.sum(), (a, b, w))
            for m in functional.distance_map([a], [b], [w], normalization=kind)
        ):
            assert all(g.isfinite().all() for g in grads)
            assert all(g.abs().sum() > 0 for g in grads)
            assert all(g.dtype == x.dtype for g, x in zip(grads, (a, b, w)))
        both_zero = grads[0][0, :, 0, 0]
        assert kind in STANDARDIZED or (both_zero == 0).all()
        assert (a[0, :, 0, 0] == 0).all() and (b[0, :, 0, 0] == 0).all()

    @each
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_finite_where_all_is_equal(self, kind: str, dtype: torch.dtype, generator) -> None:
        a = torch.full((2, 7, 3, 4), 0.3, dtype=dtype)
        a[0] = 0
        a = a.requires_grad_()
        b = some_features(generator, dtype=dtype)
        (result,) = functional.distance_map([a], [b], normalization=kind)
        (grad,) = torch.autograd.grad(result.sum(), a)
        assert result.isfinite().all() and grad.isfinite().all()

    @each
    def test_identical_features_rest(self, kind: str, generator) -> None:
        a = some_features(generator, dtype=torch.float32).requires_grad_()
        b = a.detach().clone()
        (result,) = functional.distance_map([a], [b], normalization=kind)
        assert (result == 0).all()
        (grad,) = torch.autograd.grad(result.sum(), a)
        assert (grad == 0).all()


class TestDistance:
    @each
    def test_against_the_oracle(self, kind: str, generator) -> None:
        a, b = some_features(generator), some_features(generator)
        w = torch.rand(7, generator=generator, dtype=torch.float64)
        squares = (oracle(a, kind) - oracle(b, kind)) ** 2
        expected = (squares * w.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        (maps,) = functional.distance_map([a], [b], [w], normalization=kind)
        torch.testing.assert_close(maps, expected)
        distances = functional.distance([a], [b], [w], normalization=kind)
        torch.testing.assert_close(distances, expected.mean(dim=(1, 2, 3)).view(2, 1))

    @each
    def test_symmetric_to_the_bit(self, kind: str, generator) -> None:
        a, b = (some_features(generator, dtype=torch.float32) for _ in range(2))
        there, back = (
            functional.distance([x], [y], normalization=kind) for x, y in ((a, b), (b, a))
        )
        assert torch.equal(there, back)

    @pytest.mark.parametrize("name", ["L2", "group", "", None, True, ["l2"]])
    def test_unknown(self, name: Any) -> None:
        features = torch.rand(1, 2, 3, 3)
        for attempt in (
            lambda: check_normalization(name),
            lambda: normalize_features(features, name),
            lambda: functional.distance([features], [features], normalization=name),
            lambda: functional.distance_map([features], [features], normalization=name),
            lambda: channel_means([features], [features], name),
            lambda: LPIPS(pnet_rand=True, verbose=False, normalization=name),
        ):
            with pytest.raises(
                ValueError, match=r"unknown normalization .* none, layer, instance, batch"
            ):
                attempt()


class TestProperties:
    @pytest.mark.parametrize(
        ("kind", "order"), [("l2", 2.0), ("l1", 1.0), ("max", math.inf)], ids=["l2", "l1", "max"]
    )
    def test_unit_norms(self, kind: str, order: float, generator) -> None:
        features = some_features(generator)
        norms = channel_norms(normalize_features(features, kind), order)
        is_zero = (features == 0).all(dim=1, keepdim=True)
        assert norms.shape == (2, 1, 3, 4) and is_zero.sum() == 1
        torch.testing.assert_close(norms, (~is_zero).double())

    def test_standardised_vectors(self, generator) -> None:
        features = normalize_features(torch.randn(2, 9, 3, 4, generator=generator).double(), "std")
        torch.testing.assert_close(features.mean(dim=1), torch.zeros(2, 3, 4).double())
        torch.testing.assert_close(
            features.std(dim=1, correction=0), torch.ones(2, 3, 4, dtype=torch.float64)
        )

    def test_l2_distance_is_twice_one_minus_cosine(self, generator) -> None:
        a, b = some_features(generator), some_features(generator)
        b[:, :, 1] = 0
        (expected,) = functional.distance_map([a], [b])
        torch.testing.assert_close(cosine_distance_map(a, b), expected)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)[:, None]
        has_angle = (channel_norms(a) > 0) & (channel_norms(b) > 0)
        assert 8 < has_angle.sum() < has_angle.numel()
        torch.testing.assert_close((2 - 2 * cosine)[has_angle], expected[has_angle])

    def test_std_distance_is_twice_c_times_one_minus_correlation(self, generator) -> None:
        a, b = (torch.randn(1, 11, 1, 1, generator=generator).double() for _ in range(2))
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        (result,) = functional.distance_map([a], [b], normalization="std")
        torch.testing.assert_close(result.view(()), 2 * 11 * (1 - correlation))

    @each
    @pytest.mark.parametrize("factor", [1e-3, 0.5, 700.0])
    def test_scale(self, kind: str, factor: float, generator) -> None:
        a, b = some_features(generator), some_features(generator)
        change = scale_sensitivity(a, b, factor, kind)
        assert change.shape == (2,)
        if NORMALIZATIONS[kind].is_scale_invariant:
            assert change.max() < 1e-6
        else:
            assert kind == "none" and change.min() > 0.05
        # One factor for each image of a batch, as the model sees it.
        factors = torch.tensor([factor, 1 / factor], dtype=torch.float64).view(2, 1, 1, 1)
        both = [
            functional.distance([x], [y], normalization=kind)
            for x, y in ((a, b), (a * factors, b * factors.flip(0)))
        ]
        same = torch.allclose(*both, rtol=1e-6)
        assert same == (NORMALIZATIONS[kind].is_scale_invariant and kind != "batch")

    def test_factor(self) -> None:
        x = torch.rand(1, 2, 2, 2)
        for factor in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="expected a number above 0"):
                scale_sensitivity(x, x, factor)


class TestWhatIsLost:
    """For each of the others, a property of LPIPS that it has not."""

    def test_locality(self, generator) -> None:
        a, b = (torch.randn(1, 6, 4, 4, generator=generator).double() for _ in range(2))
        changed = b.clone()
        changed[..., 0, 0] *= torch.arange(1, 7)
        for kind in KINDS:
            before, after = (
                functional.distance_map([a], [x], normalization=kind)[0].flatten()
                for x in (b, changed)
            )
            assert before[0] != after[0]
            assert torch.equal(before[1:], after[1:]) == (kind not in STANDARDIZED)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_channels_contrast_is_seen(self, kind: str, generator) -> None:
        a = torch.rand(2, 6, 4, 4, generator=generator).double()
        contrast = torch.rand(6, generator=generator).double().view(1, -1, 1, 1) + 0.5
        (distances,) = functional.distance([a], [a * contrast + 0.3], normalization=kind).T
        is_blind = kind in ("instance", "batch")
        assert (distances < 1e-12).all() if is_blind else (distances > 1e-3).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_pairs_do_not_know_of_each_other(self, kind: str, generator) -> None:
        a, b = (torch.rand(3, 6, 4, 4, generator=generator).double() for _ in range(2))
        b[0] = a[0]  # the same image beside others
        together = functional.distance([a], [b], normalization=kind)
        alone = torch.cat(
            [
                functional.distance([a[k : k + 1]], [b[k : k + 1]], normalization=kind)
                for k in range(3)
            ]
        )
        assert alone[0] == 0
        if kind == "batch":
            assert together[0] > 1e-3 and (together - alone).abs().min() > 1e-3
        else:
            assert together[0] == 0
            torch.testing.assert_close(together, alone)

    def test_a_learned_shift_ends_scale_invariance(self, generator) -> None:
        a, b = (torch.rand(2, 6, 4, 4, generator=generator).double() for _ in range(2))
        norm = LearnedNorm(6)

        def distances() -> list[Tensor]:
            return [((norm(f * a) - norm(b)) ** 2).sum(dim=1).mean() for f in (1, 5)]

        torch.testing.assert_close(*distances())
        norm.shift.data.fill_(0.5)
        one, five = distances()
        assert abs(one - five) > 0.05 * one

    def test_attention_ends_symmetry(self) -> None:
        model, images = model_of("squeeze"), some_images(4)
        a, b = images[:2], images[2:]
        masks = attention_map(model, images)
        assert masks.shape == (4, 1, 48, 40) and masks.min() >= 0
        assert torch.equal(masks.amax(dim=(2, 3)).flatten(), torch.ones(4))
        with torch.no_grad():
            there, back = model(a, b, mask=masks[:2]), model(b, a, mask=masks[2:])
            assert torch.equal(model(a, b, mask=masks[:2]), model(b, a, mask=masks[:2]))
            assert (model(a, a, mask=masks[:2]) == 0).all()
        assert not torch.allclose(there, back, rtol=1e-3)
        no_answer = model_of("squeeze")
        for p in no_answer.net.parameters():
            p.data.zero_()
        assert (attention_map(no_answer, images) == 1).all()


class TestBatch:
    def test_a_batch_is_never_divided(self) -> None:
        model = model_of("squeeze", normalization="batch")
        images = some_images(6)
        with torch.no_grad():
            whole = model(images[:3], images[3:])
            model.max_batch = 1
            assert torch.equal(model(images[:3], images[3:]), whole)
        with pytest.raises(ValueError, match="takes a batch as a whole, which max_batch divides"):
            LPIPS(pnet_rand=True, verbose=False, normalization="batch", max_batch=2)
        from lpips_fast.folders.measures import Distance

        with pytest.raises(ValueError, match="depends on the pairs beside it"):
            Distance(model)

    @each
    def test_no_images(self, kind: str) -> None:
        nothing = torch.zeros(0, 5, 3, 3)
        assert normalize_features(nothing, kind).shape == nothing.shape


class TestLearned:
    def test_it_begins_as_l2(self, models: dict[str, LPIPS]) -> None:
        model = model_of("squeeze", normalization="learned")
        in0, in1 = some_images(2), some_images(2)
        with torch.no_grad():
            torch.testing.assert_close(model(in0, in1), models["l2"](in0, in1))
            assert (model(in0, in0.clone()) == 0).all()
        assert all(isinstance(norm, LearnedNorm) for norm in model.norms)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients_are_finite(self, dtype: torch.dtype, generator) -> None:
        features = some_features(generator, dtype=dtype).requires_grad_()
        norm = LearnedNorm(7).to(torch.float64 if dtype == torch.float64 else torch.float32)
        norm.log_scale.data.fill_(0.2)
        for shift in (0.0, 0.4):
            norm.shift.data.fill_(shift)
            result = norm(features)
            assert result.dtype == accumulator_dtype(dtype)
            leaves = [features, *norm.parameters()]
            grads = torch.autograd.grad((result * torch.arange(7.0).view(7, 1, 1)).sum(), leaves)
            assert all(g.isfinite().all() for g in grads)
        if dtype == torch.float64:
            assert torch.autograd.gradcheck(norm, (features,))

    def test_checkpoints(self, tmp_path) -> None:
        model = model_of("squeeze", normalization="learned")
        for norm in model.norms:
            norm.log_scale.data.uniform_(-0.2, 0.2)
            norm.shift.data.uniform_(0.1, 0.9)
        file = tmp_path / "model.pth"
        torch.save(model.state_dict(), file)
        in0, in1 = some_images(2), some_images(2)
        loaded = {
            "model_path": LPIPS(
                net="squeeze", pnet_rand=True, model_path=file, normalization="learned"
            ),
            "weights": LPIPS(net="squeeze", weights=file, normalization="learned", frozen=True),
        }
        with torch.no_grad():
            expected = model(in0, in1)
            for other in loaded.values():
                torch.testing.assert_close(other(in0, in1), expected, rtol=1e-6, atol=0)
        for argument in ({"pnet_rand": True, "model_path": file}, {"weights": file}):
            with pytest.raises(WeightsError, match="load them with normalization='learned'"):
                LPIPS(net="squeeze", **argument)
        state = {k: v for k, v in model.state_dict().items() if k != "norms.1.shift"}
        torch.save(state, file)
        with pytest.raises(WeightsError, match=r"'norms\.1\.shift' is missing"):
            LPIPS(net="squeeze", weights=file, normalization="learned")
        with pytest.raises(ValueError, match="learns beside the linear weights"):
            LPIPS(pnet_rand=True, lpips=False, normalization="learned")

    def test_frozen(self) -> None:
        model = model_of("squeeze", normalization="learned", frozen=True)
        parent = torch.nn.ModuleDict({"loss": model}).requires_grad_(True)
        image = some_images(1).requires_grad_()
        model(image, some_images(1)).sum().backward()
        assert image.grad is not None and image.grad.isfinite().all()
        assert all(p.grad is None for p in model.parameters())
        assert not parent.state_dict()

    def test_training(self, tmp_path) -> None:
        from lpips_fast.judgements.training import Trainer, TrainingOptions, new_model

        images = some_images(18, (32, 32))
        items = [
            {"ref": r, "p0": p, "p1": q, "judge": torch.tensor(float(k % 2))}
            for k, (r, p, q) in enumerate(zip(*images.chunk(3)))
        ]
        options = TrainingOptions(1, 0, batch_size=2, learning_rate=0.01)
        model = new_model(
            "squeeze", initialization="pretrained", random_trunk=True, normalization="learned"
        )
        trainer = Trainer(model, items, options, progress=False)
        assert not trainer.caches
        trainer.run(tmp_path, curve=False)
        moved = torch.cat([p.detach() for p in model.norms.parameters()])
        assert (moved != 0).any() and all((norm.shift >= 0).all() for norm in model.norms)
        again = LPIPS(
            net="squeeze", weights=tmp_path / "model.pth", normalization="learned", verbose=False
        )
        with torch.no_grad():
            pair = images[:2], images[2:4]
            torch.testing.assert_close(again(*pair), model.eval()(*pair), rtol=1e-5, atol=0)


class TestModel:
    @others
    def test_it_is_the_sum_over_layers(self, kind: str, models: dict[str, LPIPS]) -> None:
        model = models[kind]
        in0, in1 = some_images(2, (32, 24)), some_images(2, (32, 24))
        with torch.no_grad():
            value, layers = model(in0, in1, retPerLayer=True)
            f0, f1 = model.encode(in0), model.encode(in1)
            expected = []
            for k, (a, b) in enumerate(zip(f0.taps, f1.taps)):
                squares = (oracle(a, kind) - oracle(b, kind)) ** 2
                weight = model.lins[k].model[-1].weight.double().view(1, -1, 1, 1)
                expected.append((weight * squares).sum(dim=1).mean(dim=(1, 2)))
            for layer, reference in zip(layers, expected, strict=True):
                torch.testing.assert_close(layer.flatten().double(), reference, rtol=2e-5, atol=0)
            torch.testing.assert_close(sum(layers), value)
            torch.testing.assert_close(model.distance(f0, f1), value)
            assert (model(in0, in0.clone()) == 0).all()

            maps = copy.copy(model)
            maps.spatial = True
            image, layer_maps = maps(in0, in1, retPerLayer=True)
            assert image.shape == (2, 1, 32, 24)
            torch.testing.assert_close(sum(layer_maps), image)
            # Enlarged first, averaged then: near the distance, not it.
            torch.testing.assert_close(image.mean(dim=(1, 2, 3)), value.flatten(), rtol=0.3, atol=0)

    def test_they_differ(self, models: dict[str, LPIPS]) -> None:
        in0, in1 = some_images(2), some_images(2)
        with torch.no_grad():
            values = {kind: model(in0, in1).sum().item() for kind, model in models.items()}
            plain = model_of("squeeze")
            assert plain.normalization == "l2" and plain(in0, in1).sum().item() == values["l2"]
        assert len({f"{value:.4g}" for value in values.values()}) == len(KINDS)

    @others
    def test_backward(self, kind: str) -> None:
        # Against autograd through the sum as it is written. Finite differences of a whole network
        # meet a ReLU's kink now and then, or a vector near zero that turns within any step.
        model = model_of("squeeze", normalization=kind).double()
        target = some_images(1, dtype=torch.float64)
        image = some_images(1, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(model(image, target).sum(), image)
        taps0, taps1 = (model.net(model.scaling_layer(t)) for t in (image, target))
        value = 0.0
        for k, (a, b) in enumerate(zip(taps0, taps1, strict=True)):
            squares = (normalize_features(a, kind) - normalize_features(b, kind)) ** 2
            weight = model.lins[k].model[-1].weight.double().view(1, -1, 1, 1)
            value = value + (weight * squares).sum(dim=1).mean()
        (expected,) = torch.autograd.grad(value, image)
        assert expected.norm() > 0
        assert (grad - expected).norm() <= 1e-9 * expected.norm()

    @others
    def test_black_images(self, kind: str) -> None:
        model = model_of("squeeze", normalization=kind)
        image = torch.full((1, 3, 40, 40), -1.0, requires_grad=True)
        model(image, some_images(1, (40, 40))).sum().backward()
        assert image.grad is not None and image.grad.isfinite().all()

    @others
    def test_dropout(self, kind: str) -> None:
        model = model_of("squeeze", normalization=kind).train()
        in0, in1 = some_images(1), some_images(1)
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = [model(in0, in1).item() for _ in range(24)]
            expected = model.eval()(in0, in1).item()
        assert len(set(drawn)) > 12
        assert sum(drawn) / len(drawn) == pytest.approx(expected, rel=0.5)

    @pytest.mark.parametrize("kind", ["l1", "std"])
    def test_compile(self, kind: str, generator) -> None:
        a = torch.rand(1, 6, 4, 4, generator=generator, requires_grad=True)
        b = torch.rand(1, 6, 4, 4, generator=generator)

        def distance(a: Tensor) -> Tensor:
            return functional.distance([a], [b], normalization=kind).sum()

        compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(a), distance(a))
        gradients = [torch.autograd.grad(f(a), a)[0] for f in (compiled, distance)]
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("kind", ["max", "none"])
    def test_compiled_model(self, kind: str, models: dict[str, LPIPS]) -> None:
        in0, in1 = some_images(1, (32, 32)), some_images(1, (32, 32))
        compiled = torch.compile(models[kind], fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(in0, in1), models[kind](in0, in1))

    @others
    def test_autocast_and_dtype(self, kind: str, models: dict[str, LPIPS]) -> None:
        in0, in1 = some_images(1), some_images(1)
        with torch.no_grad():
            exact = models[kind](in0, in1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                lowered = models[kind](in0, in1)
            half = model_of("squeeze", normalization=kind, dtype=torch.bfloat16)(in0, in1)
        for value in (lowered, half):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, exact, rtol=0.05, atol=0)

    def test_it_is_told(self, models: dict[str, LPIPS], capsys: pytest.CaptureFixture[str]) -> None:
        assert "normalization='max'" in repr(models["max"])
        assert "normalization='l2'" in repr(models["l2"])
        capsys.readouterr()
        LPIPS(net="squeeze", pnet_rand=True, normalization="l1")
        assert "spatial [off], normalization [l1]" in capsys.readouterr().out
        LPIPS(net="squeeze", pnet_rand=True)  # the original's own line
        assert "normalization" not in capsys.readouterr().out

    def test_checkpoints_are_the_same(self, models: dict[str, LPIPS]) -> None:
        models["l1"].load_state_dict(models["l2"].state_dict(), strict=True)

    def test_what_needs_l2_refuses(self, models: dict[str, LPIPS]) -> None:
        images = some_images(2)
        for attempt in (
            lambda: models["l1"].pairwise(images),
            lambda: models["l1"].nearest(images, images, 1),
            lambda: models["l1"].embed(images),
        ):
            with pytest.raises(ValueError, match="made with normalization='l2', but the model has"):
                attempt()


@each
def test_channel_means(kind: str, generator) -> None:
    a, b = some_features(generator), some_features(generator)
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    (means,) = channel_means([a], [b], kind)
    expected = functional.distance([a], [b], [weight], normalization=kind)
    torch.testing.assert_close(means @ weight, expected[:, 0])
    squares = (oracle(a, kind) - oracle(b, kind)) ** 2
    (deviations,) = dropout_deviations([a], [b], kind)
    torch.testing.assert_close(deviations, (squares**2).sum(dim=(2, 3)).sqrt() / 12)


def test_training_from_the_cache() -> None:
    from lpips_fast.judgements.training import Trainer, TrainingOptions, new_model

    images = some_images(12, (32, 32))
    items = [
        {"ref": r, "p0": p, "p1": q, "judge": torch.tensor(float(k % 2))}
        for k, (r, p, q) in enumerate(zip(*images.chunk(3)))
    ]
    model = new_model("squeeze", random_trunk=True, normalization="l1")
    trainer = Trainer(model, items, TrainingOptions(batch_size=2), progress=False)
    trainer.train_epoch()
    assert trainer.caches and trainer._cached is not None
    rows = trainer._cached.distances(
        torch.cat([linear_weight(lin).flatten() for lin in model.lins])
    )
    with torch.no_grad():
        expected = model.eval()(images[:4], images[4:8]).flatten()
    torch.testing.assert_close(rows[0], expected, rtol=1e-4, atol=1e-9)
    assert trainer._summary()["normalization"] == "l1"


def test_torchmetrics(models: dict[str, LPIPS]) -> None:
    declare_torchvision_operators()  # torchmetrics imports it where it is installed
    pytest.importorskip("torchmetrics", reason="the metric is one of torchmetrics")
    from lpips_fast.metrics import LPIPSMetric

    in0, in1 = some_images(2), some_images(2)
    weights = trunk_weights("squeeze")
    metric = LPIPSMetric("squeeze", weights=weights, normalization="l1")
    with torch.no_grad():
        torch.testing.assert_close(metric(in0, in1), models["l1"](in0, in1).mean())


@pytest.mark.parametrize("plan", [(), ("--plan",)], ids=["matrix", "plan"])
def test_pairwise_refuses(plan: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    folder = REPOSITORY / "examples" / "images"
    arguments = (folder, "--net", "squeeze", "--random-trunk", "--normalization", "l1", *plan)
    assert call("pairwise", *arguments) == 1
    assert "made with normalization='l2', but the model has 'l1'" in capsys.readouterr().err


def test_the_name_of_the_metric() -> None:
    import argparse

    from lpips_fast.cli.model import add_model_arguments

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    assert metric_name(parser.parse_args([])) == "LPIPS alex, version 0.1"
    options = parser.parse_args(["--normalization", "std", "--net", "vgg"])
    assert metric_name(options) == "LPIPS vgg, version 0.1, normalization std"
    with pytest.raises(SystemExit):
        parser.parse_args(["--normalization", "l3"])
