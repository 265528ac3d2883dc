"""What is taken for images and features, at which sizes, and what is said of anything else."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpips_fast import LPIPS, Features, functional

NAN, INFINITY = float("nan"), float("inf")


@functools.cache
def model_of(net: str = "alex", **options: Any) -> LPIPS:
    return LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)


@functools.cache
def encoded(net: str = "alex", size: tuple[int, int] = (48, 56)) -> Features:
    (image, _) = image_pair(2, *size, torch.float32, seed=0)
    return model_of(net).encode(image)


def with_tap(features: Features, layer: int, change: Callable[[Tensor], Any]) -> Features:
    taps = list(features.taps)
    taps[layer] = change(taps[layer])
    return dataclasses.replace(features, taps=tuple(taps))


def first_set_to(value: float) -> Callable[[Tensor], Tensor]:
    def change(tap: Tensor) -> Tensor:
        tap = tap.clone()
        tap[0, 0, 0, 0] = value
        return tap

    return change


class _NoReading(TorchDispatchMode):
    """Fails where a value goes from a tensor to Python, which waits for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.is_nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


class TestFeatures:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                lambda f: encoded("squeeze"),
                ValueError,
                "in1 are features of trunk 'squeeze', but the model's is 'alex'",
            ),
            (
                lambda f: dataclasses.replace(encoded("squeeze"), net=None, layers=None),
                ValueError,
                "in1 are features of 7 layers, but the model compares 5, layers 0, 1, 2, 3, 4",
            ),
            (
                lambda f: dataclasses.replace(f, taps=f.taps[:2], layers=(0, 1)),
                ValueError,
                "in1 are features of layers 0, 1, but the model compares layers 0, 1, 2, 3, 4",
            ),
            (
                lambda f: dataclasses.replace(f, taps=f.taps[::-1]),
                ValueError,
                r"features of \[256, 256, 384, 192, 64\] channels, but .* have \[64, 192, 384, 256",
            ),
            (
                lambda f: with_tap(f, 1, lambda t: t[0]),
                ValueError,
                r"hold a tensor of shape \(192, 5, 6\), expected \(N, C, H, W\)",
            ),
            (
                lambda f: with_tap(f, 2, lambda t: t[:1]),
                ValueError,
                r"hold \[2, 2, 1, 2, 2\] images in their layers",
            ),
            (
                lambda f: with_tap(f, 2, Tensor.half),
                TypeError,
                "are torch.float16, torch.float32, expected one floating dtype",
            ),
            (lambda f: f.to(torch.int64), TypeError, "are torch.int64, expected one floating"),
            (
                lambda f: f.to("meta"),
                ValueError,
                "in1 are on meta, but the model is on cpu; move them",
            ),
            (
                lambda f: with_tap(f, 4, lambda t: t.to("meta")),
                ValueError,
                "are on cpu and meta, but the model is on cpu",
            ),
            (
                lambda f: with_tap(f, 0, lambda t: t.numpy()),
                TypeError,
                "must hold one torch.Tensor a layer, got Tensor, ndarray",
            ),
        ],
    )
    @pytest.mark.parametrize("look", [False, True])
    def test_refusals(self, change, error, message, look):
        wrong = change(encoded())
        with pytest.raises(error, match=message):
            model_of(check_inputs=look).distance(encoded(), wrong)

    def test_layers_that_look_alike_are_told_apart(self):
        # The last two of AlexNet have the same shape.
        fourth, fifth = model_of(layers=(3,)), model_of(layers=(4,))
        (image, _) = image_pair(1, 48, 48, torch.float32, seed=0)
        with pytest.raises(ValueError, match="are features of layer 3, but the model compares"):
            fifth(image, fourth.encode(image))

    def test_made_by_hand_are_taken(self):
        by_hand = Features(encoded().taps, (48, 56))
        assert by_hand.net is None and by_hand.layers is None
        model = model_of()
        assert not model.distance(by_hand, encoded()).any()

    @pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
    def test_values_are_looked_at_on_request(self, value):
        wrong = with_tap(encoded(), 2, first_set_to(value))
        with pytest.warns(UserWarning, match="in1 hold 1 NaN or infinite values in layer 2"):
            model_of(check_inputs=True).distance(encoded(), wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not torch.isfinite(model_of().distance(encoded(), wrong)[0])
            model_of(check_inputs=True).distance(encoded(), encoded())

    def test_the_layer_has_the_models_number(self):
        part = model_of(layers=(1, 3), check_inputs=True)
        (image, _) = image_pair(1, 48, 48, torch.float32, seed=0)
        wrong = with_tap(part.encode(image), 1, first_set_to(NAN))
        with pytest.warns(UserWarning, match="in layer 3"):
            part(image, wrong)

    def test_the_shape_is_held_to_the_images_size_on_request(self):
        wrong = dataclasses.replace(encoded(), image_size=(64, 64))
        with pytest.raises(
            ValueError, match=r"hold \(64, 11, 13\) for layer 0, but images of 64x64 .* \(64, 15"
        ):
            model_of(check_inputs=True).distance(wrong, wrong)

    def test_a_warning_points_at_the_callers_line(self):
        wrong = with_tap(encoded(), 0, first_set_to(NAN))
        with pytest.warns(UserWarning) as caught:
            model_of(check_inputs=True)(wrong, encoded())
        assert caught[0].filename == __file__

    def test_nothing_is_read_unless_asked(self):
        model, other = model_of(), encoded()
        (image, _) = image_pair(2, 48, 56, torch.float32, seed=1)
        with _NoReading():
            model(image, other)
            functional.distance(other.taps, other.taps)
        with _NoReading(), pytest.raises(AssertionError, match="_local_scalar_dense"):
            model_of(check_inputs=True)(other, other)

    def test_pairwise_refuses_them_too(self):
        wrong = with_tap(encoded(), 2, lambda t: t[:1])
        with pytest.raises(ValueError, match=r"X hold .* images in their layers"):
            model_of().pairwise(wrong)


class TestFunctional:
    def test_values_are_looked_at_on_request(self):
        taps = encoded().taps
        wrong = with_tap(encoded(), 3, first_set_to(NAN)).taps
        for function in (functional.distance, functional.distance_map):
            with pytest.warns(UserWarning, match="feats0 hold 1 NaN .* in layer 3"):
                function(wrong, taps, check_inputs=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                function(wrong, taps)
                function(taps, taps, check_inputs=True)

    def test_no_tensors(self):
        taps = encoded().taps
        with pytest.raises(TypeError, match=r"layer 0: expected two torch\.Tensor .* ndarray"):
            functional.distance([taps[0].numpy()], [taps[0].numpy()])


SHAPES = {
    "alex": [(31, 31), (31, 97), (97, 31), (32, 500), (500, 33), (127, 129)],
    "squeeze": [(17, 17), (17, 97), (97, 18), (19, 400), (400, 17)],
    "vgg": [(16, 16), (39, 17)],
}


class TestSizes:
    @pytest.mark.parametrize(
        ("net", "size"), [(net, size) for net, sizes in SHAPES.items() for size in sizes]
    )
    def test_aspect_ratios_from_the_smallest_size(self, reference, net, size):
        ours, theirs = model_of(net), _original(reference, net)
        pair = image_pair(2, *size, torch.float32, seed=sum(size))
        with torch.no_grad():
            whole = ours(*pair)
            torch.testing.assert_close(whole, theirs(*pair), rtol=2e-5, atol=1e-8)
            in_chunks = model_of(net, max_batch=1)(*pair)
        torch.testing.assert_close(in_chunks, whole, rtol=1e-6, atol=0)
        with pytest.raises(ValueError, match="is too small for trunk"):
            ours(*(x[:, :, : ours.minimum_size - 1] for x in pair))

    @pytest.mark.parametrize("spatial", [False, True])
    @pytest.mark.parametrize("limit", [1, 2, 3, 5])
    def test_chunks_of_any_size(self, spatial, limit):
        pair = image_pair(5, 40, 71, torch.float32, seed=2)
        with torch.no_grad():
            expected = model_of(spatial=spatial)(*pair, retPerLayer=True)
            found = model_of(spatial=spatial, max_batch=limit)(*pair, retPerLayer=True)
        for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]]):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)

    def test_hd_one_pair_at_a_time(self):
        # 4K is a row of benchmarks/bench_resolutions.py: it takes too long here.
        (image, other) = image_pair(1, 720, 1280, torch.float32, seed=3)
        with torch.inference_mode():
            value = model_of(max_batch=1)(image, other)
            assert value.shape == (1, 1, 1, 1) and torch.isfinite(value).all() and value > 0
            assert model_of(max_batch=1)(image, image) == 0


@functools.cache
def _original(reference: Any, net: str) -> torch.nn.Module:
    theirs = reference.LPIPS(net=net, pnet_rand=True, verbose=False)
    theirs.load_state_dict(model_of(net).state_dict())
    return theirs
