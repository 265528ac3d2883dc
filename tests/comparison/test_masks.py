"""Masks: both meanings against a definition in float64, their edges, and what they refuse."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_calls import cell_means
from parity import NETS, relative, trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast import functional
from lpips_fast.comparison import masks
from lpips_fast.features import Features

HEIGHT, WIDTH = 67, 75  # no layer's grid divides them


def model_of(net: str = "alex", **options: Any) -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)


@pytest.fixture(scope="module", params=NETS)
def model(request: pytest.FixtureRequest) -> lpips_fast.LPIPS:
    return model_of(request.param)


@pytest.fixture(scope="module")
def alex() -> lpips_fast.LPIPS:
    return model_of()


@pytest.fixture(scope="module")
def maps(model: lpips_fast.LPIPS, pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Every layer's map of the pair, by the paper's formula in float64 from the features on."""
    exact = copy.deepcopy(model).double()
    found = []
    with torch.no_grad():
        taps = zip(*(exact.encode(x.double()).taps for x in pair), strict=True)
        for k, (a, b) in enumerate(taps):
            units = [t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b)]
            weight = exact.lins[k].model[-1].weight.view(1, -1, 1, 1)
            found.append((weight * (units[0] - units[1]).square()).sum(1, keepdim=True))
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    a = F.interpolate(torch.rand(2, 3, 12, 15), (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    return a * 2 - 1, (a + 0.2 * torch.randn(2, 3, HEIGHT, WIDTH)).clamp(0, 1) * 2 - 1


def some_masks() -> dict[str, Tensor]:
    """Of every kind that there is."""
    torch.manual_seed(1)
    disc = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    disc[20:50, 31:67] = True
    several = torch.rand(2, 1, HEIGHT, WIDTH) > 0.5
    several[1, :, 40:] = False
    return {
        "bool (H, W)": disc,
        "one pixel": torch.zeros(1, 1, HEIGHT, WIDTH).index_fill(2, torch.tensor(3), 1)
        * (torch.arange(WIDTH) == 70),
        "bool (N, 1, H, W)": several,
        "soft (1, 1, H, W)": torch.rand(1, 1, HEIGHT, WIDTH) * 200,
        "soft (N, 1, H, W)": torch.rand(2, 1, HEIGHT, WIDTH).double() ** 4,
        "half": disc.half() * 0.3,
    }


KINDS = list(some_masks())


# ------------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize("kind", KINDS)
def test_weighted(model, pair, maps, kind):
    """sum(w d) / sum(w) of every layer."""
    mask = some_masks()[kind]
    expected = []
    for d in maps:
        w = cell_means(mask.reshape(-1, 1, HEIGHT, WIDTH), *d.shape[2:])
        expected.append((w * d).sum(dim=(1, 2, 3)) / w.sum(dim=(1, 2, 3)))
    with torch.no_grad():
        value, layers = model(*pair, retPerLayer=True, mask=mask)
    assert value.shape == (2, 1, 1, 1)
    for layer, of_layer in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.flatten().double(), of_layer, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(value.flatten().double(), sum(expected), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_fill(alex, pair, kind, normalize):
    mask = some_masks()[kind]
    inside = mask.reshape(-1, 1, HEIGHT, WIDTH) > 0
    filled = [x * inside + 0.25 * ~inside for x in pair]
    images = [(x + 1) / 2 for x in pair] if normalize else pair
    with torch.no_grad():
        expected = alex(*filled)
        value = alex(*images, normalize=normalize, mask=mask, mask_mode="fill", fill_value=0.25)
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("net", NETS)
def test_fill_is_blind_outside(net, pair):
    """Not a bit of the distance or of a gradient depends on what is outside, NaN included."""
    model, mask = model_of(net), some_masks()["bool (H, W)"]
    torch.manual_seed(2)
    results = []
    for outside in (torch.zeros(2, 3, HEIGHT, WIDTH), torch.randn(2, 3, HEIGHT, WIDTH), None):
        images = [
            torch.where(mask, x, torch.nan if outside is None else outside * (k + 1))
            for k, x in enumerate(pair)
        ]
        leaf = images[0].requires_grad_()
        value = model(leaf, images[1], mask=mask, mask_mode="fill")
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient[..., ~mask].abs().max() == 0 < gradient.abs().max()
        results.append((value, gradient))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])


def test_one_number_everywhere_is_no_mask(model, pair):
    """To the bit, of values and gradients, on every way from images to distances."""
    target = model.encode(pair[1]).detach()
    for mask in (
        torch.ones(HEIGHT, WIDTH, dtype=torch.bool),
        torch.full((2, 1, HEIGHT, WIDTH), 0.3),
    ):
        for in1 in (pair[1], pair[1].clone().requires_grad_(), target):
            results = []
            for options in ({}, {"mask": mask}):
                leaf = pair[0].clone().requires_grad_()
                inputs = [leaf, *(x for x in [in1] if isinstance(x, Tensor) and x.requires_grad)]
                value = model(leaf, in1, **options)
                with torch.no_grad():
                    assert torch.equal(model(leaf, in1, **options), value)
                results.append([value, *torch.autograd.grad(value.sum(), inputs)])
            for plain, masked in zip(*results, strict=True):
                assert torch.equal(plain, masked)


@pytest.mark.parametrize("mode", ["weighted", "fill"])
def test_identical_and_symmetric(model, pair, mode):
    for kind in ("bool (N, 1, H, W)", "soft (1, 1, H, W)"):
        options = {"mask": some_masks()[kind], "mask_mode": mode}
        with torch.no_grad():
            assert model(pair[0], pair[0], **options).abs().max() == 0
            assert torch.equal(model(*pair, **options), model(*pair[::-1], **options))


def test_a_difference_far_outside_does_not_count(alex, pair):
    """The map of each layer is 0 where both images agree as far as the layer sees."""
    torch.manual_seed(0)
    images = [torch.rand(1, 3, 400, 400) * 2 - 1] * 2
    images[1] = images[0].clone()
    images[1][..., 300:, 300:] = 0
    mask = torch.zeros(400, 400)
    mask[:20, :20] = 1
    with torch.no_grad():
        assert alex(*images).item() > 0.01
        assert alex(*images, mask=mask).item() == 0


# ------------------------------------------------------------------------------ what is returned


def test_spatial_is_the_map_times_the_mask(pair):
    model = model_of(spatial=True)
    for mask in some_masks().values():
        with torch.no_grad():
            plain, layers = model(*pair, retPerLayer=True)
            masked, of_layers = model(*pair, retPerLayer=True, mask=mask)
            filled = model(*pair, mask=mask, mask_mode="fill")
        factor = mask.reshape(-1, 1, HEIGHT, WIDTH).float()
        assert masked.shape == filled.shape == plain.shape
        torch.testing.assert_close(masked, plain * factor)
        for layer, of_layer in zip(layers, of_layers, strict=True):
            torch.testing.assert_close(of_layer, layer * factor)


def test_reduction(pair):
    mask = some_masks()["soft (N, 1, H, W)"]
    with torch.no_grad():
        each = model_of()(*pair, mask=mask)
        for reduction in ("mean", "sum"):
            value = model_of(reduction=reduction)(*pair, mask=mask)
            torch.testing.assert_close(value, getattr(each, reduction)())


def test_one_image_with_many(alex, pair):
    """One image, one mask, or both are for all."""
    mask = some_masks()["bool (N, 1, H, W)"]
    both = [pair[0][:1].expand(2, -1, -1, -1), pair[1]]
    with torch.no_grad():
        for mode in ("weighted", "fill"):
            expected = alex(*both, mask=mask, mask_mode=mode)
            torch.testing.assert_close(
                alex(pair[0][:1], pair[1], mask=mask, mask_mode=mode), expected
            )
            for k in range(2):
                alone = alex(pair[0][:1], pair[1][k : k + 1], mask=mask[k, 0], mask_mode=mode)
                torch.testing.assert_close(alone, expected[k : k + 1])


@pytest.mark.parametrize("limit", [1, 2])
def test_in_parts(limit, pair):
    """``max_batch`` cuts masks with their images."""
    images = [torch.cat([x, x.flip(3), x[:1]]) for x in pair]
    mask = torch.rand(5, 1, HEIGHT, WIDTH)
    with torch.no_grad():
        expected = model_of()(*images, mask=mask)
        for mode in ("weighted", "fill"):
            expected = model_of()(*images, mask=mask, mask_mode=mode)
            value = model_of(max_batch=limit)(*images, mask=mask, mask_mode=mode)
            torch.testing.assert_close(value, expected)


def test_layers_and_other_normalizations(pair):
    mask = some_masks()["soft (N, 1, H, W)"]
    with torch.no_grad():
        _, layers = model_of()(*pair, retPerLayer=True, mask=mask)
        _, some = model_of(layers=(1, 3))(*pair, retPerLayer=True, mask=mask)
        torch.testing.assert_close(some, [layers[1], layers[3]])
        for options in ({"normalization": "l1"}, {"lpips": False}):
            model = model_of(**options)
            ones = torch.ones(HEIGHT, WIDTH)
            torch.testing.assert_close(model(*pair, mask=ones), model(*pair))
            maps = [
                functional.distance_map(
                    [a],
                    [b],
                    [model.layer_weight(k)],
                    normalization=model.normalization,
                )[0]
                for k, (a, b) in enumerate(
                    zip(model.encode(pair[0]).taps, model.encode(pair[1]).taps, strict=True)
                )
            ]
            weights = [cell_means(mask, *m.shape[2:]) for m in maps]
            expected = sum((m * w).mean(dim=(1, 2, 3)) for m, w in zip(maps, weights, strict=True))
            value = model(*pair, mask=mask).flatten()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


def test_empty_batch(alex):
    x = torch.zeros(0, 3, 64, 64)
    for mask in (torch.ones(64, 64), torch.ones(0, 1, 64, 64)):
        for mode in ("weighted", "fill"):
            assert alex(x, x, mask=mask, mask_mode=mode).shape == (0, 1, 1, 1)


# ------------------------------------------------------------------------------------- features


def test_features(alex, pair):
    mask = some_masks()["soft (N, 1, H, W)"]
    with torch.no_grad():
        encoded = [alex.encode(x) for x in pair]
        expected = alex(*pair, mask=mask)
        torch.testing.assert_close(alex(encoded[0], pair[1], mask=mask), expected)
        torch.testing.assert_close(alex.distance(*encoded, mask=mask), expected)
        filled = [alex.encode(x, mask=mask, fill_value=0.5) for x in pair]
        expected = alex(*pair, mask=mask, mask_mode="fill", fill_value=0.5)
        torch.testing.assert_close(alex(*filled), expected)
    with pytest.raises(ValueError, match="features cannot be filled any more"):
        alex(encoded[0], pair[1], mask=mask, mask_mode="fill")
    with pytest.raises(ValueError, match="mask_mode='weighted' does not change features"):
        alex.encode(pair[0], mask=mask, mask_mode="weighted")
    by_hand = Features(tuple(torch.rand(1, c, 1, 1) for c in alex.chns), (5, 5))
    assert alex(by_hand, by_hand, mask=torch.ones(5, 5)).item() == 0
    with pytest.raises(ValueError, match="mask is of"):
        alex(encoded[0], encoded[1], mask=torch.ones(5, 5))


# ------------------------------------------------------------------------------------ gradients


def to_float64(model: lpips_fast.LPIPS) -> lpips_fast.LPIPS:
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_gradients(net, pair):
    """Of every way: a target with and without a graph, as an image and as features."""
    model, mask = model_of(net), some_masks()["soft (N, 1, H, W)"]
    exact = to_float64(model)
    in1 = pair[1]
    leaves = [x.double().requires_grad_() for x in pair]
    taps = [exact.encode(x).taps for x in leaves]
    value = sum(
        (
            functional.composed.distance_map(a, b, exact.layer_weight(k))
            * cell_means(mask, *a.shape[2:])
        )
        .mean(dim=(1, 2, 3))
        .sum()
        for k, (a, b) in enumerate(zip(*taps, strict=True))
    )
    expected = torch.autograd.grad(value, leaves)
    for target in (in1, in1.clone().requires_grad_(), model.encode(in1).detach()):
        leaf = pair[0].clone().requires_grad_()
        model(leaf, target, mask=mask).sum().backward()
        assert relative(leaf.grad.double(), expected[0]) < 1e-4
        if isinstance(target, Tensor) and target.requires_grad:
            assert relative(target.grad.double(), expected[1]) < 1e-4


def test_gradcheck():
    """Features, channel weights and position weights, twice."""
    torch.manual_seed(0)
    shapes = [(2, 5, 3, 2), (2, 4, 1, 3)]
    a = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    b = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    w = [torch.rand(s[1], dtype=torch.float64, requires_grad=True) for s in shapes]
    p = [
        torch.rand(n, 1, *s[2:], dtype=torch.float64, requires_grad=True)
        for n, s in zip((1, 2), shapes, strict=True)
    ]

    def distance(*flat: Tensor) -> Tensor:
        a, b, w, p = (flat[k : k + 2] for k in range(0, 8, 2))
        return functional.distance(a, b, w, position_weights=p)

    assert torch.autograd.gradcheck(distance, (*a, *b, *w, *p))
    assert torch.autograd.gradgradcheck(distance, (*a, *b, *w, *p))


def test_gradcheck_of_a_mask_that_learns():
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)

    def weights(mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(masks.position_weights(mask, [(2, 3), (5, 7), (6, 8)], torch.float64))

    assert torch.autograd.gradcheck(weights, mask)


def test_a_mask_that_learns(alex, pair):
    mask = some_masks()["soft (N, 1, H, W)"].float().requires_grad_()
    (gradient,) = torch.autograd.grad(alex(*pair, mask=mask + 0.1).sum(), mask)
    # Moving the mask against its gradient makes the distance smaller, by as much as it says.
    step = 1e-3 / gradient.norm() ** 2
    exact = copy.deepcopy(alex).double()
    with torch.no_grad():
        moved = (mask + 0.1 - step * gradient).double()
        before, after = (
            exact(*(x.double() for x in pair), mask=m).sum() for m in ((mask + 0.1).double(), moved)
        )
    assert (before - after).item() == pytest.approx(1e-3, rel=0.2)
    with pytest.raises(ValueError, match="mask wants a gradient"):
        alex(*pair, mask=mask, mask_mode="fill")
    leaf = pair[0].clone().requires_grad_()
    alex(leaf, pair[1], mask=mask + 0.1).sum().backward()
    assert relative(mask.grad, gradient) < 1e-5 and leaf.grad.abs().max() > 0


def test_second_derivative(alex, pair):
    mask = some_masks()["bool (H, W)"]
    leaf = pair[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(alex(leaf, pair[1], mask=mask).sum(), leaf, create_graph=True)
    first.square().sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


# ------------------------------------------------------------------- precision, other ways to run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision(pair, dtype):
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[30:34, 40:44] = 1.0  # a small part: its share of the gradient is large
    single, reduced = model_of(), model_of(dtype=dtype)
    results = []
    for model in (single, reduced):
        leaf = pair[0].clone().requires_grad_()
        value = model(leaf, pair[1], mask=mask)
        results.append((value, torch.autograd.grad(1e4 * value.sum(), leaf)[0]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.1, atol=1e-4)
    assert results[1][1].isfinite().all()
    cosine = F.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), 0)
    assert cosine > 0.97
    with torch.autocast("cpu", dtype=dtype):
        cast = single(*pair, mask=mask)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, results[0][0], rtol=0.1, atol=1e-4)


def test_weights_by_hooked_layers(pair):
    """Where somebody looks at a linear layer, it is called, and the mean is weighted behind it."""
    model, mask = model_of(), some_masks()["soft (N, 1, H, W)"]
    with torch.no_grad():
        expected = model(*pair, mask=mask)
        model.lins[2].register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(*pair, mask=mask), expected)
        torch.testing.assert_close(model(*pair, mask=torch.ones(HEIGHT, WIDTH)), model(*pair))


@pytest.mark.parametrize("mode", ["weighted", "fill"])
def test_compile(alex, pair, mode):
    mask = some_masks()["soft (N, 1, H, W)"].float()
    # What is made of the graph is the compiler's affair, which takes a minute over it.
    compiled = torch.compile(alex, fullgraph=True, backend="aot_eager")
    options = {"mask": mask, "mask_mode": mode}
    leaf, same = (pair[0].clone().requires_grad_() for _ in range(2))
    value, expected = compiled(leaf, pair[1], **options), alex(same, pair[1], **options)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    assert relative(leaf.grad, same.grad) < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(compiled(*pair, **options), expected)
        if mode == "weighted":  # nobody looks there
            empty = compiled(*pair, mask=mask * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
            assert empty.flatten().isnan().tolist() == [True, False]


@pytest.mark.parametrize("mode", ["weighted", "fill"])
def test_export(alex, pair, mode):
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = alex

        def forward(self, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
            return self.metric(a, b, mask=mask, mask_mode=mode)

    mask = some_masks()["soft (N, 1, H, W)"].float()
    program = torch.export.export(Masked(), (*pair, mask))
    with torch.no_grad():
        expected = alex(*pair, mask=mask, mask_mode=mode)
    torch.testing.assert_close(program.module()(*pair, mask), expected)


def test_function_transforms(alex, pair):
    mask = some_masks()["soft (N, 1, H, W)"].float()

    def distance(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return alex(a[None], b[None], mask=m[None]).sum()

    with torch.no_grad():
        expected = alex(*pair, mask=mask).flatten()
    torch.testing.assert_close(torch.func.vmap(distance)(*pair, mask), expected)
    grad = torch.func.grad(distance)(pair[0][0], pair[1][0], mask[0])
    leaf = pair[0].clone().requires_grad_()
    alex(leaf, pair[1], mask=mask)[0].sum().backward()
    assert relative(grad, leaf.grad[0]) < 1e-4


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("mode", ["weighted", "fill"])
@pytest.mark.parametrize("spatial", [False, True])
def test_refused_in_words(pair, mode, spatial):
    model = model_of(spatial=spatial)
    ones = torch.ones(HEIGHT, WIDTH)
    second = torch.ones(2, 1, HEIGHT, WIDTH)
    second[1] = 0
    for mask, error, words in [
        (ones * 0, ValueError, "mask is empty: no pixel"),
        (ones > 1, ValueError, "mask is empty: no pixel"),
        (second, ValueError, "mask is empty for image 1"),
        (ones - 1.5, ValueError, "negative"),
        (ones * torch.nan, ValueError, "holds NaN"),
        (ones / 0, ValueError, "from inf to inf"),
        (ones.long(), TypeError, "int64, expected bool or floating point"),
        (ones.byte(), TypeError, "uint8, expected bool or floating point"),
        (ones.numpy(), TypeError, "got ndarray"),
        (ones[1:], ValueError, "of 66x75 pixels but the images are of 67x75"),
        (ones[None], ValueError, r"expected \(67, 75\), \(1, 1, 67, 75\) or \(2, 1, 67, 75\)"),
        (ones.expand(3, 1, -1, -1), ValueError, "mask has shape"),
        (ones.expand(1, 3, -1, -1), ValueError, "mask has shape"),
        (ones.to("meta"), ValueError, "mask is on meta but the model is on cpu"),
    ]:
        with pytest.raises(error, match=words):
            model(*pair, mask=mask, mask_mode=mode)


def test_other_refusals(alex, pair):
    ones = torch.ones(HEIGHT, WIDTH)
    with pytest.raises(
        ValueError, match="unknown mask_mode 'soft'; expected one of weighted, fill"
    ):
        alex(*pair, mask=ones, mask_mode="soft")
    for value in (-1.1, 255, float("nan")):
        with pytest.raises(ValueError, match="fill_value is"):
            alex(*pair, mask=ones, mask_mode="fill", fill_value=value)


def test_no_look_no_number(pair):
    """Where nobody looks at the values, a mask without weights makes its image's distance NaN."""
    mask = torch.ones(2, 1, 9, 9)
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        damaged = mask.clone()
        damaged[1] = damaged[1] * 0
        damaged[1, 0, 4, 4] = bad
        for function in (masks.position_weights, masks.composed_position_weights):
            for weights in function(damaged, [(4, 4), (1, 1)], torch.float32):
                assert weights[0].eq(1).all() and weights[1].isnan().all()


# ---------------------------------------------------------------------------- weights of positions


def test_both_forms_of_position_weights():
    torch.manual_seed(0)
    grids = [(7, 5), (3, 11), (13, 17), (1, 1), (20, 30)]
    for dtype in (torch.bool, torch.float32, torch.float64, torch.float16, torch.bfloat16):
        mask = torch.rand(3, 1, 13, 17).sub(0.4).clamp(min=0).to(dtype)
        mask[:, :, :5] = 0
        for function in (masks.position_weights, masks.composed_position_weights):
            for weights, grid in zip(function(mask, grids, torch.float64), grids, strict=True):
                expected = cell_means(mask, *grid)
                torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-13)
                assert weights[expected == 0].eq(0).all() and weights.min() >= 0


def test_cumulative_sums_without_torchs():
    for size in (1, 2, 3, 7, 64):
        x = torch.rand(2, 1, size, 3, dtype=torch.float64)
        torch.testing.assert_close(masks.cumulative_by_doubling(x), x.cumsum(2))


def test_functional_refuses_other_shapes():
    a = torch.rand(2, 4, 3, 3)
    for weights, words in [([], "for 1 layers, got 0"), ([torch.ones(2, 1, 3, 2)], "layer 0")]:
        with pytest.raises(ValueError, match=words):
            functional.distance([a], [a], position_weights=weights)


def test_nothing_is_warned_of(alex, pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask, mode in itertools.product(some_masks().values(), ("weighted", "fill")):
            alex(*pair, mask=mask, mask_mode=mode)
