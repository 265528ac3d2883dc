"""The order of the search for a trunk's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from weight_files import (
    FILENAME,
    NET,
    Mirror,
    as_checkpoint,
    assert_same,
    make_official,
    place,
    random_features,
    stripped_path,
)

from lpips_fast.weights import (
    TrunkLocation,
    WeightsError,
    WeightsNotFoundError,
    load_trunk_weights,
    locate_trunk_weights,
)

pytestmark = pytest.mark.usefixtures("hub")


@pytest.mark.parametrize(
    "name",
    [
        FILENAME,
        f"{NET}.features.pth",
        f"{NET}.pth",
        f"{NET}.safetensors",
        f"{NET}.features.safetensors",
        FILENAME.replace(".pth", ".features.safetensors"),
    ],
)
def test_folder_is_searched_for_every_name(
    name: str, tmp_path: Path, features: dict[str, Tensor]
) -> None:
    folder = tmp_path / "folder"
    content = (
        safetensors.torch.save(features)
        if name.endswith(".safetensors")
        else as_checkpoint(features)
    )
    place(folder / name, content)
    assert_same(load_trunk_weights(NET, folder), features)


def test_folder_prefers_the_official_name(tmp_path: Path, generator: torch.Generator) -> None:
    first, second = random_features(generator), random_features(generator)
    place(tmp_path / f"{NET}.pth", as_checkpoint(second))
    place(tmp_path / FILENAME, as_checkpoint(first))
    assert_same(load_trunk_weights(NET, tmp_path), first)


def test_explicit_weights_that_do_not_exist(tmp_path: Path, hub: Path, official: bytes) -> None:
    place(hub / FILENAME, official)  # what was asked for is missing: no other place will do
    with pytest.raises(WeightsNotFoundError, match="does not exist"):
        load_trunk_weights(NET, tmp_path / "missing.pth")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsNotFoundError, match="holds no weights for the 'squeeze' trunk"):
        load_trunk_weights(NET, empty)
    with pytest.raises(FileNotFoundError, match=FILENAME):
        load_trunk_weights(NET, str(empty))


def test_explicit_weights_of_another_type() -> None:
    with pytest.raises(TypeError, match="weights is a int"):
        load_trunk_weights(NET, 3)  # type: ignore[arg-type]


def test_unknown_net() -> None:
    for function in (load_trunk_weights, locate_trunk_weights):
        with pytest.raises(ValueError, match=r"net='resnet' is unknown.*'squeeze'"):
            function("resnet")


def test_search_order(
    tmp_path: Path,
    hub: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    downloaded, in_folder, explicit = (random_features(generator) for _ in range(3))
    content = as_checkpoint(downloaded)
    make_official(content, downloaded, monkeypatch)
    mirror.offer(content)
    environment = tmp_path / "environment"
    environment.mkdir()
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(environment))

    # Nothing anywhere: a download; the folder without this net is passed over.
    assert locate_trunk_weights(NET) is None
    assert_same(load_trunk_weights(NET, progress=False), downloaded)
    assert len(mirror.requests) == 1
    # The hub cache: the stripped copy, and the checkpoint where there is none.
    assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", stripped_path(hub))
    stripped_path(hub).unlink()
    assert locate_trunk_weights(NET) == TrunkLocation("hub", hub / FILENAME)
    assert_same(load_trunk_weights(NET), downloaded)
    # The folder of the environment comes before the hub cache.
    place(environment / f"{NET}.pth", as_checkpoint(in_folder))
    assert locate_trunk_weights(NET) == TrunkLocation("env", environment / f"{NET}.pth")
    assert_same(load_trunk_weights(NET), in_folder)
    # What is given comes before everything.
    assert_same(load_trunk_weights(NET, explicit), explicit)
    assert len(mirror.requests) == 1


def test_environment_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(place(tmp_path / "file", b"")))
    for function in (load_trunk_weights, locate_trunk_weights):
        with pytest.raises(WeightsError, match=r"LPIPS_FAST_WEIGHTS=.* is not a folder"):
            function(NET)


def test_damaged_file_in_environment_folder_is_an_error(
    tmp_path: Path, hub: Path, official: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(hub / FILENAME, official)
    damaged = place(tmp_path / "environment" / FILENAME, official[:1000])
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(damaged.parent))
    with pytest.raises(WeightsError) as error:
        load_trunk_weights(NET)
    assert str(damaged) in str(error.value)


def test_the_environment_comes_before_the_package(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = random_features(generator, "alex")
    torch.save(own, tmp_path / "alex.pth")
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path))
    assert locate_trunk_weights("alex") == TrunkLocation("env", tmp_path / "alex.pth")
    loaded = load_trunk_weights("alex")
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    (tmp_path / "alex.pth").unlink()  # a folder without this net is passed over
    location = locate_trunk_weights("alex")
    assert location is not None and location.kind == "package"


def test_the_package_comes_before_the_cache(hub: Path, generator: torch.Generator) -> None:
    place(hub / "alexnet-owt-7be5be79.pth", as_checkpoint(random_features(generator, "alex")))
    location = locate_trunk_weights("alex")
    assert location is not None and location.kind == "package"


def test_the_error_names_the_options_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError) as error:
        load_trunk_weights(NET, tmp_path / "missing.pth")
    assert f"weights='{tmp_path}/missing.pth' does not exist" in str(error.value)
    assert f"--weights {tmp_path}/missing.pth does not exist" in error.value.command_line
    with pytest.raises(WeightsNotFoundError) as error:
        load_trunk_weights(NET)
    assert f"weights='/path/to/{FILENAME}'" in str(error.value)
    assert f"--weights /path/to/{FILENAME}" in error.value.command_line
    assert "weights=" not in error.value.command_line
