"""``evaluate``: the rows of the command line, in Python."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from image_folders import call, make_folders

import lpips_fast
from lpips_fast.folders import FolderError

pytest.importorskip("PIL.Image", reason="image files are read with Pillow")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_folders(tmp_path, [f"{i}.png" for i in range(5)])


def test_rows_are_those_of_the_command(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / "2.png").write_bytes(b"")
    rows = lpips_fast.evaluate(*folders, metrics=["lpips", "ssim"], per_layer=True, crop=(32, 32))
    output = tmp_path / "out.csv"
    options = ("--metrics", "lpips,ssim", "--per-layer", "--crop", "32x32")
    assert call("dirs", *folders, "-o", output, *options) == 1
    with output.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(row) for row in written]
    for row, fields in zip(rows, written, strict=True):
        assert (row["name"], row["error"]) == (fields["name"], fields["error"])
        for column in ("distance", "distance_relu5", "ssim"):
            value = row[column]
            assert fields[column] == ("" if value is None else f"{value:.8f}")


def test_they_make_a_frame(folders: tuple[Path, Path]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(lpips_fast.evaluate(*folders))
    assert list(frame.columns) == ["name", "distance", "error"] and len(frame) == 5
    assert frame["distance"].mean() > 0


def test_several_folders_patterns_and_a_model(tmp_path: Path) -> None:
    one, two = make_folders(tmp_path, ["1_gt.png", "2_gt.png"])
    model = lpips_fast.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    match = ("{}_gt.png", "{}_gt.png")
    rows = lpips_fast.evaluate(one, [two, one], model=model, match=match)
    assert [(row["name"], row["folder"]) for row in rows] == [
        *(("1_gt.png", "B"), ("1_gt.png", "A"), ("2_gt.png", "B"), ("2_gt.png", "A"))
    ]
    assert rows[1]["distance"] == 0 and rows[0]["distance"] > 0


def test_what_has_no_partner_is_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / "2.png").unlink()
    with pytest.warns(UserWarning, match=r"without a partner in .*B: 2\.png of .*A"):
        assert len(lpips_fast.evaluate(*folders)) == 4
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(FolderError, match="have no image in common"),
        pytest.warns(UserWarning, match="without a partner"),
    ):
        lpips_fast.evaluate(folders[0], tmp_path / "empty")
    with pytest.raises(ValueError, match=r"metrics are \['fid'\], expected some of lpips, psnr"):
        lpips_fast.evaluate(*folders, metrics=["fid"])
