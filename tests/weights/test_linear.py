"""The linear weights in the package: those of the original, as safetensors and as `.pth`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from weight_files import NETS

from lpips_fast import LPIPS
from lpips_fast.weights import LIN_VERSIONS, load_lin_weights
from lpips_fast.weights.linear import PACKAGED


@pytest.mark.parametrize("version", LIN_VERSIONS)
@pytest.mark.parametrize("net", NETS)
def test_lin_weights_equal_the_originals(net: str, version: str) -> None:
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lpips is not installed")
    original = Path(spec.submodule_search_locations[0]) / "weights" / f"v{version}" / f"{net}.pth"
    expected = torch.load(original, weights_only=True, map_location="cpu")
    loaded = load_lin_weights(net, version)
    assert list(loaded) == list(expected)
    for key, weight in expected.items():
        assert loaded[key].dtype == weight.dtype
        assert torch.equal(loaded[key], weight), key


@pytest.mark.parametrize("version", LIN_VERSIONS)
@pytest.mark.parametrize("net", NETS)
def test_lin_weights_are_fresh_and_attributed(net: str, version: str) -> None:
    first = load_lin_weights(net, version)
    taps = 7 if net == "squeeze" else 5
    assert list(first) == [f"lin{tap}.model.1.weight" for tap in range(taps)]
    for weight in first.values():
        assert weight.shape == (1, weight.numel(), 1, 1) and weight.dtype == torch.float32
        assert bool((weight >= 0).all())  # a negative one would make negative distances
        weight.fill_(-1)
    assert all(bool((weight >= 0).all()) for weight in load_lin_weights(net, version).values())

    with safetensors.safe_open(PACKAGED / f"v{version}" / f"{net}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "BSD-2-Clause" and metadata["version"] == version
    assert len(metadata["source_sha256"]) == 64


@pytest.mark.parametrize(("net", "version"), [("vgg19", "0.1"), ("alex", "0.2"), (None, "0.1")])
def test_lin_weights_unknown(net: Any, version: str) -> None:
    with pytest.raises(ValueError, match="unknown: use one of") as error:
        load_lin_weights(net, version)
    assert repr(version if net == "alex" else net) in str(error.value)


@pytest.mark.parametrize("version", LIN_VERSIONS)
@pytest.mark.parametrize("net", NETS)
def test_pth_files_lie_where_scripts_open_them(net: str, version: str) -> None:
    path = PACKAGED / f"v{version}" / f"{net}.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")
    expected = load_lin_weights(net, version)
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    original = importlib.util.find_spec("lpips")
    if original is not None and original.origin:
        theirs = Path(original.origin).with_name("weights") / f"v{version}" / f"{net}.pth"
        assert path.read_bytes() == theirs.read_bytes()


def test_a_pth_file_is_a_model_path() -> None:
    model = LPIPS(
        pnet_rand=True, version="0.0", model_path=PACKAGED / "v0.1" / "alex.pth", verbose=False
    )
    for key, weight in load_lin_weights("alex", "0.1").items():
        assert torch.equal(model.state_dict()[key], weight)
