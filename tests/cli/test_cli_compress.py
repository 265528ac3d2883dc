"""``lpips-fast compress``: a checkpoint that loads as any other, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_folders import call, make_folders

from lpips_fast import LPIPS

SMALL = ("--crop", 40, "--triplets", 9, "--steps", 1, "--random-trunk", "--net", "squeeze")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra images")
    return make_folders(tmp_path, [f"{k}.png" for k in range(4)])


def test_it_writes_a_checkpoint(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "narrow.pth"
    assert call("compress", folders[0], "-o", out, "--held-out", folders[1], "--json", *SMALL) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["fitted_on"], report["judged_on"], report["pairs"]) == (4, 4, 6)
    assert set(report["time_over_full"]) == {"64", "256"}
    model = LPIPS(net="squeeze", model_path=out, verbose=False)
    assert (
        model.net_name
        == report["trunk"]
        == LPIPS(net="squeeze", weights=out, verbose=False).net_name
    )
    assert report["bytes"] < report["full_bytes"] / 2
    a, b = (folder / "0.png" for folder in folders)
    size = ("--resize", "40x40")
    assert call("pair", a, b, "--net", "squeeze", "--checkpoint", out, "--json", *size) == 0
    by_checkpoint, told = capsys.readouterr()
    assert f"a narrow one, whose distances are not LPIPS: {model.net_name}" in told
    assert call("pair", a, b, "--net", "squeeze", "--weights", out, "--json", *size) == 0
    assert json.loads(capsys.readouterr().out)["distance"] == json.loads(by_checkpoint)["distance"]
    # As any checkpoint, it can be made lighter, and exported.
    assert call("compress", folders[0], "-o", tmp_path / "again.pth", "--net", "squeeze",
                "--checkpoint", out, "--steps", 0, "--crop", 40, "--triplets", 6) == 0  # fmt: skip
    words = capsys.readouterr().out
    assert "from 1 images held out: Spearman" in words and "--checkpoint" in words


@pytest.mark.export_runtime("export")
def test_it_is_exported(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "narrow.pth"
    assert call("compress", folders[0], "-o", out, *SMALL) == 0
    torch.manual_seed(0)
    arguments = ("--net", "squeeze", "--checkpoint", out, "--check")
    assert call("export", "-o", tmp_path / "narrow.onnx", *arguments) == 0
    assert "checked: at most" in capsys.readouterr().out


def test_what_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[0] / "0.png").unlink()
    out = tmp_path / "narrow.pth"
    for arguments, message in (
        ((folders[0],), "of which every fourth is held out to judge by"),
        ((folders[0], "--held-out", tmp_path), "holds no images"),
        ((folders[1], "--keep", "0"), "expected the part of the channels that stays"),
        ((folders[1], "--baseline"), "no linear weights"),
    ):
        assert call("compress", *arguments, "-o", out, *SMALL) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
