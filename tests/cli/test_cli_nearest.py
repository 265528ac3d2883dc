"""``lpips-fast nearest`` and ``pairwise A B``: the model's numbers, in files that open."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import call, make_folders, random_pixels, write_png

import lpips_fast
from lpips_fast.images import read_image

pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")

RANDOM = "--random-trunk"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    a, b = make_folders(tmp_path, [f"{i}.png" for i in range(5)], sizes=[(40, 48)])
    (b / "0.png").unlink()
    (b / "1.png").rename(b / "=1.png")
    return a, b


def images_of(folder: Path) -> tuple[list[str], torch.Tensor]:
    names = lpips_fast.folders.list_images(folder)
    return names, torch.cat([read_image(folder / name) for name in names])


def model() -> lpips_fast.LPIPS:
    torch.manual_seed(0)  # the random trunk of the command line
    return lpips_fast.LPIPS(pnet_rand=True, verbose=False)


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_two_folders_all_with_all(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    output = tmp_path / "matrix.csv"
    capsys.readouterr()
    assert call("pairwise", a, b, "-o", output, RANDOM, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    (names_a, images_a), (names_b, images_b) = images_of(a), images_of(b)
    expected = model().pairwise(images_a, images_b)
    rows = read_rows(output)
    assert rows[0] == ["name", *(name.replace("=1", "./=1") for name in names_b)]
    assert [row[0] for row in rows[1:]] == names_a
    matrix = torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]])
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-6)
    assert (report["images"], report["others"], report["pairs"]) == (5, 4, 20)
    assert (
        report["mean"] == pytest.approx(matrix.mean().item()) and report["standard_error"] is None
    )
    i, j = divmod(int(matrix.argmin()), 4)
    assert report["closest"]["names"] == [names_a[i], names_b[j]]
    assert (tmp_path / "matrix.png").exists()
    assert json.loads((tmp_path / "matrix.json").read_text()) == report


def test_folders_of_two_sizes(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    for k in range(2):
        write_png(small / f"{k}.png", random_pixels(34, 36, torch.Generator()))
    assert call("pairwise", folders[0], small, RANDOM) == 1
    assert "have 48x40 pixels and those of" in capsys.readouterr().err
    assert call("pairwise", folders[0], small, RANDOM, "--resize", "36x34") == 0


def test_the_nearest(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    output = tmp_path / "nearest.csv"
    assert call("nearest", a, "--gallery", b, "-k", 3, "-o", output, RANDOM) == 0
    (names_a, images_a), (names_b, images_b) = images_of(a), images_of(b)
    distances, positions = model().nearest(images_a, images_b, 3)
    rows = read_rows(output)
    assert rows[0] == ["name", "rank", "neighbour", "distance"]
    assert [row[:2] for row in rows[1:]] == [[n, str(k)] for n in names_a for k in (1, 2, 3)]
    found = [names_b[p].replace("=1", "./=1") for p in positions.flatten().tolist()]
    assert [row[2] for row in rows[1:]] == found
    written = np.array([float(row[3]) for row in rows[1:]])
    np.testing.assert_allclose(written, distances.flatten().numpy(), rtol=1e-5, atol=1e-7)
    capsys.readouterr()
    assert call("nearest", a / "2.png", "--gallery", a, "-k", 2, RANDOM, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["neighbours"]["2.png"][0] == {"name": "2.png", "distance": 0.0}
    assert call("nearest", a / "2.png", "--gallery", a, RANDOM) == 0
    out = capsys.readouterr().out
    assert out == "name,rank,neighbour,distance\n2.png,1,2.png,0.00000000\n"


def test_what_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    for arguments, code, message in (
        (("nearest", a, "--gallery", a / "1.png"), 2, "is a file, expected the folder to look in"),
        (("nearest", a, "--gallery", b, "-k", 9), 1, "holds 4 readable images, fewer than -k 9"),
        (("nearest", tmp_path / "x.png", "--gallery", b), 1, "no such file"),
        (
            ("nearest", a, "--gallery", b, "-o", tmp_path / "x" / "o.csv"),
            1,
            "folder does not exist",
        ),
        (("pairwise", a / "1.png"), 2, "two images are compared by lpips-fast pair"),
        (("pair", a, b), 2, "images of folders are compared by lpips-fast dirs A B"),
        (("dirs", a / "1.png", b / "2.png", "-o", tmp_path / "o.csv"), 2, "by lpips-fast pair A B"),
        (("dirs", a, "-o", tmp_path / "o.csv"), 2, "two folders or more are compared"),
    ):
        assert call(*arguments, RANDOM) == code, arguments
        assert message in capsys.readouterr().err
    (b / "2.png").write_bytes(b"")
    assert call("nearest", a, "--gallery", b, RANDOM) == 1
    assert "1 of 9 images could not be read" in capsys.readouterr().err
