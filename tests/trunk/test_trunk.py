"""The trunks: torchvision's layers and names, the original's slices, taps and sizes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from parity import trunk_weights

from lpips_fast.trunk import TRUNKS, Trunk, feature_shapes, minimum_size, tap_channels

NETS = tuple(TRUNKS)


@pytest.mark.parametrize("net", NETS)
class TestTrunk:
    def test_taps_are_the_originals(self, net, reference):
        from lpips import pretrained_networks

        original = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet"}[net]
        theirs = getattr(pretrained_networks, original)(pretrained=False)
        ours = Trunk(net, trunk_weights(net))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 3, 61, 74)
        taps, expected = ours(x), theirs(x)
        assert taps._fields == expected._fields
        for tap, reference_tap in zip(taps, expected):
            torch.testing.assert_close(tap, reference_tap, rtol=1e-4, atol=1e-4)
        assert [tap.shape[1] for tap in taps] == tap_channels(net)

    def test_taps_are_channels_last(self, net):
        size = minimum_size(net)
        for tap in Trunk(net)(torch.randn(2, 3, size + 8, size + 9)):
            assert tap.is_contiguous(memory_format=torch.channels_last)

    def test_frozen_unless_asked(self, net):
        assert not any(p.requires_grad for p in Trunk(net).parameters())
        assert all(p.requires_grad for p in Trunk(net, requires_grad=True).parameters())

    def test_minimum_size_is_exact(self, net):
        trunk, size = Trunk(net), minimum_size(net)
        with torch.no_grad():
            assert all(tap.numel() for tap in trunk(torch.zeros(1, 3, size, size + 32)))
            with pytest.raises(RuntimeError):
                trunk(torch.zeros(1, 3, size - 1, size + 32))

    def test_feature_shapes(self, net):
        shapes = feature_shapes(net)
        state = Trunk(net).state_dict()
        assert list(shapes.values()) == [tuple(v.shape) for v in state.values()]
        assert [k.split(".", 1)[1] for k in shapes] == [k.split(".", 1)[1] for k in state]

    def test_copies_and_pickles(self, net):
        trunk, x = Trunk(net), torch.randn(1, 3, 40, 40)
        for other in (copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
            taps = other(x)
            assert taps._fields == tuple(TRUNKS[net].taps)
            assert all(torch.equal(a, b) for a, b in zip(taps, trunk(x)))

    def test_random_weights_keep_activations_alive(self, net):
        taps = Trunk(net)(torch.randn(1, 3, 64, 64))
        assert all(tap.max() > 0 for tap in taps)


def test_unknown_trunk():
    with pytest.raises(ValueError, match=r"unknown trunk 'resnet'.*alex, vgg, squeeze"):
        Trunk("resnet")
