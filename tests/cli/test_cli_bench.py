"""``lpips-fast bench``: which cases it times, what it says; never how fast they are."""

from __future__ import annotations

import builtins
import json
import sys
from types import ModuleType

import pytest
import torch
from image_folders import call

from lpips_fast.cli import bench

QUICK = ("--size", "40x33", "--seconds", "0.01")


def test_cases(capsys: pytest.CaptureFixture[str], reference: ModuleType) -> None:
    capsys.readouterr()
    assert call("bench", *QUICK, "--net", "squeeze", "--batch", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size"] == [40, 33] and report["batch"] == 2
    assert report["torch_version"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    cases = {(f["net"], f["task"], f["package"]) for f in report["figures"]}
    assert cases == {
        ("squeeze", task, package)
        for task in ("forward", "training step")
        for package in ("lpips_fast", "lpips")
    }
    for figure in report["figures"]:
        assert figure["median_ms"] > 0 and figure["calls"] >= 3


def test_table(capsys: pytest.CaptureFixture[str], reference: ModuleType) -> None:
    capsys.readouterr()
    assert call("bench", *QUICK, "--net", "alex") == 0
    head, columns, forward, training = capsys.readouterr().out.splitlines()
    assert "1 pair of 40x33, cpu" in head and "median" in head
    assert columns.split() == ["net", "task", "lpips_fast", "lpips", "times", "as", "fast"]
    assert forward.startswith("alex    forward") and training.startswith("alex    training step")
    ours, _, _, theirs, _, _, ratio = forward.split()[2:]
    assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.05, abs=0.1)


def test_without_the_original(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    capsys.readouterr()
    assert call("bench", *QUICK, "--net", "alex") == 0
    out, err = capsys.readouterr()
    assert "times as fast" not in out
    assert "note: pip install lpips shows the original beside it\n" in err


def test_an_original_that_is_broken_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def broken(name: str, *arguments, **options):
        if name == "lpips":
            raise RuntimeError("operator torchvision::nms\ndoes not exist")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert bench._original_class() is None
    assert capsys.readouterr().err == (
        "lpips-fast: note: the original is left out: operator torchvision::nms does not exist\n"
    )


@pytest.mark.parametrize(("spread", "busy"), [(0.1, False), (0.4, True)])
def test_a_busy_machine_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spread: float, busy: bool
) -> None:
    figure = {"net": "alex", "task": "forward", "package": "lpips_fast", "calls": 9}
    figure |= {"median_ms": 2.0, "interquartile_range_ms": 2.0 * spread}
    monkeypatch.setattr(bench, "_measure", lambda cases, seconds: [figure])
    assert call("bench", *QUICK, "--net", "alex") == 0
    out, err = capsys.readouterr()
    assert f"2.00 ± {2 * spread:.2f}" in out
    assert ("this machine was busy" in err) == busy


def test_the_training_step_is_a_gradient_of_the_image() -> None:
    image, target = torch.rand(2, 1, 3, 8, 8).unbind()
    seen = []

    class Model(torch.nn.Module):
        def forward(self, in0: torch.Tensor, in1: torch.Tensor) -> torch.Tensor:
            seen.append((in0.requires_grad, in1.requires_grad, torch.is_grad_enabled()))
            return (in0 - in1).square().mean((1, 2, 3))

    bench._training_step(Model(), target, image)()
    bench._forward(Model(), target, image)()
    assert seen == [(True, False, True), (False, False, False)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "20x400", "--net", "alex"], 1, "trunk alex needs images of 31 pixels or more"),
        (["--seconds", "0"], 1, "--seconds is 0.0, expected more than 0"),
        (["--size", "wide"], 2, "'wide' is not a size such as 256x256 or 256"),
        (["--batch", "none"], 2, "'none' is not a number from 1"),
    ],
)
def test_what_cannot_be_timed(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bench", *arguments) == code
    assert message in capsys.readouterr().err
