"""``lpips-fast map``: the picture and the numbers that ``pair --map`` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import call, random_pixels, write_png

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
pytest.importorskip("matplotlib", reason="maps are drawn with Matplotlib")

RANDOM = "--random-trunk"


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    paths = tmp_path / "one.png", tmp_path / "other 画像.png"
    for path in paths:
        write_png(path, random_pixels(48, 56, generator))
    return paths


def test_it_is_pair_with_a_map(
    images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("map", *images, "-o", tmp_path / "map.png", RANDOM) == 0
    out = capsys.readouterr().out
    assert out.startswith("Distance: ")
    assert f"map: {tmp_path / 'map.png'}, {tmp_path / 'map.npy'}" in out
    assert call("pair", *images, "--map", tmp_path / "pair.png", RANDOM) == 0
    numbers = np.load(tmp_path / "map.npy")
    assert numbers.shape == (48, 56) and numbers.std() > 0
    np.testing.assert_array_equal(numbers, np.load(tmp_path / "pair.npy"))
    with Image.open(tmp_path / "map.png") as drawn, Image.open(tmp_path / "pair.png") as expected:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


def test_json(
    images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    options = ("--net", "squeeze", "--alpha", "refuse", "--json")
    assert call("map", *images, "-o", tmp_path / "map.png", RANDOM, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["net"], report["alpha"]) == ("squeeze", "refuse")
    assert report["map"]["picture"] == str(tmp_path / "map.png")


@pytest.mark.parametrize(
    ("out", "code", "message"),
    [("map.txt", 2, "'map.txt' does not end in .png"), ("gone/map.png", 1, "its folder does not")],
)
def test_where_no_map_can_be_written(
    images: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    out: str,
    code: int,
    message: str,
) -> None:
    assert call("map", *images, "-o", out, RANDOM) == code
    assert message in capsys.readouterr().err
