"""The learning curve: a picture is written, and shows what it was given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lpips_fast.judgements.learning_curve import require_matplotlib, save_learning_curve
from lpips_fast.judgements.training import EpochRecord

Image = pytest.importorskip("PIL.Image", reason="the picture is read back with Pillow")
pytest.importorskip("matplotlib", reason="the picture is drawn with Matplotlib")


def history(epochs: int, slope: float = 0.02, subsets: int = 0) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=epoch,
            learning_rate=1e-4,
            loss=0.7 - slope * epoch,
            train_2afc=0.5 + slope * epoch,
            seconds=1.0,
            validation_2afc={f"set {k}": 0.5 + slope * (epoch + k) for k in range(subsets)},
        )
        for epoch in range(1, epochs + 1)
    ]


def drawn(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("L"))


def test_every_argument_is_seen(tmp_path: Path) -> None:
    def draw(records: list[EpochRecord], **options: object) -> np.ndarray:
        path = save_learning_curve(records, tmp_path / "curve.png", **options)  # type: ignore[arg-type]
        assert path == tmp_path / "curve.png"
        return drawn(path)

    plain = draw(history(6))
    assert plain.shape == (570, 1500)
    assert (plain < 128).sum() > 1000
    pictures = [
        draw(history(6, slope=0.01)),
        draw(history(6, subsets=1)),
        draw(history(6, subsets=8)),
        draw(history(6), title="a title"),
        draw(history(6), decay_from=4),
        draw(history(6), people=0.9),
        draw(history(1)),
        draw(history(40)),
    ]
    for picture in pictures:
        assert not np.array_equal(picture, plain)
    assert np.array_equal(draw(history(6)), plain)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="history is empty"):
        save_learning_curve([], tmp_path / "curve.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (
        require_matplotlib,
        lambda: save_learning_curve(history(2), tmp_path / "curve.png"),
    ):
        with pytest.raises(ImportError, match=r"lpips-fast\[plots\]"):
            call()
    assert not list(tmp_path.iterdir())
