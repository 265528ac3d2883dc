"""The whole route of the weights, against a server on this machine and checkpoints made here."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import importlib.util
import io
import os
import pickle
import random
import secrets
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lpips_fast import weights as weights_module
from lpips_fast.trunk import feature_shapes
from lpips_fast.weights import (
    LIN_VERSIONS,
    TRUNK_SOURCES,
    TrunkLocation,
    WeightsError,
    WeightsNotFoundError,
    load_lin_weights,
    load_trunk_weights,
    locate_trunk_weights,
    read_state_dict,
)

NETS = ("alex", "vgg", "squeeze")
NET = "squeeze"  # the smallest: its features are 2.8 MiB
FILENAME = TRUNK_SOURCES[NET].filename


# ---------------------------------------------------------------------------------------------
# Checkpoints, folders and a server to play with
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, no settings from outside, and no way to the real network."""
    for variable in ("LPIPS_FAST_WEIGHTS", "LPIPS_FAST_MIRROR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def generator() -> torch.Generator:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def random_features(generator: torch.Generator, net: str = NET) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=generator) for name, shape in feature_shapes(net).items()
    }


@pytest.fixture
def features(generator: torch.Generator) -> dict[str, Tensor]:
    return random_features(generator)


def as_checkpoint(features: Mapping[str, Tensor]) -> bytes:
    """The file that torchvision would publish: the features and a classifier after them."""
    buffer = io.BytesIO()
    torch.save({**features, "classifier.1.weight": torch.ones(10, 512, 1, 1)}, buffer)
    return buffer.getvalue()


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_official(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the table expect this very file under the official name."""
    digest = hashlib.sha256(content).hexdigest()
    source = dataclasses.replace(TRUNK_SOURCES[NET], hash_prefix=digest[:8])
    monkeypatch.setitem(TRUNK_SOURCES, NET, source)


@pytest.fixture
def official(features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = as_checkpoint(features)
    make_official(content, monkeypatch)
    return content


def stripped_path(hub: Path) -> Path:
    return hub / "lpips_fast" / FILENAME.replace(".pth", ".features.safetensors")


def assert_same(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(loaded) == list(feature_shapes(NET))
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        assert torch.equal(tensor, expected[name]), name


def assert_nothing_partial(hub: Path) -> None:
    """No file but the checkpoint and its stripped copy, whole, lies in the cache."""
    found = {path for path in hub.rglob("*") if path.is_file()}
    assert found <= {hub / FILENAME, stripped_path(hub)}


class Mirror:
    """A server on 127.0.0.1 that hands out `files`, and can break off its first answers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.answers_to_cut = 0
        self.meeting: threading.Barrier | None = None
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                content = mirror.files.get(self.path)
                if mirror.meeting is not None:
                    mirror.meeting.wait(timeout=120)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if mirror.answers_to_cut > 0:
                    mirror.answers_to_cut -= 1
                    content = content[: len(content) // 2]
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/models"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def offer(self, content: bytes) -> None:
        self.files[f"/models/{FILENAME}"] = content

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    server = Mirror()
    monkeypatch.delenv("LPIPS_FAST_OFFLINE")
    monkeypatch.setenv("LPIPS_FAST_MIRROR", server.address)
    yield server
    server.close()


# ---------------------------------------------------------------------------------------------
# Linear weights
# ---------------------------------------------------------------------------------------------


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

    folder = Path(weights_module.__file__).with_name("weights")
    with safetensors.safe_open(folder / f"v{version}" / f"{net}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "BSD-2-Clause" and metadata["version"] == version
    assert len(metadata["source_sha256"]) == 64


@pytest.mark.parametrize(("net", "version"), [("vgg19", "0.1"), ("alex", "0.2"), (None, "0.1")])
def test_lin_weights_unknown(net: Any, version: str) -> None:
    with pytest.raises(ValueError, match="unknown: use one of") as error:
        load_lin_weights(net, version)
    assert repr(version if net == "alex" else net) in str(error.value)


def test_module_is_not_shadowed_by_the_data_folder() -> None:
    assert Path(weights_module.__file__).name == "weights.py"


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_table(net: str) -> None:
    source = TRUNK_SOURCES[net]
    assert source.net == net
    assert source.url == f"https://download.pytorch.org/models/{source.filename}"
    assert source.filename.endswith(f"-{source.hash_prefix}.pth")
    numbers = sum(torch.Size(shape).numel() for shape in feature_shapes(net).values())
    assert source.features_mib == pytest.approx(numbers * 4 / 2**20, abs=0.06)
    assert source.features_mib < source.download_mib


# ---------------------------------------------------------------------------------------------
# Explicit weights, and the forms a state dict may take
# ---------------------------------------------------------------------------------------------


def lpips_style(features: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint of an LPIPS module: every layer below some slice, and other entries."""
    state = {
        name.replace("features.", f"net.slice{1 + index % 7}."): tensor
        for index, (name, tensor) in enumerate(features.items())
    }
    others = {key: torch.ones(1, 3, 1, 1) for key in ("scaling_layer.shift", "lin0.model.1.weight")}
    return {**others, **state}


FORMS = {
    "bare": lambda features: features,
    "whole": lambda features: {**features, "classifier.1.bias": torch.ones(10)},
    "wrapped": lambda features: {"epoch": 3, "state_dict": features},
    "data parallel": lambda features: {f"module.{key}": value for key, value in features.items()},
    "compiled": lambda features: {f"_orig_mod.{key}": value for key, value in features.items()},
    "lpips": lpips_style,
}


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_forms(form: str, features: dict[str, Tensor]) -> None:
    assert_same(load_trunk_weights(NET, FORMS[form](features)), features)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_file_forms(net: str, tmp_path: Path, generator: torch.Generator) -> None:
    features = random_features(generator, net)
    torch.save({"state_dict": features}, tmp_path / "a.pth")
    torch.save(features, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(features, tmp_path / "a.safetensors")
    for suffix in ("pth", "pt", "safetensors"):
        for path in (tmp_path / f"a.{suffix}", str(tmp_path / f"a.{suffix}")):
            loaded = load_trunk_weights(net, path)
            assert list(loaded) == list(features)
            assert all(torch.equal(loaded[name], features[name]) for name in features)


def test_result_shares_no_memory_with_what_was_given(features: dict[str, Tensor]) -> None:
    loaded = load_trunk_weights(NET, features)
    name = next(iter(loaded))
    loaded[name].zero_()
    assert bool(features[name].any())


def test_other_dtypes_and_layouts_become_contiguous_float32(features: dict[str, Tensor]) -> None:
    given = {
        name: (value.to(memory_format=torch.channels_last) if value.ndim == 4 else value).double()
        for name, value in features.items()
    }
    loaded = load_trunk_weights(NET, {k: torch.nn.Parameter(v) for k, v in given.items()})
    assert_same(loaded, features)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded.values())


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


# ---------------------------------------------------------------------------------------------
# Foreign, damaged and malicious files
# ---------------------------------------------------------------------------------------------


def test_weights_of_another_trunk(tmp_path: Path, generator: torch.Generator) -> None:
    path = place(tmp_path / "a.pth", as_checkpoint(random_features(generator, "alex")))
    with pytest.raises(WeightsError) as error:
        load_trunk_weights(NET, path)
    message = str(error.value)
    assert str(path) in message and "'squeeze' trunk" in message
    assert "'features.0.weight' has shape (64, 3, 11, 11), expected (64, 3, 3, 3)" in message
    assert "it holds those of 'alex'" in message


def test_first_problem_is_named(features: dict[str, Tensor]) -> None:
    name = "features.7.expand3x3.bias"
    cases: list[tuple[dict[str, Any], str]] = [
        ({key: value for key, value in features.items() if key != name}, "is missing"),
        ({**features, name: features[name][1:]}, "has shape (127,), expected (128,)"),
        ({**features, name: features[name].int()}, "is torch.int32, expected a floating-point"),
        ({**features, name: "text"}, "is str, expected a floating-point"),
    ]
    for state, problem in cases:
        with pytest.raises(WeightsError) as error:
            load_trunk_weights(NET, state)
        assert f"{name!r} {problem}" in str(error.value)
    with pytest.raises(WeightsError, match=r"'features\.13\.weight' is not part of it"):
        load_trunk_weights(NET, {**features, "features.13.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"holds 'features\.0\.bias' twice"):
        load_trunk_weights(NET, {**features, "module.features.0.bias": torch.ones(64)})


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ({"conv1.weight": torch.ones(1)}, "its first key is 'conv1.weight'"),
        ({"lin0.model.1.weight": torch.ones(1)}, "LPIPS's linear weights"),
        ({}, "it is empty"),
    ],
)
def test_foreign_state_dict(state: dict[str, Tensor], hint: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / f"{NET}.pth")
    for given in (state, tmp_path):
        with pytest.raises(WeightsError, match=hint):
            load_trunk_weights(NET, given)


def test_file_that_holds_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"list\.pth is no state dict.*holds a list"):
        load_trunk_weights(NET, tmp_path / "list.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_file(form: str, tmp_path: Path, features: dict[str, Tensor]) -> None:
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        safetensors.torch.save_file(features, path)
    else:
        torch.save(features, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for length in (0, 7, random.randrange(8, len(whole) - 100), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError) as error:
            load_trunk_weights(NET, path)
        assert str(path) in str(error.value), f"cut at {length} of {len(whole)}"


def test_read_state_dict(tmp_path: Path, features: dict[str, Tensor]) -> None:
    torch.save({"state_dict": features, "epoch": 3}, tmp_path / "a.pth")
    safetensors.torch.save_file(features, tmp_path / "a.safetensors")
    stored = read_state_dict(str(tmp_path / "a.pth"))
    assert list(stored) == ["state_dict", "epoch"]
    for state in (stored["state_dict"], read_state_dict(tmp_path / "a.safetensors")):
        assert_same({name: state[name] for name in features}, features)
    for missing in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(WeightsNotFoundError, match="does not exist or is no file"):
            read_state_dict(missing)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(
    form: str, tmp_path: Path, features: dict[str, Tensor]
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    state = {**features, "extra": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="pickled objects, which are never executed"):
        load_trunk_weights(NET, path)
    assert not marker.exists()

    # The trap is live: an unpickler that trusts the file does run it.
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


# ---------------------------------------------------------------------------------------------
# The order of the search
# ---------------------------------------------------------------------------------------------


def test_search_order(
    tmp_path: Path,
    hub: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    downloaded, in_folder, explicit = (random_features(generator) for _ in range(3))
    content = as_checkpoint(downloaded)
    make_official(content, monkeypatch)
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


# ---------------------------------------------------------------------------------------------
# The stripped copy in the hub cache
# ---------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(weights_module, "_sha256", refuse)
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
    make_official(content, monkeypatch)
    place(hub / FILENAME, content)
    assert len(content) == len(official)  # so that only the time of the file gives it away
    os.utime(hub / FILENAME, ns=(1, 1_700_000_000_123_456_789))
    assert locate_trunk_weights(NET) == TrunkLocation("hub", hub / FILENAME)
    assert_same(load_trunk_weights(NET), other)
    assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", stripped_path(hub))
    assert_same(load_trunk_weights(NET), other)


@pytest.mark.parametrize("damage", ["cut", "not ours", "old layout"])
def test_unusable_stripped_copy_is_made_anew(
    damage: str, hub: Path, official: bytes, features: dict[str, Tensor]
) -> None:
    place(hub / FILENAME, official)
    load_trunk_weights(NET)
    copy = stripped_path(hub)
    if damage == "cut":
        copy.write_bytes(copy.read_bytes()[:-1])
    elif damage == "not ours":
        safetensors.torch.save_file({"x": torch.ones(1)}, copy)
    else:
        with safetensors.safe_open(copy, "pt") as file:
            metadata = {**file.metadata(), "layout": "0"}
        safetensors.torch.save_file(features, copy, metadata)
    assert locate_trunk_weights(NET) == TrunkLocation("hub", hub / FILENAME)
    assert_same(load_trunk_weights(NET), features)
    assert locate_trunk_weights(NET) == TrunkLocation("stripped-cache", copy)


def test_unofficial_file_in_the_hub_cache_warns_every_time(
    hub: Path, features: dict[str, Tensor]
) -> None:
    content = as_checkpoint(features)
    place(hub / FILENAME, content)
    actual = hashlib.sha256(content).hexdigest()[:8]
    expected = TRUNK_SOURCES[NET].hash_prefix
    pattern = f"begins with {actual}, expected {expected}.*not the published LPIPS"
    for named in (hub / FILENAME, stripped_path(hub)):
        with pytest.warns(UserWarning, match=pattern) as caught:
            assert_same(load_trunk_weights(NET), features)
        assert len(caught) == 1 and str(named) in str(caught[0].message)


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


# ---------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_download(
    slash: str,
    hub: Path,
    mirror: Mirror,
    official: bytes,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LPIPS_FAST_MIRROR", mirror.address + slash)
    mirror.offer(official)
    assert_same(load_trunk_weights(NET), features)
    assert (hub / FILENAME).read_bytes() == official
    assert_nothing_partial(hub)
    shown = capsys.readouterr()
    assert f"Downloading {mirror.address}/{FILENAME}" in shown.err and "100%" in shown.err
    assert shown.out == ""
    assert_same(load_trunk_weights(NET), features)
    assert mirror.requests == [f"/models/{FILENAME}"]


def test_download_without_progress_is_silent(
    mirror: Mirror, official: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.offer(official)
    load_trunk_weights(NET, progress=False)
    assert capsys.readouterr() == ("", "")


def test_download_with_the_wrong_hash(hub: Path, mirror: Mirror, official: bytes) -> None:
    mirror.offer(official.replace(b"classifier", b"klassifier"))
    with pytest.raises(WeightsNotFoundError, match="The server sent another file"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == []


def test_interrupted_download_leaves_nothing_and_can_be_tried_again(
    hub: Path, mirror: Mirror, official: bytes, features: dict[str, Tensor]
) -> None:
    mirror.offer(official)
    mirror.answers_to_cut = 1
    with pytest.raises(WeightsNotFoundError, match=r"the download from http.* failed"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == []
    assert_same(load_trunk_weights(NET, progress=False), features)
    assert_nothing_partial(hub)


def test_server_without_the_file(hub: Path, mirror: Mirror) -> None:
    with pytest.raises(WeightsNotFoundError, match="404"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == []


def test_server_that_cannot_be_reached(
    hub: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as deaf:  # it holds a port but does not listen: connections are refused
        deaf.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("LPIPS_FAST_MIRROR", address)
        with pytest.raises(WeightsNotFoundError) as error:
            load_trunk_weights(NET, progress=False)
    message = str(error.value)
    assert "refused" in message and address in message
    assert_says_what_to_do(message, hub)
    monkeypatch.setenv("LPIPS_FAST_MIRROR", "no address at all")
    with pytest.raises(WeightsNotFoundError, match="unknown url type"):
        load_trunk_weights(NET, progress=False)


@pytest.mark.parametrize("value", ["1", "true"])
def test_offline(value: str, hub: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", value)
    with pytest.raises(WeightsNotFoundError, match="LPIPS_FAST_OFFLINE is set") as error:
        load_trunk_weights(NET)
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, RuntimeError)
    assert_says_what_to_do(str(error.value), hub)
    assert mirror.requests == []


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_offline_switched_off(
    value: str, mirror: Mirror, official: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", value)
    mirror.offer(official)
    load_trunk_weights(NET, progress=False)
    assert len(mirror.requests) == 1


def assert_says_what_to_do(message: str, hub: Path) -> None:
    assert TRUNK_SOURCES[NET].url in message
    assert "weights=" in message
    assert "LPIPS_FAST_WEIGHTS" in message
    assert str(hub / FILENAME) in message


def test_download_without_a_place_to_keep_it(
    tmp_path: Path,
    mirror: Mirror,
    official: bytes,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocked = place(tmp_path / "blocked", b"a file: nobody can make a folder below it")
    monkeypatch.setenv("TORCH_HOME", str(blocked / "torch"))
    mirror.offer(official)
    for attempt in (1, 2):
        with pytest.warns(UserWarning, match="cannot be kept.*downloaded again.*TORCH_HOME"):
            assert_same(load_trunk_weights(NET, progress=False), features)
        assert len(mirror.requests) == attempt


def test_processes_that_start_at_once(
    hub: Path, mirror: Mirror, official: bytes, features: dict[str, Tensor], tmp_path: Path
) -> None:
    mirror.offer(official)
    mirror.meeting = threading.Barrier(3)  # no answer before all three have asked
    program = textwrap.dedent("""
        import dataclasses, sys
        import safetensors.torch
        from lpips_fast.weights import TRUNK_SOURCES, load_trunk_weights

        net, prefix, output = sys.argv[1:]
        TRUNK_SOURCES[net] = dataclasses.replace(TRUNK_SOURCES[net], hash_prefix=prefix)
        safetensors.torch.save_file(load_trunk_weights(net, progress=False), output)
    """)
    root = Path(weights_module.__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"{number}.safetensors" for number in range(3)]
    prefix = TRUNK_SOURCES[NET].hash_prefix
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, NET, prefix, str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for output in outputs
    ]
    try:
        for process, output in zip(processes, outputs, strict=True):
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
            loaded = safetensors.torch.load_file(output)
            assert_same({name: loaded[name] for name in feature_shapes(NET)}, features)
    finally:
        mirror.meeting.abort()
        for process in processes:
            process.kill()
            process.communicate()
    assert len(mirror.requests) == 3
    assert (hub / FILENAME).read_bytes() == official
    assert_nothing_partial(hub)
    assert_same(load_trunk_weights(NET), features)
    assert len(mirror.requests) == 3
