"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from conftest import declare_torchvision_operators

import lpips_fast

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lpips_fast.__path__, "lpips_fast.")
    if not module.name.endswith("__main__") and not module.name.split(".")[-1].startswith("_")
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch, tmp_path):
    if name == "lpips_fast.metrics":
        declare_torchvision_operators()
        pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    if name == "lpips_fast.pyiqa_metric":
        declare_torchvision_operators()
        reason = "pyiqa, or what it imports, is not installed"
        pytest.importorskip("pyiqa", reason=reason, exc_type=ImportError)
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(module, optionflags=FLAGS)
    assert failed == 0
