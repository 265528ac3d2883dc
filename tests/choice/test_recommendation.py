"""Which trunk is recommended, why, and what is said where none fits."""

from __future__ import annotations

import math

import pytest
import torch

from lpips_fast.choice import recommendation
from lpips_fast.choice.recommendation import PEOPLE_2AFC, PUBLISHED_2AFC, recommend_trunk
from lpips_fast.choice.trunk_costs import TrunkCost
from lpips_fast.trunk import TRUNKS

COSTS = {
    "alex": TrunkCost(10.0, 0.5, 45.0),
    "vgg": TrunkCost(200.0, 4.0, 290.0),
    "squeeze": TrunkCost(12.0, 0.5, 15.0),
}


@pytest.fixture
def costs(monkeypatch):
    """Costs that every test may change."""
    table = dict(COSTS)
    calls = []

    def trunk_costs(nets, setting, **options):
        calls.append((setting, options))
        return {net: table[net] for net in nets}

    monkeypatch.setattr(recommendation, "trunk_costs", trunk_costs)
    table["calls"] = calls
    return table


def test_the_published_table_adds_up():
    assert set(PUBLISHED_2AFC) == set(TRUNKS)
    for row in (*PUBLISHED_2AFC.values(), PEOPLE_2AFC):
        sets = (
            *(row.traditional, row.cnn, row.superres),
            *(row.deblur, row.colorization, row.frameinterp),
        )
        # The table's last column is the mean of the others, all rounded to a tenth of a percent.
        assert abs(sum(sets) / 6 - row.overall) <= 0.001
        assert all(0.5 < score < 1 for score in sets)
    assert all(PEOPLE_2AFC.overall > row.overall for row in PUBLISHED_2AFC.values())


class TestChoice:
    def test_of_equals_the_fastest(self, costs):
        found = recommend_trunk(device="cpu")
        assert found.choice == "alex" and found.closest is None  # squeeze: 0.002 more, slower
        assert "as good as squeeze 0.700" in found.reasons[0]
        costs["squeeze"] = TrunkCost(9.0, 0.5, 15.0)
        found = recommend_trunk(device="cpu")
        assert found.choice == "squeeze"
        assert any("alex is lpips's default" in reason for reason in found.reasons)

    def test_the_score_goes_before_the_time(self, costs):
        costs["vgg"] = TrunkCost(1.0, 0.1, 1.0)
        assert recommend_trunk(device="cpu").choice == "alex"  # vgg is 0.008 below the best

    @pytest.mark.parametrize(
        ("limits", "choice"),
        [
            ({"min_2afc": 0.699}, "squeeze"),
            ({"min_2afc": 0.698}, "alex"),
            ({"min_2afc": 0.7}, "squeeze"),
            ({"max_memory_mb": 20}, "squeeze"),
            ({"max_latency_ms": 11}, "alex"),
            ({"max_latency_ms": 10.0}, "alex"),
            ({"max_latency_ms": 200, "max_memory_mb": 300, "min_2afc": 0.5}, "alex"),
        ],
    )
    def test_limits(self, costs, limits, choice):
        found = recommend_trunk(device="cpu", **limits)
        assert found.choice == choice
        assert all(not c.misses for c in found.candidates if c.net == choice)
        assert found.limits == limits

    def test_only_vgg_is_left(self, costs):
        for net in ("alex", "squeeze"):
            costs[net] = TrunkCost(500.0, 1.0, 45.0)
        found = recommend_trunk(max_latency_ms=300, device="cpu")
        assert found.choice == "vgg" and "the only one" in found.reasons[0]
        assert "Out: alex (500 ms is 200 over 300), squeeze" in found.reasons[1]

    def test_small_images_leave_trunks_out(self, costs):
        found = recommend_trunk(device="cpu", image_size=(16, 40))
        assert found.choice == "vgg"
        assert [c.cost is None for c in found.candidates] == [True, False, True]
        assert "needs images of 31x31 pixels" in found.reasons[1]

    def test_what_is_measured(self, costs):
        found = recommend_trunk(
            device="cpu", image_size=(100, 60), mode="step", dtype=torch.bfloat16, refresh=True
        )
        ((setting, options),) = costs["calls"]
        assert setting.image_size == (100, 60) and setting.mode == "step"
        assert setting.dtype == torch.bfloat16 and setting.device == torch.device("cpu")
        assert options["refresh"] is True
        assert (found.mode, found.dtype, found.image_size) == ("step", "bfloat16", (100, 60))

    def test_a_busy_machine_is_told(self, costs):
        costs["vgg"] = TrunkCost(200.0, 100.0, 290.0)
        assert any("busy while vgg" in reason for reason in recommend_trunk(device="cpu").reasons)


class TestNothingFits:
    def test_what_comes_closest_and_by_how_much(self, costs):
        found = recommend_trunk(max_latency_ms=8, device="cpu")
        assert found.choice is None and found.closest == "alex"
        (miss,) = next(c for c in found.candidates if c.net == "alex").misses
        assert (miss.limit, miss.allowed, miss.found) == ("max_latency_ms", 8, 10)
        assert math.isclose(miss.by, 0.25)
        assert found.reasons[0] == (
            "No trunk keeps all limits. alex comes closest: 10 ms is 2 over 8."
        )

    def test_the_largest_miss_counts(self, costs):
        # alex misses both a little, squeeze one by much less, vgg is far away.
        found = recommend_trunk(max_latency_ms=9, max_memory_mb=14, device="cpu")
        assert found.closest == "squeeze"

    def test_a_score_that_none_reaches(self, costs):
        found = recommend_trunk(min_2afc=0.75, device="cpu")
        assert found.closest == "squeeze" and "0.050 below 0.75" in found.reasons[0]

    def test_memory_that_is_not_known_keeps_no_limit(self, costs):
        for net in TRUNKS:
            costs[net] = TrunkCost(10.0, 0.5, None)
        found = recommend_trunk(max_memory_mb=1e6, device="cpu")
        assert found.choice is None and "cannot be measured here" in found.reasons[0]
        assert recommend_trunk(device="cpu").choice is not None


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"min_2afc": 70}, r"min_2afc is 70, expected a fraction in \[0, 1\]; people reach"),
            ({"min_2afc": math.nan}, "expected a fraction"),
            ({"max_latency_ms": 0}, "max_latency_ms is 0, expected a number above 0"),
            ({"max_memory_mb": -1}, "max_memory_mb is -1"),
            ({"max_memory_mb": math.nan}, "max_memory_mb is nan"),
            ({"mode": "backward"}, "expected one of forward, step"),
            ({"image_size": (15, 300)}, "15x300 pixels are too small for every trunk: 16x16"),
        ],
    )
    def test_bad_arguments(self, costs, arguments, message):
        with pytest.raises(ValueError, match=message):
            recommend_trunk(device="cpu", **arguments)


def test_the_table(costs):
    text = str(recommend_trunk(max_latency_ms=50, device="cpu"))
    assert "Zhang et al., CVPR 2018, Table 5" in text
    line = next(line for line in text.splitlines() if line.startswith("vgg"))
    assert line.split()[:5] == ["vgg", "0.692", "200.0", "±", "4.0"]
    assert line.endswith("290  200 ms is 150 over 50")
    assert "forward of one pair of 256x256 pixels, float32" in text


def test_the_package_has_the_function_and_says_what_it_has_not():
    import lpips_fast

    assert lpips_fast.recommend_trunk is recommend_trunk
    with pytest.raises(AttributeError, match="no attribute 'recommend_net'"):
        lpips_fast.recommend_net  # noqa: B018
