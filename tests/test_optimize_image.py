"""``examples/optimize_image.py``: the distance falls, and the picture is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_folders import start

Image = pytest.importorskip("PIL.Image", reason="the example reads images with Pillow")
pytest.importorskip("matplotlib", reason="the example draws with Matplotlib")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "optimize_image.py"


def test_the_distance_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    output = tmp_path / "new" / "picture.png"
    options = ("--net", "squeeze", "--steps", 5, "--output", output)
    out, err = (process := start(*options, program=(str(EXAMPLE),))).communicate(timeout=120)
    assert process.returncode == 0, err
    assert "NOT LPIPS" in out  # no weights are to be had here
    line = next(line for line in out.splitlines() if line.startswith("distance "))
    _, before, _, after, *_ = line.split()
    assert 0 < float(after) < float(before)
    with Image.open(output) as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 500
