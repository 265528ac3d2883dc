"""Measurements of trunks, and how they are kept."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lpips_fast.choice import trunk_costs
from lpips_fast.choice.peak_memory import can_measure
from lpips_fast.choice.trunk_costs import Setting, TrunkCost

CPU = torch.device("cpu")
SETTING = Setting((64, 64), "forward", torch.float32, CPU)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lpips_fast" / "trunk-costs"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trunks that were measured; what comes out is made up, and new each time."""
    done: list[str] = []

    def latencies(nets: Any, setting: Setting, advance: Any) -> dict[str, tuple[float, float]]:
        done.extend(nets)
        return {net: (10.0 + len(done), 0.5) for net in nets}

    monkeypatch.setattr(trunk_costs, "_latencies", latencies)
    monkeypatch.setattr(trunk_costs, "_memory", lambda net, setting: 20.0)
    return done


def test_real_measurements():
    setting = Setting((48, 80), "step", torch.float32, CPU)
    (cost,) = trunk_costs.trunk_costs(["alex"], setting).values()
    assert cost.latency_ms > 0 and cost.latency_iqr_ms >= 0
    if cost.memory_mb is None:
        pytest.skip("memory cannot be measured on this system")
    # 9.4 MiB of weights, and a call on small images.
    assert 9.4 < cost.memory_mb < 500
    large = trunk_costs._memory("alex", Setting((512, 512), "forward", torch.float32, CPU))
    assert large is not None and large > cost.memory_mb + 8  # two images' first tap is 8 MiB


def test_measured_once(measured, cache):
    first = trunk_costs.trunk_costs(["alex", "vgg"], SETTING)
    assert trunk_costs.trunk_costs(["vgg", "alex"], SETTING) == first
    assert measured == ["alex", "vgg"]
    assert len(list(cache.iterdir())) == 2


def test_refresh_measures_again_and_keeps_that(measured):
    first = trunk_costs.trunk_costs(["alex"], SETTING)
    second = trunk_costs.trunk_costs(["alex"], SETTING, refresh=True)
    assert second != first and trunk_costs.trunk_costs(["alex"], SETTING) == second


@pytest.mark.parametrize(
    "other",
    [
        Setting((64, 65), "forward", torch.float32, CPU),
        Setting((64, 64), "step", torch.float32, CPU),
        Setting((64, 64), "forward", torch.bfloat16, CPU),
    ],
)
def test_another_setting_is_another_measurement(measured, other):
    trunk_costs.trunk_costs(["alex"], SETTING)
    trunk_costs.trunk_costs(["alex"], other)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("name", "value"), [("__version__", "9.9"), ("device_name", lambda device: "another")]
)
def test_another_version_or_machine_is_another_measurement(measured, monkeypatch, name, value):
    trunk_costs.trunk_costs(["alex"], SETTING)
    monkeypatch.setattr(trunk_costs, name, value)
    trunk_costs.trunk_costs(["alex"], SETTING)
    assert len(measured) == 2


def test_threads_and_torch_are_part_of_the_key(monkeypatch):
    key = SETTING.key("alex")
    assert key["threads"] == torch.get_num_threads() and key["torch"] == torch.__version__
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert SETTING.key("alex") != key


def _with(path: Path, change: Any) -> str:
    kept = json.loads(path.read_text())
    change(kept)
    return json.dumps(kept)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: "",
        lambda path: path.read_text()[:40],
        lambda path: "[]",
        lambda path: "null",
        lambda path: "\x00\xff",
        lambda path: _with(path, lambda kept: kept.pop("cost")),
        lambda path: _with(path, lambda kept: kept["cost"].update(latency_ms=-1)),
        lambda path: _with(path, lambda kept: kept["cost"].update(latency_ms="fast")),
        lambda path: _with(path, lambda kept: kept["cost"].update(memory_mb=float("nan"))),
        lambda path: _with(path, lambda kept: kept["cost"].update(more=1)),
        lambda path: _with(path, lambda kept: kept["key"].update(threads=99)),
    ],
)
def test_a_damaged_file_is_measured_again(measured, cache, damage):
    trunk_costs.trunk_costs(["alex"], SETTING)
    (path,) = cache.iterdir()
    path.write_bytes(damage(path).encode("latin-1"))
    again = trunk_costs.trunk_costs(["alex"], SETTING)
    assert measured == ["alex", "alex"]
    assert trunk_costs.trunk_costs(["alex"], SETTING) == again
    assert [p.suffix for p in cache.iterdir()] == [".json"]


def test_writers_at_the_same_time_leave_whole_files(cache):
    costs = [TrunkCost(float(k), 0.5, None) for k in range(1, 9)]
    seen: list[TrunkCost | None] = []
    ready = threading.Barrier(len(costs) + 1)

    def write(cost: TrunkCost) -> None:
        ready.wait()
        for _ in range(20):
            trunk_costs._keep(SETTING, "alex", cost)

    threads = [threading.Thread(target=write, args=(cost,)) for cost in costs]
    for thread in threads:
        thread.start()
    trunk_costs._keep(SETTING, "alex", costs[0])
    ready.wait()
    while any(thread.is_alive() for thread in threads):
        seen.append(trunk_costs._kept(SETTING, "alex"))
    assert seen and all(cost in costs for cost in seen)
    assert len(list(cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_no_failure(measured, cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the measurement is not kept"):
        costs = trunk_costs.trunk_costs(["alex"], SETTING)
    assert costs["alex"].latency_ms == 11.0


def test_where_it_is_kept(monkeypatch, tmp_path):
    assert trunk_costs.cache_folder().is_relative_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):  # the specification has both ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        expected = tmp_path / "home" / ".cache" / "lpips_fast" / "trunk-costs"
        assert trunk_costs.cache_folder() == expected


def test_memory_that_cannot_be_measured_is_told(monkeypatch):
    monkeypatch.setattr(trunk_costs.sys, "executable", os.devnull + "-nothing-there")
    with pytest.raises(OSError, match="nothing-there"):
        trunk_costs._memory("alex", SETTING)
    monkeypatch.undo()
    wrong = Setting((1, 1), "forward", torch.float32, CPU)
    if not can_measure(CPU):
        pytest.skip("memory is not measured in a process here")
    with pytest.warns(UserWarning, match="the memory of alex could not be measured: .*too small"):
        assert trunk_costs._memory("alex", wrong) is None


def test_images_too_small_for_a_trunk():
    small = Setting((20, 64), "forward", torch.float32, CPU)
    with pytest.raises(ValueError, match="trunk 'alex' needs images of 31 pixels"):
        trunk_costs.trunk_costs(["squeeze", "alex"], small)
