"""Channels removed: which, that their effects are derivatives, and that norms are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from many_images import model_of, some_images
from torch import nn

from lpips_fast import LPIPS
from lpips_fast.compression import Triplets, agreement, channel_effects, prune, pruning
from lpips_fast.compression.agreement import triplet_distances


def some_triplets(count: int = 4, size: tuple[int, int] = (40, 48)) -> Triplets:
    ref = some_images(count, size)
    generator = torch.Generator().manual_seed(1)
    near, far = (ref + s * torch.randn(ref.shape, generator=generator) for s in (0.1, 0.4))
    return Triplets(ref, near.clamp(-1, 1), far.clamp(-1, 1))


@pytest.fixture(scope="module", params=["alex", "squeeze"])
def model(request: pytest.FixtureRequest) -> LPIPS:
    return model_of(request.param)


def convolutions(model: LPIPS) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in model.net.named_modules() if isinstance(m, nn.Conv2d)}


def test_effects_are_derivatives() -> None:
    """Of the logarithm of the distance, by a gate on the channel: by differences, in float64."""
    model, triplets = model_of("squeeze").double(), some_triplets(2)
    triplets = Triplets(*(x.double() for x in (triplets.ref, triplets.p0, triplets.p1)))
    effects = channel_effects(model, triplets)
    assert {n: len(e) for n, e in effects.items()} == {
        n: m.out_channels for n, m in convolutions(model).items()
    }
    for name in ("slice1.0", "slice3.6.squeeze", "slice6.11.expand3x3"):
        channel = int(effects[name].argmax())
        logs = []
        for gate in (1 - 1e-6, 1 + 1e-6):
            gated = copy.deepcopy(model)
            conv = convolutions(gated)[name]
            conv.weight.data[channel] *= gate
            conv.bias.data[channel] *= gate
            logs.append(triplet_distances(gated, triplets).log())
        by_differences = ((logs[1] - logs[0]) / 2e-6).abs().mean()
        torch.testing.assert_close(effects[name][channel], by_differences, rtol=1e-2, atol=1e-6)
    assert not any(p.requires_grad for p in model.net.parameters())


def test_what_stays(model: LPIPS) -> None:
    triplets = some_triplets()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    effects = channel_effects(model, triplets)
    narrow = prune(model, triplets, 0.5, effects=effects)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(narrow.fast_path().values()) == {"yes"} and narrow.pnet_type == model.pnet_type
    for name, conv in convolutions(narrow).items():
        all_ = len(effects[name])
        assert conv.out_channels == min(all_, -(-all_ // 16) * 8)
    first = convolutions(narrow)["slice1.0"]
    kept = effects["slice1.0"].topk(first.out_channels).indices.sort().values
    filters = convolutions(model)["slice1.0"].weight[kept]
    scales = (first.weight / filters).flatten(1)
    torch.testing.assert_close(scales, scales[:, :1].expand_as(scales))  # one factor a channel
    assert (scales > 0).all()
    with torch.no_grad():
        assert (narrow(triplets.ref, triplets.ref.clone()) == 0).all()
        assert narrow(triplets.ref, triplets.p0).isfinite().all()
    loaded = LPIPS(net=model.pnet_type, weights=narrow.state_dict(), verbose=False)
    assert torch.equal(triplet_distances(loaded, triplets), triplet_distances(narrow, triplets))
    again = prune(narrow, triplets, 0.5)  # a narrow one is a trunk like any other
    assert all(b <= a for a, b in zip(narrow.chns, again.chns)) and again.chns != narrow.chns


def test_all_stay(model: LPIPS) -> None:
    triplets = some_triplets()
    same = prune(model, triplets, 1.0)
    assert same.net_name == model.net_name
    assert torch.equal(triplet_distances(same, triplets), triplet_distances(model, triplets))
    found = agreement(same, model, triplets)
    assert (found.spearman, found.same_nearer, found.error, found.pairs) == (1, 1, 0, 8)
    for keep in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected the part of the channels that stays"):
            prune(model, triplets, keep)


def test_scales_are_seen_at_their_tap_alone(model: LPIPS) -> None:
    scaled, images = copy.deepcopy(model), some_images(2)
    factors = torch.rand(model.chns[1]) + 0.5
    with torch.no_grad():
        pruning._scale_tap(scaled, 1, factors)
        for k, (found, expected) in enumerate(
            zip(scaled.encode(images).taps, model.encode(images).taps)
        ):
            expected = expected * factors.view(-1, 1, 1) if k == 1 else expected
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ratio = model.layer_weight(1) / scaled.layer_weight(1)
    used = model.layer_weight(1) > 0
    torch.testing.assert_close(ratio[used], (factors**2)[used])


def test_factors_keep_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.rand(4, 24, 8, 8, generator=generator)
    every[:, 12:] = every[:, :12] * (0.5 + torch.arange(12.0).view(-1, 1, 1) / 12)
    few = every[:, :12]
    factors = pruning.norm_factors(*pruning.norm_equations(few, every)).float().view(-1, 1, 1)
    norms = every.norm(dim=1)

    def error(features: torch.Tensor) -> float:
        return ((features.norm(dim=1) - norms).abs() / norms).mean().item()

    assert error(few * factors.sqrt()) < 0.02 < 0.1 < error(few)
    assert (factors > 1).all()


def test_channels_of_weight_zero_count_in_the_norm() -> None:
    """On AlexNet's real weights: left out they change the distance, and factors mend most of it."""
    model, triplets = LPIPS(net="alex", verbose=False), some_triplets(8, (64, 64))
    with torch.no_grad():
        sides = [model.encode(x).taps for x in (triplets.ref, triplets.p1)]
        distances = {"all": 0.0, "left out": 0.0, "scaled": 0.0}
        for k in range(model.L):
            weight = model.layer_weight(k)
            kept = weight > 0
            both = torch.cat([side[k] for side in sides])
            factors = pruning.norm_factors(*pruning.norm_equations(both[:, kept], both)).float()
            for name, channels, scales in (
                ("all", torch.ones_like(kept), torch.ones_like(weight)),
                ("left out", kept, torch.ones_like(factors)),
                ("scaled", kept, factors),
            ):
                a, b = (
                    nn.functional.normalize(side[k][:, channels] * scales.sqrt().view(-1, 1, 1))
                    for side in sides
                )
                part = ((weight[channels] / scales).view(-1, 1, 1) * (a - b) ** 2).sum(dim=1)
                distances[name] = distances[name] + part.mean(dim=(1, 2))
    left_out, scaled = (
        ((distances[name] - distances["all"]).abs() / distances["all"]).mean()
        for name in ("left out", "scaled")
    )
    assert left_out > 0.05 and scaled < left_out / 2
