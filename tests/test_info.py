"""The build and environment report."""

from __future__ import annotations

import torch

import lpips_fast
from lpips_fast import info


def test_every_fact_has_a_value():
    facts = info.collect()
    assert facts["lpips_fast"] == lpips_fast.__version__
    assert facts["torch"] == torch.__version__
    assert all(facts.values())
    assert {"weights of alex", "weights of vgg", "weights of squeeze"} <= facts.keys()


def test_says_where_weights_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LPIPS_FAST_WEIGHTS", raising=False)
    assert "downloaded on first use" in info.collect()["weights of vgg"]
    assert info.collect()["weights of alex"].endswith("alex.safetensors (package)")
    file = tmp_path / "alex.features.pth"
    file.touch()
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path))
    assert str(file) in info.collect()["weights of alex"]


def test_report_is_one_line_a_fact():
    lines = info.report().splitlines()
    assert len(lines) == len(info.collect())
