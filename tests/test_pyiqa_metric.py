"""The metrics that pyiqa gets: by its own names and rules, with the numbers of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import declare_torchvision_operators
from many_images import some_images
from parity import trunk_weights

from lpips_fast import LPIPS

declare_torchvision_operators()  # pyiqa imports torchvision
# Its import needs OpenCV and more: any that is missing is an ImportError.
pyiqa = pytest.importorskip(
    "pyiqa", reason="pyiqa, or what it imports, is not installed", exc_type=ImportError
)

from lpips_fast.pyiqa_metric import NAMES  # noqa: E402

IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"


def fast(name: str = "lpips-fast", **options):
    return pyiqa.create_metric(name, device="cpu", weights=trunk_weights(NAMES[name]), **options)


def images(size: int = 2):
    return some_images(size) / 2 + 0.5, some_images(size) / 2 + 0.5


def test_it_is_among_the_models_with_a_reference():
    assert set(NAMES) <= set(pyiqa.list_models("FR"))
    metric = fast()
    assert metric.lower_better and metric.metric_mode == "FR"


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_model(name):
    a, b = images()
    model = LPIPS(net=NAMES[name], weights=trunk_weights(NAMES[name]), verbose=False)
    with torch.no_grad():
        expected = model(b, a, normalize=True)
    torch.testing.assert_close(fast(name)(a, b), expected.flatten(1))


def test_files_as_pyiqa_reads_them():
    for name, distance in (("ex_p0.png", 0.722), ("ex_p1.png", 0.138)):
        found = pyiqa.create_metric("lpips-fast", device="cpu")(
            str(IMAGES / name), str(IMAGES / "ex_ref.png")
        )
        assert found.shape == (1, 1)
        assert round(found.item(), 3) == distance


def test_as_a_loss():
    a, b = images()
    loss = fast(as_loss=True)
    a.requires_grad_()
    value = loss(a, b)
    value.backward()
    assert value.shape == () and a.grad.abs().sum() > 0
    torch.testing.assert_close(value, fast()(a, b).mean())
    assert not any(p.requires_grad for p in loss.net.parameters())


def test_grey_images_maps_and_layers():
    a, b = (x.mean(1, keepdim=True) for x in images())
    metric = fast()
    torch.testing.assert_close(metric(a, b), metric(*(x.repeat(1, 3, 1, 1) for x in (a, b))))
    total, layers = metric(a, b, retPerLayer=True)
    torch.testing.assert_close(total, sum(layers))
    assert fast(spatial=True)(a, b).shape == (2, 1, *a.shape[2:])


def test_what_is_not_in_the_range_is_refused():
    a, b = images()
    with pytest.raises(AssertionError, match="normalized to"):
        fast()(a * 255, b)
