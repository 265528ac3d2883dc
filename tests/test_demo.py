"""The demo gives real LPIPS on any machine, without a network, a cache or a setting."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytest.importorskip("matplotlib", reason="the demo draws maps")

EXAMPLE = REPOSITORY / "examples" / "demo.py"


@pytest.mark.usefixtures("hub")
def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    distances = [float(line.split()[-2]) for line in out.splitlines()[1:]]
    assert distances == pytest.approx([0.721881, 0.137566], abs=1.5e-6)
    assert "random" not in out
    assert {path.name for path in tmp_path.glob("ref_*")} == {
        f"ref_{name}.{kind}" for name in ("p0", "p1") for kind in ("png", "npy")
    }
