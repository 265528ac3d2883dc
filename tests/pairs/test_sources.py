"""Images by position: whatever holds them, the same matrix; what does not, a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_images import DataSet, model_of, some_images

from lpips_fast import LPIPS, Features
from lpips_fast.images.reading import read_image


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return model_of()


def test_sources(model: LPIPS) -> None:
    images = some_images(5)
    expected = model.pairwise(images)
    features = model.encode(images).detach()
    for source in (list(images), [x[None] for x in images], DataSet(images), features):
        torch.testing.assert_close(model.pairwise(source), expected)
        torch.testing.assert_close(model.pairwise(source, images), expected)
        torch.testing.assert_close(model.pairwise(images[0], source), expected[:1])


def test_features_in_any_order_of_memory(model: LPIPS) -> None:
    images = some_images(4)
    features = model.encode(images).detach()
    planar = Features(tuple(t.contiguous() for t in features.taps), features.image_size)
    torch.testing.assert_close(model.pairwise(planar), model.pairwise(features))


def test_files(model: LPIPS, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="files are read with Pillow")
    paths = []
    for k, image in enumerate(some_images(4)):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        paths.append(tmp_path / f"{k} ü.png")
        Image.fromarray(pixels).save(paths[-1])
    images = torch.cat([read_image(path) for path in paths])
    expected = model.pairwise(images)
    assert torch.equal(model.pairwise(paths), expected)
    assert torch.equal(model.pairwise([(str(path), "label") for path in paths]), expected)
    # Files know their range; `normalize` is about tensors.
    assert torch.equal(model.pairwise(paths, normalize=True), expected)
    with pytest.raises(TypeError, match=r"X\[1\] is a Tensor, but X\[0\] is a path"):
        model.pairwise([paths[0], images[0]])
    Image.new("RGB", (40, 41)).save(paths[2])
    with pytest.raises(ValueError, match=r"X\[2\] \('.*2 ü.png'\) has 41x40 pixels .* 48x40"):
        model.pairwise(paths)


def test_unit_range(model: LPIPS) -> None:
    images = some_images(4)
    expected = model.pairwise(images)
    unit = (images + 1) / 2
    for source in (unit, list(unit)):
        matrix = model.pairwise(source, normalize=True)
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-8)


def test_items_are_read_once_a_group(model: LPIPS) -> None:
    data = DataSet(some_images(6))
    model.pairwise(data)
    assert data.reads == 6 + 1  # and the first once more, for the size


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda x: iter(x), TypeError, "X is a .*iterator, expected .* pass a loader's data set"),
        (lambda x: torch.utils.data.DataLoader(list(x)), TypeError, "X is a DataLoader"),
        (lambda x: "photos", TypeError, "one path"),
        (lambda x: x[:0], ValueError, "X holds no images"),
        (lambda x: [], ValueError, "X holds no images"),
        (lambda x: [x[0], x[1, :, 1:]], ValueError, r"X\[1\] has 47x40 pixels .* X\[0\] has 48x40"),
        (lambda x: [x[0], x[:2]], ValueError, r"X\[1\] has shape \(2, 3, 48, 40\)"),
        (lambda x: [x[0], None], TypeError, r"X\[1\] must be a torch.Tensor"),
        (lambda x: x[..., :9, :9], ValueError, "too small"),
        (lambda x: x.byte(), TypeError, "expected floating point"),
        (
            lambda x: model_of("vgg").encode(x[:1]).detach(),
            ValueError,
            r"features of trunk '.*', but the model's is",
        ),
    ],
)
def test_what_is_refused(model: LPIPS, source: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        model.pairwise(source(some_images(3)))


def test_two_sources_that_do_not_fit(model: LPIPS) -> None:
    images = some_images(2)
    with pytest.raises(ValueError, match=r"X and Y differ in size, 48x40 and 48x32"):
        model.pairwise(images, images[..., :32])
    double = model_of().double().encode(images.double()).detach()
    with pytest.raises(TypeError, match="differ in dtype"):
        model.pairwise(images, double)
