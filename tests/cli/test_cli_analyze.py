"""``lpips-fast analyze``: tables on standard output, pictures in a folder."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import call, random_pixels, write_png

from lpips_fast.analysis import figures as plots
from lpips_fast.normalization import NORMALIZATIONS

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
pytest.importorskip("matplotlib", reason="the pictures are drawn with Matplotlib")

OPTIONS = ("--random-trunk", "--net", "squeeze")
SOME = ("--normalization", "max", "--layers", "1,3")
PICTURES = ("activations.png", "normalizations.png", "layers.png", "maps.png", "channels.png")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "compare_normalizations.py"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    paths = [tmp_path / name for name in ("ref.png", "one $x$.png", "other 画像.png")]
    for path in paths:
        write_png(path, random_pixels(40, 48, generator))
    return paths


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from lpips_fast.cli import analyze

    monkeypatch.setattr(analyze, "_DPI", 40)  # drawn faster


def test_one_image(images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    capsys.readouterr()
    assert call("analyze", *images[:2], "-o", out, *OPTIONS) == 0
    words = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(PICTURES)
    for name in PICTURES:
        assert str(out / name) in words
        with Image.open(out / name) as picture:
            assert picture.width > 250 and picture.height > 100
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    lines = words.splitlines()
    assert lines[0] == "random trunk, not LPIPS: LPIPS squeeze, version 0.1, cpu"
    assert [line.split()[0] for line in lines if line.startswith("relu")] == 2 * [
        f"relu{k}" for k in range(1, 8)
    ]
    for kind in NORMALIZATIONS:
        assert any(line.startswith(f"{kind} ") for line in lines)


def test_several_images_as_json(
    images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("pair", *images[:2], "--json", *OPTIONS, *SOME)
    pair = json.loads(capsys.readouterr().out)
    assert pair["normalization"] == "max"
    options = ("-o", tmp_path, "--json", "--shared-scale", *OPTIONS, *SOME)
    assert call("analyze", *images, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert "squeeze, version 0.1, normalization max, layers 1,3 only" in report["metric"]
    assert report["layer_names"] == ["relu2", "relu4"]
    assert [row["path"] for row in report["images"]] == [str(path) for path in images[1:]]
    first = report["images"][0]
    assert first["distance"] == pytest.approx(pair["distance"], rel=1e-5)
    assert first["layers"] == pytest.approx(pair["layers"], rel=1e-5)
    assert sum(first["shares"]) == pytest.approx(1)
    assert list(report["normalizations"]) == list(NORMALIZATIONS)
    compared = report["normalizations"]["max"]["distances"]
    assert compared == pytest.approx([row["distance"] for row in report["images"]], rel=1e-5)
    assert report["normalizations"]["l2"]["rank_correlation_with_l2"] == pytest.approx(1)
    assert [layer["channels"] for layer in report["channels"]] == [128, 384]
    for picture in ("maps_1.png", "maps_2.png"):
        assert str(tmp_path / picture) in report["pictures"]
        assert (tmp_path / picture).is_file()


def test_what_cannot_be_done(
    images: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = tmp_path / "small.png"
    write_png(small, np.zeros((40, 40, 3), np.uint8))
    taken = tmp_path / "layers.png"
    write_png(taken, np.zeros((40, 48, 3), np.uint8))
    before = taken.read_bytes()
    for arguments, message in (
        ((*images[:2], "-o", images[0]), "is a file, expected a folder"),
        ((*images[:2], "-o", tmp_path / "no" / "folder"), "its parent folder does not exist"),
        ((images[0], small, "-o", tmp_path / "out"), "the images differ in size"),
        ((images[0], tmp_path / "gone.png", "-o", tmp_path / "out"), "no such file"),
        ((taken, images[1], "-o", tmp_path), f"would overwrite {taken}"),
    ):
        assert call("analyze", *arguments, *OPTIONS) == 1
        assert message in capsys.readouterr().err
    assert taken.read_bytes() == before and not (tmp_path / "out").exists()
    assert call("analyze", images[0], images[1]) == 2  # no --out

    def absent() -> None:
        raise ImportError('drawing needs Matplotlib: pip install "lpips-fast[plots]"')

    monkeypatch.setattr(plots, "require_matplotlib", absent)
    assert call("analyze", *images[:2], "-o", tmp_path / "out", *OPTIONS) == 1
    assert "lpips-fast[plots]" in capsys.readouterr().err


def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LPIPS_FAST_WEIGHTS", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    options = ["--net", "squeeze", "--output", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "Distances of 7 pairs" in out and "NOT LPIPS" in out  # no weights are to be had here
    for name in ("normalizations.png", "activations.png"):
        assert (tmp_path / "new" / name).stat().st_size > 10_000
