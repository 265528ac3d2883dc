"""Trunks of other widths: their names, their checkpoints, and that the fast path is right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from many_images import some_images
from torch import Tensor

from lpips_fast import LPIPS
from lpips_fast.trunk import TRUNKS, Fire, name_by_shapes, tap_channels, trunk_spec, with_widths
from lpips_fast.trunk.table import feature_shapes
from lpips_fast.weights import WeightsError

#: Odd numbers, one channel, and multiples of the vectors' length.
NARROW = {
    "alex": "alex:24,57,1,64,33",
    "squeeze": "squeeze:24,16/9,5/40,32/64,7/33,48/96,24/48,1/1,64/128",
    "vgg": "vgg:8,16,17,40,32,64,33,48,64,1,64,72,40",
}
each = pytest.mark.parametrize("name", NARROW.values(), ids=NARROW)


def narrow_model(name: str, **options: object) -> LPIPS:
    torch.manual_seed(0)
    model = LPIPS(net=name, pnet_rand=True, pretrained=False, verbose=False, **options)  # type: ignore[arg-type]
    for k in range(model.L):
        model.lins[k].model[-1].weight.data.uniform_(0, 1)
    return model


def by_modules(model: LPIPS) -> LPIPS:
    """A model that is called module by module."""
    slow = copy.deepcopy(model).requires_grad_(True)
    for block in slow.net.slices():
        block.register_forward_hook(lambda *_: None)
    assert "hook" in slow.fast_path()["slice1"]
    return slow


@each
def test_names(name: str) -> None:
    spec = trunk_spec(name)
    assert with_widths(name, spec.layers) == name
    assert name_by_shapes(name.partition(":")[0], feature_shapes(name)) == name
    for net in TRUNKS:
        assert with_widths(net, TRUNKS[net].layers) == net


@pytest.mark.parametrize(
    "name",
    [
        "alex:",
        "alex:1,2",
        "alex:0,2,3,4,5",
        "alex:01,2,3,4,5",
        "alex:1,2,3,4,5,6",
        "alex:1/2,2,3,4,5",
    ],
)
def test_no_names(name: str) -> None:
    with pytest.raises(ValueError, match="its widths are like those of alex:64,192,384,256,256"):
        LPIPS(net=name, pnet_rand=True, verbose=False)  # type: ignore[arg-type]


@each
def test_the_fast_path_is_taken_and_right(name: str) -> None:
    model = narrow_model(name)
    assert set(model.fast_path().values()) == {"yes"}
    in0, in1 = some_images(2), some_images(2)
    with torch.no_grad():
        expected = by_modules(model)(in0, in1)
        torch.testing.assert_close(model(in0, in1), expected, rtol=2e-5, atol=0)
        assert (model(in0, in0.clone()) == 0).all()
    exact = by_modules(model).double()

    def gradient(model: LPIPS, image: Tensor) -> Tensor:
        image = image.clone().requires_grad_()
        return torch.autograd.grad(model(image, in1.to(image.dtype)).sum(), image)[0]

    reference = gradient(exact, in0.double())
    error = (gradient(model, in0) - reference).norm() / reference.norm()
    assert error < 0.05  # a ReLU may switch within rounding; a wrong path would be all wrong


def test_what_differs_from_its_widths_is_called_as_a_module() -> None:
    model = narrow_model(NARROW["alex"])
    wider = torch.nn.Conv2d(3, 32, 11, 4, 2)
    model.net.slice1[0] = wider
    assert "has out_channels 32, not 24 as built" in model.fast_path()["slice1"]


@each
def test_checkpoints(name: str, tmp_path: Path) -> None:
    model, net = narrow_model(name), name.partition(":")[0]
    file = tmp_path / "narrow.pth"
    torch.save(model.state_dict(), file)
    in0, in1 = some_images(1), some_images(1)
    with torch.no_grad():
        expected = model(in0, in1)
        loaded = (
            LPIPS(net=net, weights=file, verbose=False),
            LPIPS(net=net, model_path=file, verbose=False),
            LPIPS(net=net, weights=model.state_dict(), verbose=False, frozen=True),
            LPIPS(net=name, weights=file, verbose=False),
            pickle.loads(pickle.dumps(model)),
        )
        for other in loaded:
            assert other.net_name == name and other.chns == tap_channels(name)
            assert torch.equal(other(in0, in1), expected)
            assert f"net={name!r}" in repr(other)
    features = {
        f"features.{key.split('.', 1)[1]}": value for key, value in model.net.state_dict().items()
    }
    with pytest.raises(WeightsError, match="no linear weights of its own"):
        LPIPS(net=net, weights=features, verbose=False)
    baseline = LPIPS(net=net, weights=features, lpips=False, verbose=False)
    assert baseline.net_name == name


def test_a_file_that_fits_no_widths_is_told(tmp_path: Path) -> None:
    state = narrow_model(NARROW["alex"]).state_dict()
    state["net.slice2.3.weight"] = torch.rand(57, 23, 5, 5)
    with pytest.raises(WeightsError, match=r"'features\.0\.weight' has shape \(24, 3, 11, 11\)"):
        LPIPS(weights=state, verbose=False)
    with pytest.raises(WeightsError, match="are of the trunk 'alex'"):
        LPIPS(net=NARROW["alex"], verbose=False)  # type: ignore[arg-type]


def test_other_uses() -> None:
    """Features, all pairs, vectors and a compiled model go by the widths."""
    model = narrow_model(NARROW["squeeze"])
    images = some_images(3, (40, 40))
    with torch.no_grad():
        expected = torch.stack([model(x[None], images).flatten() for x in images])
        torch.testing.assert_close(model.pairwise(images), expected, rtol=1e-4, atol=1e-5)
        vectors = model.embed(images)
        squares = torch.cdist(vectors, vectors) ** 2
        torch.testing.assert_close(squares, expected, rtol=1e-3, atol=1e-4)
        features = model.encode(images)
        torch.testing.assert_close(model(features, images[:1]).flatten(), expected[0])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images[:2], images[1:]), model(images[:2], images[1:]))
    full = LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    with pytest.raises(ValueError, match="features"):
        full(features, images)
    assert isinstance(trunk_spec(model.net_name).layers[3], Fire)
