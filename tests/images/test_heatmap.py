"""The picture of a distance map: readable, of a sensible size, and true to the numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lpips_fast.images import heatmap
from lpips_fast.images.heatmap import save_heatmap, save_map_numbers

matplotlib = pytest.importorskip("matplotlib", reason="drawing needs Matplotlib")
Image = pytest.importorskip("PIL.Image", reason="looking at the picture needs Pillow")


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def colour_map_pixels(picture: np.ndarray) -> np.ndarray:
    """The map's part of a picture that shows the map alone, without its colour bar."""
    coloured = (picture.max(axis=2) < 250) | (np.ptp(picture, axis=2) > 12)
    # The map is the widest run of coloured columns and rows.
    columns = np.flatnonzero(coloured.mean(axis=0) > 0.5)
    run = max(np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1), key=len)
    rows = np.flatnonzero(coloured[:, run].mean(axis=1) > 0.95)
    return picture[rows[0] : rows[-1] + 1, run[0] : run[-1] + 1]


def test_the_map_is_a_readable_picture(tmp_path: Path, generator: torch.Generator) -> None:
    distance_map = torch.rand(1, 1, 40, 56, generator=generator)
    path = save_heatmap(distance_map, tmp_path / "map.png")
    assert path == tmp_path / "map.png"
    picture = pixels_of(path)
    height, width = picture.shape[:2]
    assert 500 < height < 1500 and 500 < width < 2500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200


def test_the_colours_follow_the_numbers(tmp_path: Path) -> None:
    # Left to right from 0 to 1: dark to bright, at the ends the ends of the colour map.
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    area = colour_map_pixels(pixels_of(save_heatmap(ramp, tmp_path / "map.png")))
    expected = 255 * matplotlib.colormaps["magma"](np.linspace(0, 1, 64))[:, :3]
    centres = (np.arange(64) + 0.5) * area.shape[1] / 64
    found = area[area.shape[0] // 2, centres.astype(int)]
    np.testing.assert_allclose(found, expected, atol=4)


def test_the_same_end_makes_two_maps_comparable(tmp_path: Path) -> None:
    half = np.full((32, 32), 0.5, np.float32)
    own = colour_map_pixels(pixels_of(save_heatmap(half, tmp_path / "own.png")))
    shared = colour_map_pixels(pixels_of(save_heatmap(half, tmp_path / "shared.png", vmax=1.0)))
    magma = matplotlib.colormaps["magma"]
    np.testing.assert_allclose(own[100, 100], np.multiply(magma(1.0)[:3], 255), atol=2)
    np.testing.assert_allclose(shared[100, 100], np.multiply(magma(0.5)[:3], 255), atol=2)


def test_equal_images_are_all_dark(tmp_path: Path) -> None:
    area = colour_map_pixels(pixels_of(save_heatmap(np.zeros((32, 32)), tmp_path / "map.png")))
    assert area.max() < 12


def test_images_beside_the_map(tmp_path: Path, generator: torch.Generator) -> None:
    distance_map = torch.rand(32, 48, generator=generator)
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 32, 48)
    green = np.zeros((32, 48, 3), np.uint8)
    green[..., 1] = 255
    alone = pixels_of(save_heatmap(distance_map, tmp_path / "alone.png"))
    together = pixels_of(
        save_heatmap(distance_map, tmp_path / "together.png", image0=red, image1=green)
    )
    assert together.shape[1] > 2 * alone.shape[1]
    is_red = (together == [255, 0, 0]).all(axis=2)
    is_green = (together == [0, 255, 0]).all(axis=2)
    assert is_red.sum() > 100_000
    assert is_green.sum() == pytest.approx(is_red.sum(), rel=0.01)
    assert np.argwhere(is_red)[:, 1].max() < np.argwhere(is_green)[:, 1].min()


@pytest.mark.parametrize("shape", [(16, 640), (640, 16), (1, 1), (1, 300), (512, 512)])
def test_pictures_of_any_shape_stay_of_a_sensible_size(
    tmp_path: Path, generator: torch.Generator, shape: tuple[int, int]
) -> None:
    image = torch.rand(3, *shape, generator=generator) * 2 - 1
    path = save_heatmap(
        torch.rand(shape, generator=generator), tmp_path / "map.png", image0=image, image1=image
    )
    height, width = pixels_of(path).shape[:2]
    assert 150 < height < 2500 and 500 < width < 3000


def test_what_the_picture_says(tmp_path: Path) -> None:
    values = np.array([[0.25, 0.75]], np.float32)
    path = save_heatmap(
        values,
        tmp_path / "map.svg",
        title="cost $5 vs cost $6_a.png",
        label="LPIPS alex, version 0.1",
        distance=0.721881,
        image0=np.zeros((1, 2, 3), np.uint8),
        image1=np.zeros((1, 2, 3), np.uint8),
        names=("left.png", "right.png"),
    )
    text = path.read_text(encoding="utf-8")
    # Matplotlib's SVG draws glyphs and keeps the text in a comment above them.
    for part in (
        "cost $5 vs cost $6_a.png",
        "LPIPS alex, version 0.1",
        "distance 0.72188100",
        "map mean 0.500000, max 0.750000",
        "left.png",
        "right.png",
        "LPIPS distance per position",
    ):
        assert part in text


def test_distances_that_are_not_lpips_have_another_name(tmp_path: Path) -> None:
    path = save_heatmap(np.eye(8), tmp_path / "map.svg", quantity="LPIPS (l1, $2 layers) distance")
    text = path.read_text(encoding="utf-8")
    assert "LPIPS (l1, $2 layers) distance per position" in text
    assert "LPIPS (l1, $2 layers) distance map" in text
    assert "LPIPS distance" not in text


def test_the_callers_own_figures_are_left_alone(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    backend = matplotlib.get_backend()
    own = pyplot.figure()
    try:
        numbers, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
        save_heatmap(np.ones((4, 4)), tmp_path / "map.png")
        assert pyplot.get_fignums() == numbers
        assert pyplot.gcf() is own and not own.axes
        assert dict(matplotlib.rcParams) == settings
        assert matplotlib.get_backend() == backend
    finally:
        pyplot.close(own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maps_of_other_types_that_need_a_gradient(
    tmp_path: Path, generator: torch.Generator, dtype: torch.dtype
) -> None:
    values = torch.rand(1, 1, 8, 8, generator=generator).to(dtype).requires_grad_()
    save_heatmap(values, tmp_path / "map.png")
    numbers = np.load(save_map_numbers(values, tmp_path / "map.png"))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, values.detach()[0, 0].float().numpy())


def test_the_numbers_beside_the_picture(tmp_path: Path, generator: torch.Generator) -> None:
    values = torch.rand(1, 1, 9, 7, generator=generator)
    path = save_map_numbers(values, tmp_path / "two words.v1.png")
    assert path == tmp_path / "two words.v1.npy"
    np.testing.assert_array_equal(np.load(path), values[0, 0].numpy())


@pytest.mark.parametrize("shape", [(3,), (2, 1, 8, 8), (1, 3, 8, 8), (0, 5)])
def test_a_map_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected the map of one pair, of shape"):
        save_heatmap(np.zeros(shape), tmp_path / "map.png")
    with pytest.raises(ValueError, match="expected the map of one pair, of shape"):
        save_map_numbers(np.zeros(shape), tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    values = np.zeros((4, 5))
    values[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity at 1 of 20 positions"):
        save_heatmap(values, tmp_path / "map.png")


def test_a_scale_without_extent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vmax is 0\.0 and vmin is 0\.0"):
        save_heatmap(np.ones((4, 4)), tmp_path / "map.png", vmax=0.0)


@pytest.mark.parametrize("name", ["map", "map.npy", "map.txt"])
def test_an_unknown_picture_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png, \.pdf"):
        save_heatmap(np.ones((4, 4)), tmp_path / name)


@pytest.mark.parametrize("suffix", heatmap.PICTURE_SUFFIXES)
def test_each_suffix_writes_a_file(tmp_path: Path, suffix: str) -> None:
    path = save_heatmap(np.eye(8), tmp_path / f"map{suffix}")
    assert path.stat().st_size > 1000


def test_an_image_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected an image as float .* got int64 \(3, 4, 4\)"):
        save_heatmap(np.ones((4, 4)), tmp_path / "map.png", image0=np.ones((3, 4, 4), np.int64))


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lpips-fast\[plots\]"'):
        save_heatmap(np.ones((4, 4)), tmp_path / "map.png")
