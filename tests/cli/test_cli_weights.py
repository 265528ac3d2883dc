"""``lpips-fast weights``: where weights are, what their hashes say, and the download."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from image_folders import call
from parity import trunk_weights

from lpips_fast import weights

NETS = ("alex", "vgg", "squeeze")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no network, and no folder of weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    for name in ("LPIPS_FAST_WEIGHTS", "LPIPS_FAST_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def checkpoint(net: str, path: Path) -> str:
    """Write random weights as a checkpoint; return its SHA-256."""
    torch.save(trunk_weights(net), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def be_official(monkeypatch: pytest.MonkeyPatch, net: str, digest: str) -> None:
    source = dataclasses.replace(weights.TRUNK_SOURCES[net], hash_prefix=digest[:8])
    monkeypatch.setitem(weights.TRUNK_SOURCES, net, source)


def trunks(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    capsys.readouterr()
    assert call("weights", "--json", *arguments) == code
    return json.loads(capsys.readouterr().out)["trunks"]


def test_nothing_is_here(capsys: pytest.CaptureFixture[str], hub: Path) -> None:
    assert call("weights") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for net in NETS:
        assert f"{net:<8}  not here; {weights.TRUNK_SOURCES[net].url}" in out
    assert str(hub) in out and "LPIPS_FAST_OFFLINE=1" in out
    assert trunks(capsys)["vgg"]["path"] is None


def test_the_official_file_and_its_stripped_copy(
    capsys: pytest.CaptureFixture[str], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub / weights.TRUNK_SOURCES["squeeze"].filename
    digest = checkpoint("squeeze", path)
    be_official(monkeypatch, "squeeze", digest)
    report = trunks(capsys)["squeeze"]
    assert (report["path"], report["official"], report["usable"]) == (str(path), True, True)
    assert report["state"] == f"the official file (SHA-256 {digest[:16]}…)"
    weights.load_trunk_weights("squeeze")  # leaves the stripped copy behind
    report = trunks(capsys)["squeeze"]
    assert (report["source"], report["official"]) == ("stripped-cache", True)
    assert report["state"] == f"made of the official file (SHA-256 {digest[:16]}…)"
    assert call("weights") == 0
    assert "(stripped copy in torch's hub cache)" in capsys.readouterr().out


def test_another_file_under_the_official_name(
    capsys: pytest.CaptureFixture[str], hub: Path
) -> None:
    source = weights.TRUNK_SOURCES["squeeze"]
    digest = checkpoint("squeeze", hub / source.filename)
    report = trunks(capsys)["squeeze"]
    assert (report["official"], report["usable"]) == (False, True)
    assert report["state"] == (
        f"not the official file: SHA-256 {digest[:16]}…, expected {source.hash_prefix}…"
    )


def test_a_file_of_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = checkpoint("squeeze", tmp_path / "squeeze.pth")
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path))
    report = trunks(capsys)["squeeze"]
    assert (report["source"], report["official"], report["usable"]) == ("env", None, True)
    assert report["state"] == f"a file of your own (SHA-256 {digest[:16]}…)"


def test_damaged_weights_are_an_error(capsys: pytest.CaptureFixture[str], hub: Path) -> None:
    path = hub / weights.TRUNK_SOURCES["squeeze"].filename
    checkpoint("squeeze", path)
    path.write_bytes(path.read_bytes()[:1000])
    report = trunks(capsys, code=1)["squeeze"]
    assert report["usable"] is False
    assert "damaged or cut short" in report["state"]
    assert call("weights") == 1
    assert "error: the weights of squeeze cannot be used" in capsys.readouterr().err


def test_download(
    capsys: pytest.CaptureFixture[str],
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    digest = checkpoint("squeeze", mirror / weights.TRUNK_SOURCES["squeeze"].filename)
    be_official(monkeypatch, "squeeze", digest)
    monkeypatch.setenv("LPIPS_FAST_MIRROR", mirror.as_uri())
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "0")
    report = trunks(capsys, "--download", "squeeze")["squeeze"]
    assert (report["official"], report["usable"]) == (True, True)
    assert (hub / weights.TRUNK_SOURCES["squeeze"].filename).is_file()
    (mirror / weights.TRUNK_SOURCES["squeeze"].filename).unlink()
    assert trunks(capsys, "--download", "squeeze")["squeeze"] == report  # nothing is fetched twice


def test_a_download_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights", "--download", "vgg") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lpips-fast: error: the weights of the 'vgg' trunk")
    assert "LPIPS_FAST_OFFLINE is set" in err
    assert call("weights", "--download", "resnet") == 2
