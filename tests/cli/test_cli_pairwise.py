"""``lpips-fast pairwise``: the matrix, its figures and its picture; and what goes wrong."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpips_fast
from lpips_fast import cli
from lpips_fast.cli import pairwise as command
from lpips_fast.images.reading import read_image
from lpips_fast.pairs.all_pairs import mean_diversity

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
pytest.importorskip("matplotlib", reason="the command draws with Matplotlib")

RANDOM = "--random-trunk"
NAMES = ["2.png", "10.png", "two words #1.png", 'Übergröße "$5", 画像.png']


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four fresh random images, one beside another, and a file that is none."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        write_image(folder / name, generator)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def write_image(path: Path, generator: torch.Generator, size: tuple[int, int] = (40, 48)) -> None:
    pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(["pairwise", *map(str, arguments)])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


def expected_matrix(folder: Path, names: list[str]) -> torch.Tensor:
    torch.manual_seed(0)  # the random trunk of the command line
    model = lpips_fast.LPIPS(net="alex", pnet_rand=True, verbose=False)
    return model.pairwise(torch.cat([read_image(folder / name) for name in names]))


# --------------------------------------------------------------------------------------- results


def test_numbers(run: Any, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "matrix.npy"
    code, out, err = run(folder, RANDOM, "-o", output, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["names"] == NAMES  # in natural order
    matrix = np.load(output)
    assert matrix.dtype == np.float32 and matrix.shape == (4, 4)
    expected = expected_matrix(folder, NAMES)
    torch.testing.assert_close(torch.from_numpy(matrix), expected)
    mean, error = mean_diversity(expected)
    assert report["mean"] == pytest.approx(mean, rel=1e-5)
    assert report["standard_error"] == pytest.approx(error, rel=1e-4)
    assert (report["images"], report["pairs"]) == (4, 6)
    assert (report["width"], report["height"]) == (48, 40)
    above = np.where(np.eye(4, dtype=bool), np.inf, matrix)
    i, j = np.unravel_index(above.argmin(), above.shape)
    assert report["closest"]["names"] == [NAMES[i], NAMES[j]]
    assert report["closest"]["distance"] == pytest.approx(float(matrix[i, j]))
    assert json.loads(output.with_suffix(".json").read_text()) == report
    assert "1 files of" in err and "are no images by their names" in err
    assert {path.name for path in tmp_path.iterdir()} == {
        *("images", "matrix.npy", "matrix.json", "matrix.png")
    }


def test_csv(run: Any, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "matrix.csv"
    code, out, _ = run(folder, RANDOM, "-o", output)
    assert code == 0
    text = output.read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))  # a header row and rows, nothing else
    assert rows[0] == ["name", *NAMES]
    assert [row[0] for row in rows[1:]] == NAMES
    matrix = np.array([row[1:] for row in rows[1:]], np.float32)
    assert np.array_equal(matrix, matrix.T)
    torch.testing.assert_close(torch.from_numpy(matrix), expected_matrix(folder, NAMES))
    report = json.loads((tmp_path / "matrix.json").read_text())
    assert report["package_version"] == lpips_fast.__version__
    assert report["weights"].startswith("random, not LPIPS")
    assert (report["width"], report["height"]) == (48, 40)
    assert out.splitlines()[0].startswith(f"Mean distance: {report['mean']:.6f} ± ")


def test_picture(run: Any, folder: Path, tmp_path: Path) -> None:
    assert run(folder, RANDOM, "-o", tmp_path / "matrix.npy")[0] == 0
    with Image.open(tmp_path / "matrix.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    run(folder, RANDOM, "-o", tmp_path / "bare.npy", "--no-picture")
    assert not (tmp_path / "bare.png").exists() and (tmp_path / "bare.json").exists()


@pytest.mark.parametrize("count", [3, 20, 60])
def test_picture_of_any_number(run: Any, tmp_path: Path, count: int) -> None:
    generator = torch.Generator()
    (tmp_path / "images").mkdir()
    for k in range(count):
        write_image(tmp_path / "images" / f"{k}.png", generator, (32, 32))
    assert run(tmp_path / "images", RANDOM, "-o", tmp_path / "matrix.npy")[0] == 0
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) < 4000


def test_words(run: Any, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(folder, RANDOM)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("Mean distance: ") and " ± " in lines[0]
    assert "4 images of 48x40, 6 pairs" in out
    assert "random trunk, not LPIPS" in out and "closest: " in out and "written" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


def test_recursive(run: Any, folder: Path) -> None:
    (folder / "more").mkdir()
    write_image(folder / "more" / "1.png", torch.Generator())
    assert json.loads(run(folder, RANDOM, "--json")[1])["images"] == 4
    report = json.loads(run(folder, RANDOM, "--json", "--recursive")[1])
    assert report["images"] == 5 and "more/1.png" in report["names"]


def test_two_images_have_no_standard_error(run: Any, folder: Path) -> None:
    for name in NAMES[2:]:
        (folder / name).unlink()
    code, out, _ = run(folder, RANDOM, "--json")
    assert code == 0 and json.loads(out)["standard_error"] is None
    assert "±" not in run(folder, RANDOM)[1]


def test_plan(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(command, "pairwise", measured)
    code, out, _ = run(folder, RANDOM, "--plan", "--memory-limit", "2.5G")
    assert code == 0
    assert "4 images of 40x48 with each other" in out and "of 2.50 GiB allowed" in out


def test_memory_limit_is_what_the_images_leave(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    original = command.pairwise

    def watched(*arguments: Any, memory_limit: int, **options: Any) -> Any:
        limits.append(memory_limit)
        return original(*arguments, memory_limit=memory_limit, **options)

    monkeypatch.setattr(command, "pairwise", watched)
    first = json.loads(run(folder, RANDOM, "--json", "--memory-limit", "64M")[1])
    assert limits == [64 * 2**20 - 4 * 40 * 48 * 3]
    # With no room for decoded images they are read again when they are needed.
    monkeypatch.setattr(command, "_CACHE_SHARE", 2**40)
    second = json.loads(run(folder, RANDOM, "--json", "--memory-limit", "64M")[1])
    assert limits[1] == 64 * 2**20
    assert second == first


@pytest.mark.parametrize(
    ("text", "count"), [("8G", 2**33), ("512M", 2**29), ("1.5GiB", 3 * 2**29), ("7kB", 7168)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert command._bytes(text) == count


# -------------------------------------------------------------------------------------- failures


def test_broken_files_among_good_ones(run: Any, folder: Path, tmp_path: Path) -> None:
    whole = (folder / NAMES[0]).read_bytes()
    (folder / "5 cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6 empty.png").write_bytes(b"")
    os.symlink(tmp_path / "gone.png", folder / "7 dangling.png")
    output = tmp_path / "matrix.npy"
    code, out, err = run(folder, RANDOM, "-o", output, "--json")
    assert code == 1
    report = json.loads(out)
    assert report["names"] == NAMES and np.load(output).shape == (4, 4)
    assert list(report["unreadable"]) == ["5 cut.png", "6 empty.png", "7 dangling.png"]
    for reason in ("cut short", "is empty", "no such file"):
        assert reason in err
    assert err.splitlines()[-1] == (
        "lpips-fast: error: 3 of 7 images could not be read and are not part of the result"
    )
    code, out, err = run(folder, RANDOM, "-o", tmp_path / "matrix.csv")
    assert code == 1 and out.startswith("Mean distance: ")
    assert len(json.loads((tmp_path / "matrix.json").read_text())["unreadable"]) == 3


def assert_failed(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("lpips-fast: error: ") and "bug" not in last
    for part in parts:
        assert part in last


def test_sizes_that_differ(run: Any, folder: Path) -> None:
    write_image(folder / "3.png", torch.Generator(), (64, 40))
    assert_failed(
        run(folder, RANDOM), "2 different sizes", "2.png is 48x40", "3.png is 40x64", "resize"
    )


def test_a_file_that_changes_in_between(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_CACHE_SHARE", 2**40)
    load_model = command.load_model

    def meanwhile(options: Any) -> Any:
        (folder / "10.png").unlink()
        return load_model(options)

    monkeypatch.setattr(command, "load_model", meanwhile)
    assert_failed(run(folder, RANDOM), "10.png': no such file")


def test_too_few_images(run: Any, folder: Path, tmp_path: Path) -> None:
    for name in NAMES[1:]:
        (folder / name).unlink()
    assert_failed(run(folder, RANDOM), "1 readable image, and at least 2 are needed")
    (tmp_path / "empty").mkdir()
    assert_failed(run(tmp_path / "empty", RANDOM), "0 readable images")


def test_no_folder(run: Any, folder: Path, tmp_path: Path) -> None:
    assert_failed(run(tmp_path / "gone", RANDOM), "gone does not exist")
    code, out, err = run(folder / NAMES[0], RANDOM)
    assert (code, out) == (2, "") and "two images are compared by lpips-fast pair A B" in err


def test_images_that_are_too_small(run: Any, tmp_path: Path) -> None:
    for k in range(2):
        write_image(tmp_path / f"{k}.png", torch.Generator(), (8, 8))
    assert_failed(run(tmp_path, RANDOM), "have 8x8 pixels", "needs at least 31x31")


def test_memory_that_is_too_small(run: Any, folder: Path) -> None:
    assert_failed(run(folder, RANDOM, "--memory-limit", "100K"), "--memory-limit is", "at least")


def test_where_nothing_can_be_written(run: Any, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "gone" / "matrix.npy"
    assert_failed(run(folder, RANDOM, "-o", target), "its folder does not exist")
    # The picture would be one of the images next time.
    assert_failed(run(folder, RANDOM, "-o", folder / "matrix.npy"), "would be among the images")
    (folder / "sub").mkdir()
    inside = folder / "sub" / "matrix.csv"
    assert_failed(run(folder, RANDOM, "--recursive", "-o", inside), "would be among the images")
    assert run(folder, RANDOM, "-o", inside)[0] == 0
    assert run(folder, RANDOM, "-o", folder / "matrix.csv", "--no-picture")[0] == 0


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    output = tmp_path / "matrix.csv"
    output.write_text("before")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    assert_failed(run(folder, RANDOM, "-o", output), "matrix.csv: No space left on device")
    assert output.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "matrix.csv"}


def test_nan(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "pairwise", lambda *a, **o: torch.full((4, 4), math.nan))
    assert_failed(run(folder, RANDOM), "weights must be damaged")


def test_without_matplotlib(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "matrix.npy"
    assert_failed(run(folder, RANDOM, "-o", output), 'pip install "lpips-fast[plots]"')
    assert run(folder, RANDOM, "-o", output, "--no-picture")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: DIR"),
        (["images", "-o", "matrix.txt"], "'matrix.txt' does not end in .npy or .csv"),
        (["images", "--memory-limit", "lots"], "'lots' is no amount of memory"),
        (["images", "--memory-limit", "0G"], "'0G' is no amount of memory"),
        (["images", "--net", "resnet"], "invalid choice"),
    ],
)
def test_usage(run: Any, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_progress(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "reading" not in run(folder, RANDOM)[2]  # nobody looks
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    code, out, err = run(folder, RANDOM, "--json")
    assert code == 0
    json.loads(out)
    assert "reading: 100%" in err and "comparing: 100%" in err
