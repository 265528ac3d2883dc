"""What weights are here, and the folder of them for machines without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from weight_files import (
    FILENAME,
    NET,
    NETS,
    Mirror,
    as_checkpoint,
    assert_same,
    place,
    random_features,
)

from lpips_fast.weights import (
    TRUNK_SOURCES,
    WeightsError,
    WeightsNotFoundError,
    features_digest,
    load_trunk_weights,
)
from lpips_fast.weights.inventory import inspect_located, inspect_path, pack

pytestmark = pytest.mark.usefixtures("hub")


def test_inspect_located(hub: Path) -> None:
    assert inspect_located(NET) is None
    found = inspect_located("alex")
    assert found is not None
    location, state = found
    assert location.kind == "package" and state.path == location.path
    assert state.usable and state.official and state.problem is None


def test_inspect_path(tmp_path: Path, official: bytes, generator: torch.Generator) -> None:
    with pytest.raises(WeightsNotFoundError, match="holds no weights of any trunk"):
        inspect_path(tmp_path)
    place(tmp_path / FILENAME, official)
    place(tmp_path / "vgg.pth", b"damaged")
    place(tmp_path / "alex.pth", as_checkpoint(random_features(generator, "alex")))
    alex, vgg, squeeze = inspect_path(tmp_path)
    assert (alex.net, alex.usable, alex.official) == ("alex", True, False)
    assert (vgg.net, vgg.usable, vgg.official) == ("vgg", False, False)
    assert vgg.problem is not None and str(tmp_path / "vgg.pth") in vgg.problem
    assert (squeeze.net, squeeze.usable, squeeze.official) == (NET, True, True)
    assert inspect_path(tmp_path / FILENAME) == [squeeze]  # a file says itself whose it is
    with pytest.raises(WeightsError, match="damaged"):
        inspect_path(tmp_path / "vgg.pth")
    torch.save({"x": torch.ones(1)}, tmp_path / "my_squeeze.pth")
    with pytest.raises(WeightsError, match="does not hold the weights of the 'squeeze' trunk"):
        inspect_path(tmp_path / "my_squeeze.pth")


def test_pack_for_a_machine_without_a_network(
    tmp_path: Path,
    mirror: Mirror,
    official: bytes,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror.offer(official)
    folder = tmp_path / "new" / "folder"
    states = pack(folder, ["alex", NET], progress=False)
    assert [state.net for state in states] == ["alex", NET]
    assert all(state.official and state.path.parent == folder for state in states)
    assert {path.name for path in folder.iterdir()} == {state.path.name for state in states}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 13_000_000
    assert inspect_path(folder) == states
    # There:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(folder))
    assert_same(load_trunk_weights(NET), features)
    alex = safetensors.torch.load_file(states[0].path)
    assert features_digest(alex) == TRUNK_SOURCES["alex"].features_sha256


def test_pack_of_weights_of_ones_own(
    tmp_path: Path, features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path / "own" / f"{NET}.pth", as_checkpoint(features))
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path / "own"))
    (state,) = pack(tmp_path / "packed", [NET])
    assert state.path.name == f"{NET}.safetensors" and not state.official
    assert_same(load_trunk_weights(NET, tmp_path / "packed"), features)


def test_pack_into_a_folder_that_holds_others(
    tmp_path: Path,
    official: bytes,
    generator: torch.Generator,
    mirror: Mirror,
) -> None:
    mirror.offer(official)
    place(tmp_path / "full" / f"{NET}.pth", as_checkpoint(random_features(generator)))
    with pytest.raises(WeightsError, match=r"squeeze\.pth holds other weights and would be used"):
        pack(tmp_path / "full", [NET], progress=False)
    with pytest.raises(WeightsError, match="cannot be written: Not a directory"):
        pack(place(tmp_path / "file", b"") / "folder", [NET], progress=False)


@pytest.mark.parametrize("net", NETS)
def test_pack_needs_weights(net: str, tmp_path: Path) -> None:
    if net == "alex":
        assert pack(tmp_path / "folder", [net])[0].official
        return
    with pytest.raises(WeightsNotFoundError, match="LPIPS_FAST_OFFLINE is set"):
        pack(tmp_path / "folder", [net])
