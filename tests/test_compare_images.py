"""``compare``: every kind of image gives the model's number, and none is read in a wrong range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpips_fast
from lpips_fast import compare_images
from lpips_fast.compare_images import compare

Image = pytest.importorskip("PIL.Image", reason="image files are read with Pillow")


@pytest.fixture
def pixels(generator: torch.Generator) -> np.ndarray:
    return torch.randint(256, (2, 40, 48, 3), generator=generator, dtype=torch.uint8).numpy()


def expected(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lpips_fast.LPIPS(verbose=False, check_inputs=False)(a, b).flatten()


def signed(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def kinds(tmp_path: Path, pixels: np.ndarray) -> dict[str, Any]:
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return {
        "path": str(tmp_path / "image.png"),
        "Path": tmp_path / "image.png",
        "Pillow": Image.fromarray(pixels),
        "numpy HWC": pixels,
        "numpy CHW": pixels.transpose(2, 0, 1),
        "numpy backwards": pixels[::-1, ::-1][::-1, ::-1],
        "numpy float": pixels / 127.5 - 1,
        "tensor uint8": torch.from_numpy(pixels).movedim(-1, 0),
        "tensor HWC": torch.from_numpy(pixels),
        "tensor float": signed(pixels),
        "tensor double": signed(pixels).double(),
    }


def test_every_kind_of_image(tmp_path: Path, pixels: np.ndarray) -> None:
    number = expected(signed(pixels[0]), signed(pixels[1])).item()
    others = kinds(tmp_path, pixels[1])
    for name, image in kinds(tmp_path, pixels[1]).items():
        value = compare(pixels[0], image)
        assert isinstance(value, float) and value == pytest.approx(number, rel=1e-5), name
        assert compare(others["path"], image) == pytest.approx(0, abs=1e-6), name
    unit = [x / 255.0 for x in pixels]
    assert compare(*unit, normalize=True) == pytest.approx(number, rel=1e-5)


def test_gray_images(pixels: np.ndarray) -> None:
    a, b = pixels[..., 0]
    number = expected(signed(a[..., None]).expand(3, -1, -1), signed(b[..., None])).item()
    for make in (lambda x: x, lambda x: x[..., None], lambda x: x[None], Image.fromarray):
        assert compare(make(a), make(b)) == pytest.approx(number, rel=1e-5)


def test_batches_and_videos(generator: torch.Generator) -> None:
    videos = torch.randint(256, (2, 3, 3, 40, 48), generator=generator, dtype=torch.uint8)
    other = videos.flip(-1)
    distances = compare(videos, other)
    assert isinstance(distances, torch.Tensor) and distances.shape == (2, 3)
    flat = [x.flatten(0, 1).float() / 127.5 - 1 for x in (videos, other)]
    torch.testing.assert_close(distances.flatten(), expected(*flat), rtol=1e-5, atol=1e-6)
    one = compare(videos[0, 0], other)
    assert isinstance(one, torch.Tensor) and one.shape == (2, 3)
    assert compare(videos[0, :1], other[0]).shape == (3,)  # type: ignore[union-attr]
    assert compare(videos[0, :1], other[0, :1]).shape == (1,)  # type: ignore[union-attr]
    channels_last = compare(videos.movedim(2, -1), other)
    assert torch.equal(channels_last, distances)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a and b hold 2 by 3 images and 3 images"):
        compare(videos, other[0])
    with pytest.raises(ValueError, match="a and b hold 2 images and 3 images"):
        compare(videos[:, 0], other[0])


def test_the_model_of_a_configuration_is_kept(pixels: np.ndarray) -> None:
    compare_images._model.cache_clear()
    for _ in range(2):
        compare(*pixels)
        compare(*pixels, lpips=False)
    assert compare_images._model.cache_info().misses == 2


def test_no_graph_is_kept(pixels: np.ndarray) -> None:
    a, b = (signed(x).requires_grad_() for x in pixels)
    value = compare(a[None], b[None])
    assert isinstance(value, torch.Tensor) and not value.requires_grad


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (torch.rand(3, 40, 40), {}, "pass normalize=True if it is in"),
        (torch.rand(3, 40, 40) * 255, {}, r"expected \[-1, 1\]; 8-bit values are passed as uint8"),
        (torch.rand(3, 40, 40) * 255, {"normalize": True}, r"expected \[0, 1\] with normalize"),
        (torch.rand(3, 40, 40) * 2 - 1, {"normalize": True}, r"expected \[0, 1\] with normalize"),
        (torch.full((3, 40, 40), float("nan")), {}, "a holds NaN or infinite values"),
        (np.zeros((40, 40, 4), np.uint8), {}, "of whose dimensions none is channels"),
        (np.zeros((3, 40, 3), np.uint8), {}, "both the first and the last may be channels"),
        (np.zeros(40, np.uint8), {}, "expected an image"),
        (np.zeros((41, 40, 3), np.uint8), {}, "differ in size"),
    ],
)
def test_what_is_refused(image: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(image, np.zeros((40, 40, 3), np.uint8), **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((40, 40, 3), np.int32), "a is torch.int32, expected uint8 or floating point"),
        (np.zeros((40, 40, 3), np.str_), "expected uint8 or floating point"),
        (None, "a is a NoneType, expected a path, a Pillow image"),
        (b"a.png", "a is a bytes, expected a path"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        compare(image, np.zeros((40, 40, 3), np.uint8))


def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read '.*gone\.png': no such file"):
        compare(tmp_path / "gone.png", tmp_path / "gone.png")


def test_masks(tmp_path: Path, pixels: np.ndarray) -> None:
    """Of every kind that images have; the model's number."""
    mask = np.zeros((40, 48), np.uint8)
    mask[5:20, 10:40] = 200
    Image.fromarray(mask).save(tmp_path / "mask.png")
    a, b = (signed(x)[None] for x in pixels)
    model = lpips_fast.LPIPS(verbose=False, check_inputs=False)
    for options in ({}, {"mask_mode": "fill", "fill_value": 0.5}):
        with torch.no_grad():
            value = model(a, b, mask=torch.from_numpy(mask > 0), **options).item()
        for kind in (
            *(tmp_path / "mask.png", str(tmp_path / "mask.png"), Image.fromarray(mask), mask),
            *(mask > 0, mask / 255, torch.from_numpy(mask), torch.from_numpy(mask > 0)),
        ):
            assert compare(*pixels, mask=kind, **options) == pytest.approx(value, rel=1e-6)
    each = compare(pixels[:1], pixels, mask=np.stack([mask, mask.T.reshape(40, 48)])[:, None])
    assert each.shape == (2,)
    for wrong, error, words in [
        (mask[1:], ValueError, "mask is of 39x48 pixels"),
        (mask * 0, ValueError, "mask is empty"),
        ([1, 2], TypeError, "mask is a list"),
        (Image.fromarray(pixels[0]), ValueError, "mask has colours"),
    ]:
        with pytest.raises(error, match=words):
            compare(*pixels, mask=wrong)
