"""``--mask`` of ``pair``, ``map`` and ``dirs``: the model's numbers, resuming, refusals."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import call, make_folders, rows_of, settings_of, write_png
from torch import Tensor

import lpips_fast
from lpips_fast.images import read_image

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")

RANDOM = "--random-trunk"
SIZE = (40, 33)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_folders(tmp_path, [f"{i}.png" for i in range(6)], [SIZE])


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """One for each of the images, of three kinds of files; the last one is nearly empty."""
    for k in range(6):
        pixels = np.zeros(SIZE, np.uint8)
        pixels[: 6 * k + 1, 3:20] = (255, 1, 100)[k % 3]
        write_png(tmp_path / "masks" / f"{k}{('.png', '.bmp')[k % 2]}", pixels)
    return tmp_path / "masks"


def mask_of(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).float()


def distance(a: Path, b: Path, mask: Path, **options: Any) -> float:
    model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    model.net.load_state_dict(random_trunk())
    with torch.no_grad():
        return model(read_image(a), read_image(b), mask=mask_of(mask), **options).item()


def random_trunk() -> dict[str, Tensor]:
    """What ``--random-trunk`` draws."""
    from argparse import Namespace

    from lpips_fast.cli import _parser, model

    options: Namespace = _parser().parse_args(["pair", "a", "b", RANDOM])
    return model.load_model(options).net.state_dict()


MODES = [
    ((), {}),
    (("--mask-mode", "fill"), {"mask_mode": "fill"}),
    (("--mask-mode", "fill", "--fill-value", "-1"), {"mask_mode": "fill", "fill_value": -1.0}),
]


@pytest.mark.parametrize(("words", "options"), MODES)
def test_pair(folders: Any, masks: Path, capsys: Any, words: Any, options: Any) -> None:
    a, b = (folder / "2.png" for folder in folders)
    assert call("pair", a, b, RANDOM, "--mask", masks / "2.png", *words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected = distance(a, b, masks / "2.png", **options)
    assert report["distance"] == pytest.approx(expected, rel=1e-6)
    assert report["mask"]["path"] == str(masks / "2.png")
    assert sum(report["layers"]) == pytest.approx(expected, rel=1e-5)
    assert call("pair", a, b, RANDOM, "--mask", masks / "2.png", *words) == 0
    out = capsys.readouterr().out
    assert f"Distance: {expected:.6f}" in out
    assert ("filled with" if words else "weighted") in out


def test_map(folders: Any, masks: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn with Matplotlib")
    a, b = (folder / "2.png" for folder in folders)
    target = tmp_path / "out.png"
    assert call("map", a, b, target, RANDOM, "--mask", masks / "2.png") == 0
    numbers = np.load(target.with_suffix(".npy")).reshape(SIZE)
    mask = mask_of(masks / "2.png").numpy()
    assert (numbers[mask == 0] == 0).all() and (numbers[mask > 0] > 0).all()


@pytest.mark.parametrize(("words", "options"), MODES)
def test_dirs(folders: Any, masks: Path, tmp_path: Path, words: Any, options: Any) -> None:
    output = tmp_path / "out.csv"
    arguments = ("dirs", *folders, RANDOM, "-o", output, *words)
    assert call(*arguments, "--mask", masks) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for k, row in enumerate(rows):
        a, b = (folder / f"{k}.png" for folder in folders)
        expected = distance(a, b, next(masks.glob(f"{k}.*")), **options)
        assert float(row["distance"]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert settings_of(output)["mask"] == str(masks)
    # One mask for all; and of one the same number as of a folder of its copies.
    one = tmp_path / "one.csv"
    assert call("dirs", *folders, RANDOM, "-o", one, *words, "--mask", masks / "5.bmp") == 0
    assert rows_of(one)[5] == rows_of(output)[5]


def test_python_has_the_same_rows(folders: Any, masks: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    arguments = ("--mask", masks, "--mask-mode", "fill", "--fill-value", "0.5")
    assert call("dirs", *folders, RANDOM, "-o", output, *arguments) == 0
    model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    model.net.load_state_dict(random_trunk())
    options: dict[str, Any] = {"mask": masks, "mask_mode": "fill", "fill_value": 0.5}
    rows = lpips_fast.evaluate(*folders, model=model, **options)
    assert [f"{row['name']},{row['distance']:.8f}," for row in rows] == rows_of(output)
    with pytest.raises(ValueError, match="masks are of LPIPS alone"):
        lpips_fast.evaluate(*folders, metrics=["lpips", "psnr"], mask=masks)
    with pytest.raises(ValueError, match="unknown mask_mode"):
        lpips_fast.evaluate(*folders, mask=masks, mask_mode="soft")  # type: ignore[arg-type]


def test_masks_are_cropped_and_resized_with_the_images(
    folders: Any, masks: Path, capsys: Any
) -> None:
    a, b = (folder / "5.png" for folder in folders)
    whole = np.array(Image.open(masks / "5.bmp"))
    for words in (
        ("--crop", "32x32"),
        ("--resize", "66x80"),
        ("--resize", "64", "--crop", "64x64"),
    ):
        assert call("pair", a, b, RANDOM, "--mask", masks / "5.bmp", *words) == 0
    write_png(masks / "cropped.png", whole[4:36, 0:32])
    capsys.readouterr()
    code = call("pair", a, b, RANDOM, "--mask", masks / "cropped.png")
    assert code == 1 and "has 32x32 pixels and the images have 33x40" in capsys.readouterr().err


# --------------------------------------------------------------------------------- going on


def test_going_on_knows_masks(folders: Any, masks: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out.csv"
    arguments = ("dirs", *folders, RANDOM, "-o", output)
    assert call(*arguments, "--mask", masks) == 0
    first = output.read_text()
    capsys.readouterr()
    assert call(*arguments, "--mask", masks) == 0
    assert "nothing to do" in capsys.readouterr().err

    changed = mask_of(masks / "2.png").byte().numpy()
    changed[20:, 25:] = 255
    write_png(masks / "2.png", changed)
    assert call(*arguments, "--mask", masks) == 0
    assert "an image changed since, so that they are measured again: 2.png" in (
        capsys.readouterr().err
    )
    again = output.read_text()
    differing = [
        k for k, (x, y) in enumerate(zip(first.splitlines(), again.splitlines())) if x != y
    ]
    assert differing == [3]
    fresh = tmp_path / "fresh.csv"
    assert call("dirs", *folders, RANDOM, "-o", fresh, "--mask", masks) == 0
    assert fresh.read_text() == again

    for words, told in (
        (("--mask", masks, "--mask-mode", "fill"), "masks is weighted there and filled with 0"),
        ((), "mask"),
        (("--mask", masks / "5.bmp"), "mask is"),
    ):
        assert call(*arguments, *words) == 1
        err = capsys.readouterr().err
        assert "was made in another way" in err and told in err
    assert output.read_text() == again


def test_a_torn_run_goes_on(folders: Any, masks: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.csv", tmp_path / "torn.csv"
    for path in (whole, torn):
        assert call("dirs", *folders, RANDOM, "-o", path, "--mask", masks) == 0
    record = Path(f"{torn}.jsonl")
    record.write_bytes(b"".join(record.read_bytes().splitlines(True)[:4]))
    torn.write_bytes(b"".join(torn.read_bytes().splitlines(True)[:3]))
    assert call("dirs", *folders, RANDOM, "-o", torn, "--mask", masks) == 0
    assert torn.read_bytes() == whole.read_bytes()


def test_a_mask_that_cannot_be_used_is_an_error_of_its_row(
    folders: Any, masks: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out.csv"
    write_png(masks / "0.png", np.zeros(SIZE, np.uint8))
    write_png(masks / "2.png", np.zeros((*SIZE, 3), np.uint8) + np.uint8([0, 1, 0]))
    write_png(masks / "4.png", np.ones((50, 50), np.uint8))
    assert call("dirs", *folders, RANDOM, "-o", output, "--mask", masks) == 1
    with output.open(newline="") as file:
        errors = [row["error"] for row in csv.DictReader(file)]
    assert [bool(error) for error in errors] == [True, False] * 3
    assert "is empty: all of it is black" in errors[0] and "has colours" in errors[2]
    assert "has 50x50 pixels and the images have 33x40" in errors[4]
    write_png(masks / "0.png", np.ones(SIZE, np.uint8))
    os.remove(masks / "2.png")
    capsys.readouterr()
    assert call("dirs", *folders, RANDOM, "-o", output, "--mask", masks) == 1
    assert "has no mask for 2.png: a mask is called as the image" in capsys.readouterr().err


def test_lists_and_patterns(folders: Any, masks: Path, tmp_path: Path, capsys: Any) -> None:
    listed = tmp_path / "pairs.csv"
    lines = ["a,b,mask", "A/0.png,B/0.png,masks/0.png", "A/1.png,B/1.png,masks/1.bmp"]
    listed.write_text("\n".join(lines))
    output = tmp_path / "listed.csv"
    assert call("dirs", "--pairs", listed, RANDOM, "-o", output) == 0
    of_folders = tmp_path / "out.csv"
    assert call("dirs", *folders, RANDOM, "-o", of_folders, "--mask", masks) == 0
    got, expected = (
        [float(row.split(",")[1]) for row in rows_of(path)[:2]] for path in (output, of_folders)
    )
    assert got == pytest.approx(expected, rel=1e-4)
    assert settings_of(output)["masks"] == "weighted"

    for k in range(6):
        (folders[0] / f"{k}.png").rename(folders[0] / f"{k}_gt.png")
        (folders[1] / f"{k}.png").rename(folders[1] / f"{k}_pred.png")
    patterned = tmp_path / "patterned.csv"
    match = ("--match", "{}_gt.png", "{}_pred.png")
    assert call("dirs", *folders, RANDOM, "-o", patterned, "--mask", masks, *match) == 0
    values = [[row.split(",")[1] for row in rows_of(path)] for path in (patterned, of_folders)]
    assert values[0] == values[1]

    capsys.readouterr()
    listed.write_text("\n".join([*lines, "A/2_gt.png,B/2_pred.png,"]))
    assert call("dirs", "--pairs", listed, RANDOM, "-o", tmp_path / "x.csv") == 1
    assert "row 3 of" in capsys.readouterr().err


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mask-mode", "fill"), "--mask-mode says what a mask means, and there is none"),
        (("--fill-value", "0.5"), "--fill-value says what a mask means, and there is none"),
        (("--mask", "M", "--fill-value", "0.5"), "--fill-value is of --mask-mode fill alone"),
        (("--mask", "M", "--mask-mode", "soft"), "invalid choice: 'soft'"),
        (
            ("--mask", "M", "--mask-mode", "fill", "--fill-value", "255"),
            "'255' is not a number from -1, black, to 1, white",
        ),
        (("--mask", "M", "--metrics", "lpips,psnr,ssim"), "leave psnr and ssim out of --metrics"),
    ],
)
@pytest.mark.parametrize("command", ["pair", "dirs"])
def test_usage(
    folders: Any, masks: Path, tmp_path: Path, capsys: Any, command: str, words: Any, message: str
) -> None:
    words = [masks / "1.bmp" if word == "M" else word for word in words]
    if command == "pair":
        arguments: list[Any] = ["pair", folders[0] / "1.png", folders[1] / "1.png"]
    else:
        arguments = ["dirs", *folders, "-o", tmp_path / "out.csv"]
    assert call(*arguments, RANDOM, *words) == 2
    assert message in capsys.readouterr().err


def test_other_refusals(folders: Any, masks: Path, tmp_path: Path, capsys: Any) -> None:
    listed = tmp_path / "pairs.csv"
    listed.write_text("a,b,mask\nA/0.png,B/0.png,masks/0.png\n")
    for arguments, message in [
        (("--pairs", listed, "--mask", masks), "the masks of --pairs stand in its column mask"),
        (("--pairs", listed, "--mask", masks / "0.png"), "has a column mask: leave out --mask"),
        ((*folders, "--mask", tmp_path / "none.png"), "cannot read"),
    ]:
        assert call("dirs", *arguments, RANDOM, "-o", tmp_path / "out.csv") in (1, 2)
        found = capsys.readouterr()
        assert message in found.err
    a, b = (folder / "0.png" for folder in folders)
    for mask, message in [(masks, "a folder"), (tmp_path / "none.png", "no such file")]:
        assert call("pair", a, b, RANDOM, "--mask", mask) == 1
        assert message in capsys.readouterr().err.lower()
    for kept in (masks / "0.png",):
        assert call("pair", a, b, RANDOM, "--mask", kept, "--map", kept) != 0
        assert mask_of(kept).max() == 255
