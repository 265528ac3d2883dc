"""``--report``: the page of a run over folders and of an analysis."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import call, make_folders, random_pixels, rows_of, start, write_png

import lpips_fast

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
pytest.importorskip("jinja2", reason="reports are written with Jinja2")
pytest.importorskip("matplotlib", reason="the colours of maps are Matplotlib's")

RANDOM = "--random-trunk"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_folders(tmp_path, [f"{i}.png" for i in range(6)])


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def without_date(page: Path) -> str:
    """A page but for when it was written, and by which command."""
    text = page.read_text("utf-8")
    text, count = re.subn(r"<dt>(command|written)</dt><dd>.*?</dd>", "", text)
    assert count == 2
    return text


def rows_by_text(page: Path) -> list[str]:
    """What the page shows at first, a row each, without its tags."""
    body = page.read_text("utf-8").partition('<tbody role="rowgroup">')[2].partition("</tbody>")[0]
    rows = body.split("<tr ")[1:]
    return [" ".join(html.unescape(re.sub(r"<[^>]*>", " ", f"<{row}")).split()) for row in rows]


def test_a_page_has_the_numbers_of_the_csv(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, page = tmp_path / "out.csv", tmp_path / "page.html"
    options = ("--metrics", "lpips,psnr,ssim", "--per-layer", RANDOM)
    assert call("dirs", *folders, "-o", output, "--report", page, *options) == 0
    assert str(page) in capsys.readouterr().out
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    data = data_of(page)
    names = [name for name, _, _ in data["columns"]]
    assert names == ["distance", *(f"distance_relu{k}" for k in range(1, 6)), "psnr", "ssim"]
    assert data["rows"] == [
        [row["name"], "", row["error"], *(row[name] for name in names)] for row in rows
    ]
    worst = sorted(range(6), key=lambda k: -float(rows[k]["distance"]))
    assert data["first"] == worst
    shown = rows_by_text(page)
    for k, text in zip(worst, shown, strict=True):
        assert text.startswith(rows[k]["name"]) and "where they differ" in text
        for layer in range(1, 6):  # in the bars, and in its column
            assert f"relu{layer} {rows[k][f'distance_relu{layer}']} " in text
    text = page.read_text("utf-8")
    assert text.count("<img ") == 3 * 6
    assert "The trunk is random" in text and "random, not LPIPS, SHA-256" in text
    assert f"<dt>folder A</dt><dd>{folders[0]}</dd>" in text


def test_pictures_are_the_images_as_they_were_compared(tmp_path: Path) -> None:
    flat = {"A": (200, 40, 10), "B": (10, 60, 220)}
    for folder, colour in flat.items():
        pixels = np.zeros((80, 120, 3), np.uint8)
        pixels[20:60, 30:90] = colour  # what --crop leaves
        write_png(tmp_path / folder / "1.png", pixels)
    page = tmp_path / "page.html"
    arguments = ("-o", tmp_path / "out.csv", "--report", page, "--crop", "60x40", RANDOM)
    assert call("dirs", tmp_path / "A", tmp_path / "B", *arguments) == 0
    addresses = re.findall(r'<img alt="([^"]*)" src="data:[^,]*,([^"]*)"', page.read_text())
    assert [name for name, _ in addresses] == ["A/1.png", "B/1.png", "where they differ"]
    for (_, data), colour in zip(addresses, flat.values()):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (60, 40)
            middle = np.asarray(picture.convert("RGB"))[20, 30].astype(int)
        assert np.abs(middle - colour).max() < 12


def test_a_run_that_goes_on_has_the_page_of_one_that_did_not_stop(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [tmp_path / f"{k}.html" for k in range(3)]
    assert call("dirs", *folders, "-o", tmp_path / "one.csv", "--report", pages[0], RANDOM) == 0
    assert call("dirs", *folders, "-o", tmp_path / "two.csv", RANDOM) == 0
    hidden = folders[1] / "3.png"
    shutil.copy(hidden, tmp_path / "kept.png")
    write_png(hidden, np.zeros((64, 48, 3), np.uint8))
    call("dirs", *folders, "-o", tmp_path / "two.csv", "--report", pages[1], RANDOM)
    shutil.copy(tmp_path / "kept.png", hidden)
    for page in pages[1:]:  # some rows measured again, and then nothing
        capsys.readouterr()
        assert call("dirs", *folders, "-o", tmp_path / "two.csv", "--report", page, RANDOM) == 0
        assert without_date(page) == without_date(pages[0])
    assert "nothing to do" in capsys.readouterr().err


def test_rows_with_an_error_have_its_text(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / "0.png").write_bytes(b"<b>no image</b>")
    write_png(folders[1] / "1.png", np.zeros((20, 20, 3), np.uint8))
    page = tmp_path / "page.html"
    arguments = ("-o", tmp_path / "out.csv", "--report", page, RANDOM)
    assert call("dirs", *folders, *arguments) == 1
    data = data_of(page)
    errors = {row[0]: row[2] for row in data["rows"] if row[2]}
    assert errors.keys() == {"0.png", "1.png"}
    assert all(
        error == row.split(",", 2)[2].strip('"')
        for error, row in zip(errors.values(), rows_of(tmp_path / "out.csv"))
    )
    assert data["first"][-2:] == [0, 1]  # what has no number comes last
    assert "only the 2 with an error" in page.read_text()
    assert page.read_text().count("<img ") == 3 * 4


def test_several_folders_and_hostile_names(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    names = [
        "a.png",
        "<script>alert(1)<&'\".png",
        b"caf\xe9.png".decode("utf-8", "surrogateescape"),
    ]
    for folder in ("A", "ours", "theirs"):
        for name in names:
            try:
                write_png(tmp_path / folder / name, random_pixels(32, 32, generator))
            except (OSError, UnicodeError):
                pytest.skip("this file system takes only names that are text")
    page = tmp_path / "page.html"
    dirs = [tmp_path / folder for folder in ("A", "ours", "theirs")]
    assert call("dirs", *dirs, "-o", tmp_path / "out.csv", "--report", page, RANDOM) == 0
    data, text = data_of(page), page.read_text("utf-8")
    assert {row[1] for row in data["rows"]} == {"ours", "theirs"}
    assert {row[0] for row in data["rows"]} == {names[0], names[1], "caf\\udce9.png"}
    assert "alert(1)<&" not in text and "theirs − ours: LPIPS" not in text
    assert "theirs − ours: distance (alex)" in text  # it is not LPIPS: the trunk is random
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert [[r["name"], r["distance"]] for r in csv.DictReader(file)] == [
            [row[0], row[3]] for row in data["rows"]
        ]


def test_without_lpips_the_first_column_says_what_is_worst(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copy(folders[0] / "2.png", folders[1] / "2.png")  # identical: an infinite PSNR
    page = tmp_path / "page.html"
    arguments = ("--metrics", "psnr,ssim", "--report", page)
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", *arguments) == 0
    data = data_of(page)
    numbers = [float(data["rows"][k][3]) for k in data["first"]]
    assert numbers == sorted(numbers) and numbers[-1] == float("inf")
    assert data["first"][-1] == 2
    text = page.read_text()
    assert "<img " not in text and "of which 1 are identical" in text


def test_the_map_is_of_the_first_network(folders: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = ("--net", "all", "--metrics", "ssim,lpips", "--resize", "40", "--report", page)
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", RANDOM, *options) == 0
    data = data_of(page)
    assert [name for name, _, _ in data["columns"]][:2] == ["ssim", "distance_alex"]
    assert data["sortedBy"] == 1
    numbers = [float(data["rows"][k][4]) for k in data["first"]]
    assert numbers == sorted(numbers, reverse=True)
    first = rows_by_text(page)[0]
    assert sum(float(x) for x in re.findall(r"relu[1-5] ([0-9.]+)", first)) == pytest.approx(
        numbers[0], rel=1e-4
    )


@pytest.mark.parametrize(
    "options", [(), ("--mask-mode", "fill", "--fill-value", "-1")], ids=["weighted", "fill"]
)
def test_maps_and_layers_are_of_the_masked_part(tmp_path: Path, options: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    for name in ("A/1.png", "B/1.png"):
        write_png(tmp_path / name, random_pixels(64, 64, generator))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :20] = 255
    write_png(tmp_path / "mask.png", mask)
    page, output = tmp_path / "page.html", tmp_path / "out.csv"
    arguments = ("--mask", tmp_path / "mask.png", "--report", page, "-o", output, RANDOM)
    assert call("dirs", tmp_path / "A", tmp_path / "B", *arguments, *options) == 0
    distance = float(rows_of(output)[0].split(",")[1])
    (shown,) = rows_by_text(page)
    layers = [float(x) for x in re.findall(r"relu[1-5] ([0-9.]+)", shown)]
    assert sum(layers) == pytest.approx(distance, rel=1e-4)
    panels = re.findall(r'<img alt="([^"]*)" src="data:[^,]*,([^"]*)"', page.read_text())
    assert [name for name, _ in panels] == ["A/1.png", "B/1.png", "mask", "where they differ"]
    with Image.open(io.BytesIO(base64.b64decode(panels[2][1]))) as picture:
        assert picture.size == (64, 64)
        drawn = np.asarray(picture.convert("L"))
        assert drawn[32, 10] > 240 and drawn[32, 40] < 15
    with Image.open(io.BytesIO(base64.b64decode(panels[3][1]))) as picture:
        heat = np.asarray(picture.convert("L")).astype(int)
        assert heat[:, :12].mean() > heat[:, 44:].mean() + 20  # nothing far outside the mask


def test_rows_on_standard_output_have_a_page_too(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert call("dirs", *folders, "-o", "-", "--report", page, RANDOM) == 0
    out = capsys.readouterr().out.splitlines()[1:]
    assert [",".join((r[0], r[3], r[2])) for r in data_of(page)["rows"]] == out


def test_json_names_the_page(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, expected in (((), None), (("--report", tmp_path / "p.html"), "p.html")):
        arguments = ("-o", tmp_path / "out.csv", "--json", *options, RANDOM)
        capsys.readouterr()
        assert call("dirs", *folders, *arguments) == 0
        found = json.loads(capsys.readouterr().out)["report"]
        assert found == (expected and str(tmp_path / expected))


def test_two_processes_write_the_page_of_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, launcher in (
        ("one", ("-m", "lpips_fast")),
        ("two", ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lpips_fast")),
    ):
        command = ("dirs", *folders, "-o", tmp_path / f"{name}.csv", RANDOM)
        process = start(*command, "--report", tmp_path / f"{name}.html", program=launcher)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert without_date(tmp_path / "two.html") == without_date(tmp_path / "one.html")


def test_what_cannot_be_written_is_said_before_any_work(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    link = tmp_path / "link.html"
    link.symlink_to(folders[0] / "0.png")
    before = link.read_bytes()
    for page, code, words in (
        (tmp_path / "no such folder" / "p.html", 1, "its folder does not exist"),
        (link, 1, "0.png, which is read: name another file"),
        (tmp_path / "page.pdf", 2, "does not end in .html"),
    ):
        capsys.readouterr()
        assert call("dirs", *folders, "-o", output, "--report", page, RANDOM) == code
        assert words in capsys.readouterr().err
        assert not output.exists()
    assert link.read_bytes() == before


def test_a_missing_package_is_named_before_any_work(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", output, "--report", tmp_path / "p.html", RANDOM) == 1
    assert 'pip install "lpips-fast[report]"' in capsys.readouterr().err
    assert not output.exists()


def test_an_analysis_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(2)
    files = [tmp_path / name for name in ("a/1.png", "b/1.png", "c/1.png")]
    for file in files:
        write_png(file, random_pixels(40, 48, generator))
    page = tmp_path / "page.html"
    options = (RANDOM, "--net", "squeeze", "--json")
    assert call("analyze", *files, "--report", page, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == [] and report["report"] == str(page)
    data = data_of(page)
    assert [row[0] for row in data["rows"]] == ["b/1.png", "c/1.png"]  # told apart by folders
    for row, image in zip(data["rows"], report["images"]):
        assert float(row[3]) == pytest.approx(image["distance"], abs=1e-8)
    text = page.read_text("utf-8")
    # A reference, an image, the sum and seven layers each; and three drawings.
    assert text.count("<img ") == 2 * 10 + 3
    assert "Normalisations side by side" in text and "The trunk is random" in text
    assert sorted(tmp_path.iterdir()) == sorted([page, *(f.parent for f in files)])


def test_an_analysis_writes_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("analyze", tmp_path / "a.png", tmp_path / "b.png", RANDOM) == 2
    assert "give --report HTML for a page, -o DIR for pictures" in capsys.readouterr().err


def test_the_templates_are_in_the_package() -> None:
    """As package data, which `.ci/run` finds in the wheel."""
    folder = Path(lpips_fast.__file__).parent / "report" / "templates"
    assert {path.name for path in folder.iterdir()} == {"page.html", "page.css", "page.js"}
    code = "import lpips_fast.report.page, sys; assert 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
