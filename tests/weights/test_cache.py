"""Torch's hub cache, and the stripped copies in it, which are believed by their digest alone."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from weight_files import (
    FILENAME,
    NET,
    Mirror,
    as_checkpoint,
    assert_nothing_partial,
    assert_same,
    make_official,
    place,
    random_features,
    stripped_path,
)

from lpips_fast.trunk import feature_shapes
from lpips_fast.weights import (
    TrunkLocation,
    WeightsError,
    WeightsNotFoundError,
    cache,
    load_trunk_weights,
    locate_trunk_weights,
)


def test_stripped_copy_serves_the_second_start(
    hub: Path, official: bytes, features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(hub / FILENAME, official)
    assert_same(load_trunk_weights(NET), features)
    assert_nothing_partial(hub)
    assert set(safetensors.torch.load_file(stripped_path(hub))) == set(feature_shapes(NET))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole checkpoint was read again")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(cache, "file_digest", refuse)
    assert_same(load_trunk_weights(NET), features)
    (hub / FILENAME).unlink()
    assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", stripped_path(hub))
    assert_same(load_trunk_weights(NET), features)


def test_stripped_copy_is_made_anew_when_the_checkpoint_changes(
    hub: Path, official: bytes, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(hub / FILENAME, official)
    load_trunk_weights(NET)
    other = random_features(generator)
    content = as_checkpoint(other)
    place(hub / FILENAME, content)
    assert len(content) == len(official)  # so that only the time of the file gives it away
    os.utime(hub / FILENAME, ns=(1, 1_700_000_000_123_456_789))
    assert locate_trunk_weights(NET) == TrunkLocation("hub", hub / FILENAME)
    with pytest.warns(UserWarning, match="bears the name of the official weights"):
        assert_same(load_trunk_weights(NET), other)
    make_official(content, other, monkeypatch)
    with pytest.warns(UserWarning, match="no copy of the official"):
        assert_same(load_trunk_weights(NET), other)
    assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", stripped_path(hub))
    assert_same(load_trunk_weights(NET), other)


def damage(kind: str, copy: Path, features: dict[str, Tensor]) -> None:
    if kind == "cut":
        copy.write_bytes(copy.read_bytes()[:-1])
    elif kind == "empty":
        copy.write_bytes(b"")
    elif kind == "one bit":
        content = bytearray(copy.read_bytes())
        content[-5] ^= 1
        copy.write_bytes(content)
    elif kind == "not ours":
        safetensors.torch.save_file({"x": torch.ones(1)}, copy)
    else:  # other weights, with all that a copy of ours says about itself
        with safetensors.safe_open(copy, "pt") as file:
            metadata = file.metadata()
        safetensors.torch.save_file({n: v + 1 for n, v in features.items()}, copy, metadata)


KINDS = ("cut", "empty", "one bit", "not ours", "foreign")


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_stripped_copy_is_made_anew(
    kind: str, hub: Path, official: bytes, features: dict[str, Tensor]
) -> None:
    place(hub / FILENAME, official)
    load_trunk_weights(NET)
    copy = stripped_path(hub)
    damage(kind, copy, features)
    with pytest.warns(UserWarning, match="is damaged, or is no copy") as caught:
        assert_same(load_trunk_weights(NET), features)
    assert len(caught) == 1 and str(copy) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once: it was made anew
        assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", copy)
        assert_same(load_trunk_weights(NET), features)


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_stripped_copy_without_its_checkpoint(
    kind: str, hub: Path, official: bytes, features: dict[str, Tensor], mirror: Mirror
) -> None:
    place(hub / FILENAME, official)
    load_trunk_weights(NET)
    (hub / FILENAME).unlink()
    damage(kind, stripped_path(hub), features)
    with pytest.warns(UserWarning, match="is damaged, or is no copy"):
        assert locate_trunk_weights(NET) is None
    mirror.offer(official)
    with pytest.warns(UserWarning, match="is damaged, or is no copy"):
        assert_same(load_trunk_weights(NET, progress=False), features)
    assert len(mirror.requests) == 1
    assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", stripped_path(hub))


def test_foreign_stripped_copy_alone_is_not_used(
    hub: Path, official: bytes, generator: torch.Generator
) -> None:
    other = random_features(generator)
    place(stripped_path(hub), safetensors.torch.save(other))
    with (
        pytest.warns(UserWarning, match="is damaged, or is no copy"),
        pytest.raises(WeightsNotFoundError),
    ):
        load_trunk_weights(NET)


def test_unofficial_file_in_the_hub_cache_warns_every_time(
    hub: Path, features: dict[str, Tensor]
) -> None:
    place(hub / FILENAME, as_checkpoint(features))
    for _ in range(2):
        with pytest.warns(UserWarning, match="and holds others.*not the published LPIPS") as caught:
            assert_same(load_trunk_weights(NET), features)
        assert len(caught) == 1 and str(hub / FILENAME) in str(caught[0].message)
        assert not stripped_path(hub).exists()


def test_official_weights_in_another_file_do_not_warn(
    hub: Path, official: bytes, features: dict[str, Tensor]
) -> None:
    torch.save({"state_dict": features}, place(hub / FILENAME, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_trunk_weights(NET), features)


def test_official_file_does_not_warn(hub: Path, official: bytes) -> None:
    place(hub / FILENAME, official)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_trunk_weights(NET)
        load_trunk_weights(NET)


def test_damaged_file_in_the_hub_cache(hub: Path, official: bytes) -> None:
    place(hub / FILENAME, official[: len(official) // 2])
    with pytest.raises(WeightsError, match="Delete the file to download the official one") as error:
        load_trunk_weights(NET)
    assert str(hub / FILENAME) in str(error.value)
    assert not stripped_path(hub).exists()


def test_cache_that_takes_no_stripped_copy(
    hub: Path, official: bytes, features: dict[str, Tensor]
) -> None:
    place(hub / FILENAME, official)
    place(hub / "lpips_fast", b"a file where the folder would be: root cannot write there either")
    for _ in range(2):
        assert_same(load_trunk_weights(NET), features)
        assert locate_trunk_weights(NET) == TrunkLocation("hub", hub / FILENAME)
    assert {path.name for path in hub.iterdir()} == {FILENAME, "lpips_fast"}
