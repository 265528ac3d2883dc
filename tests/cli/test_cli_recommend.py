"""``lpips-fast recommend``."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lpips_fast import cli
from lpips_fast.choice import recommendation
from lpips_fast.choice.trunk_costs import TrunkCost


@pytest.fixture
def run(capsys, monkeypatch) -> Any:
    """Run the command on made-up costs; exit code, standard output, error, and what was asked."""
    asked: list[Any] = []
    costs = {
        "alex": TrunkCost(10.0, 0.5, 45.0),
        "vgg": TrunkCost(200.0, 4.0, None),
        "squeeze": TrunkCost(12.0, 0.5, 15.0),
    }

    def trunk_costs(nets: Any, setting: Any, **options: Any) -> dict[str, TrunkCost]:
        asked.append((setting, options))
        print("what a library prints is not part of the result")
        return {net: costs[net] for net in nets}

    monkeypatch.setattr(recommendation, "trunk_costs", trunk_costs)

    def call(*arguments: str) -> tuple[int, str, str, list[Any]]:
        try:
            code = cli.main(["recommend", *arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err, asked

    return call


def test_the_choice(run):
    code, out, _, _ = run("--device", "cpu", "--max-memory-mb", "20")
    assert code == 0
    assert out.startswith("Use squeeze: the only one that keeps all limits")
    assert "memory cannot be measured here" in out


def test_nothing_fits(run):
    code, out, err, _ = run("--device", "cpu", "--max-latency-ms", "5")
    assert code == 1
    assert "alex comes closest: 10 ms is 5 over 5" in out
    assert "error: no trunk keeps all limits" in err


def test_json(run):
    code, out, _, _ = run("--device", "cpu", "--min-2afc", "0.699", "--json")
    report = json.loads(out)
    assert code == 0 and report["choice"] == "squeeze" and report["limits"] == {"min_2afc": 0.699}
    by_net = {c["net"]: c for c in report["candidates"]}
    assert by_net["alex"]["misses"][0]["limit"] == "min_2afc"
    assert by_net["vgg"]["cost"] == {
        "latency_ms": 200.0,
        "latency_iqr_ms": 4.0,
        "memory_mb": None,
    }
    assert report["people"]["overall"] == 0.739 and "Table 5" in report["source"]


def test_json_without_a_choice_has_no_nan(run):
    code, out, _, _ = run("--device", "cpu", "--max-memory-mb", "1", "--size", "20x20", "--json")
    report = json.loads(out, parse_constant=lambda text: pytest.fail(text))
    assert code == 1 and report["choice"] is None and report["closest"] == "squeeze"


def test_what_is_asked_for(run):
    code, out, _, asked = run(
        *("--device", "cpu", "--size", "320x200", "--mode", "step", "--dtype", "bfloat16"),
        "--refresh",
    )
    ((setting, options),) = asked
    assert code == 0 and setting.image_size == (200, 320) and setting.mode == "step"
    assert setting.dtype == torch.bfloat16 and options["refresh"] is True
    assert "training step of one pair of 320x200 pixels, bfloat16" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--min-2afc", "70"], 1, "expected a fraction"),
        (["--max-latency-ms", "0"], 1, "expected a number above 0"),
        (["--size", "8x8"], 1, "too small for every trunk"),
        (["--size", "8"], 1, "too small for every trunk"),
        (["--size", "8x"], 2, "is not a size"),
        (["--mode", "fast"], 2, "invalid choice"),
        (["--device", "nonsense"], 2, "is no device"),
    ],
)
def test_errors(run, arguments, code, message):
    found, out, err, _ = run(*arguments)
    assert found == code and message in err and out == ""
