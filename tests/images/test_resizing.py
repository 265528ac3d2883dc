"""Resizing and cropping: sizes, where the crop lies, Pillow's values, and the words for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_folders import random_pixels

from lpips_fast.images.resizing import Preprocessing

Image = pytest.importorskip("PIL.Image", reason="resizing needs Pillow")


@pytest.fixture
def image() -> np.ndarray:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return random_pixels(30, 47, generator)


def test_nothing_by_default(image: np.ndarray) -> None:
    assert Preprocessing()(image) is image
    assert Preprocessing().words == {"resize": "none", "crop": "none"}


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resize_is_pillows(image: np.ndarray, resampling: str) -> None:
    expected = Image.fromarray(image).resize(
        (20, 25), getattr(Image.Resampling, resampling.upper())
    )
    result = Preprocessing(resize=(20, 25), resampling=resampling)(image)  # type: ignore[arg-type]
    assert result.shape == (25, 20, 3)
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "shape"), [(10, (10, 15)), (30, (30, 47)), (60, (60, 94)), (1, (1, 1))]
)
def test_the_shorter_side(image: np.ndarray, size: int, shape: tuple[int, int]) -> None:
    assert Preprocessing(resize=size)(image).shape[:2] == shape
    assert Preprocessing(resize=size)(image.swapaxes(0, 1)).shape[:2] == shape[::-1]


def test_the_size_that_it_has_changes_nothing(image: np.ndarray) -> None:
    np.testing.assert_array_equal(Preprocessing(resize=(47, 30))(image), image)


def test_crop_is_the_centre(image: np.ndarray) -> None:
    np.testing.assert_array_equal(Preprocessing(crop=(27, 20))(image), image[5:25, 10:37])
    np.testing.assert_array_equal(Preprocessing(crop=(47, 30))(image), image)


def test_resize_comes_before_crop(image: np.ndarray) -> None:
    both = Preprocessing(resize=20, crop=(16, 12))(image)
    np.testing.assert_array_equal(
        both, Preprocessing(crop=(16, 12))(Preprocessing(resize=20)(image))
    )


def test_a_crop_that_does_not_fit(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a crop of 48x30 does not fit into 47x30 pixels"):
        Preprocessing(crop=(48, 30))(image)


def test_words() -> None:
    assert Preprocessing((64, 32), (20, 10), "lanczos").words == {
        "resize": "64x32, Pillow lanczos",
        "crop": "centre 20x10",
    }


@pytest.mark.parametrize(
    "options", [{"resize": 0}, {"resize": (4, -1)}, {"crop": (0, 4)}, {"resampling": "cubic"}]
)
def test_what_cannot_be(options: dict) -> None:
    with pytest.raises(ValueError, match=r"at least 1|expected one of nearest"):
        Preprocessing(**options)
