"""``lpips-fast weights``: what weights are here, the download, and a folder to take along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from image_folders import call, start
from torch import Tensor
from weight_files import (
    FILENAME,
    NET,
    NETS,
    as_checkpoint,
    make_official,
    place,
    random_features,
    stripped_path,
)

from lpips_fast import weights

pytestmark = pytest.mark.usefixtures("hub")


def report(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert call("weights", *arguments) == code
    return json.loads(capsys.readouterr().out)


def trunks(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    return report(capsys, "--json", *arguments, code=code)["trunks"]


@pytest.mark.parametrize("action", [(), ("list",)])
def test_nothing_is_here_but_alexnet(
    action: tuple[str, ...], capsys: pytest.CaptureFixture[str], hub: Path
) -> None:
    assert call("weights", *action) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "alex      the official weights" in out and "(in the package)" in out
    for net in NETS[1:]:
        assert f"{net:<8}  not here; {weights.TRUNK_SOURCES[net].url}" in out
    assert str(hub) in out and "LPIPS_FAST_OFFLINE=1" in out
    assert trunks(capsys, *action)["vgg"]["path"] is None
    assert report(capsys, *action, "--json")["trunks"]["alex"]["official"] is True


def test_the_official_file_and_its_stripped_copy(
    capsys: pytest.CaptureFixture[str], hub: Path, official: bytes
) -> None:
    place(hub / FILENAME, official)
    found = trunks(capsys)[NET]
    assert (found["path"], found["source"]) == (str(hub / FILENAME), "hub")
    assert (found["official"], found["usable"]) == (True, True)
    weights.load_trunk_weights(NET)  # leaves the stripped copy behind
    digest = weights.TRUNK_SOURCES[NET].features_sha256
    copy = trunks(capsys)[NET]
    assert (copy["source"], copy["official"]) == ("stripped-cache", True)
    assert copy["state"] == f"the official weights (SHA-256 of the convolutions {digest[:16]}…)"
    assert call("weights") == 0
    assert "(stripped copy in torch's hub cache)" in capsys.readouterr().out


def test_other_weights(
    capsys: pytest.CaptureFixture[str],
    hub: Path,
    features: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place(hub / FILENAME, as_checkpoint(features))
    found = trunks(capsys)[NET]
    assert (found["source"], found["official"], found["usable"]) == ("hub", False, True)
    digest = weights.features_digest(features)
    assert f"not the official weights (SHA-256 of the convolutions {digest[:16]}…" in found["state"]
    place(tmp_path / "own" / f"{NET}.pth", as_checkpoint(features))
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path / "own"))
    found = trunks(capsys)[NET]
    assert (found["source"], found["official"], found["usable"]) == ("env", False, True)


def test_damaged_weights_are_an_error(
    capsys: pytest.CaptureFixture[str], hub: Path, official: bytes
) -> None:
    place(hub / FILENAME, official[:1000])
    found = trunks(capsys, code=1)[NET]
    assert found["usable"] is False
    assert "damaged or cut short" in found["state"]
    assert call("weights") == 1
    assert "error: the weights of squeeze cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--download", NET), ("fetch", NET)])
def test_fetch(
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    hub: Path,
    official: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirrored = place(tmp_path / "mirror" / FILENAME, official)
    monkeypatch.setenv("LPIPS_FAST_MIRROR", mirrored.parent.as_uri())
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "0")
    found = trunks(capsys, *words)[NET]
    assert (found["official"], found["usable"]) == (True, True)
    assert (hub / FILENAME).is_file()
    mirrored.unlink()
    assert trunks(capsys, *words)[NET] == found  # nothing is fetched twice


def test_fetch_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--download", "vgg"), ("fetch", "vgg"), ("fetch",)):
        assert call("weights", *words) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("lpips-fast: error: the weights of the 'vgg' trunk")
        assert "LPIPS_FAST_OFFLINE is set" in err
        assert "--weights /path/to/vgg16" in err and "weights='" not in err
    for words in (("--download", "resnet"), ("fetch", "resnet"), ("pack",), ("unpack", "x")):
        assert call("weights", *words) == 2


def test_a_missing_file_is_told_in_the_words_of_the_command_line(
    capsys: pytest.CaptureFixture[str], example_images: dict[str, Path], tmp_path: Path
) -> None:
    images = example_images["ref"], example_images["p0"]
    assert call("pair", *images, "--weights", tmp_path / "none.pth") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"lpips-fast: error: --weights {tmp_path}/none.pth does not exist")
    assert err.count("\n") == 1


def test_pack_and_verify(
    capsys: pytest.CaptureFixture[str],
    hub: Path,
    official: bytes,
    tmp_path: Path,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place(hub / FILENAME, official)
    folder = tmp_path / "packed"
    assert call("weights", "pack", "-o", folder, "--net", "alex", "--net", NET) == 0
    out, err = capsys.readouterr()
    assert out.count("the official weights") == 2 and err == ""
    assert out.endswith(f"LPIPS_FAST_WEIGHTS={folder}\n")
    files = report(capsys, "verify", folder, "--json")["files"]
    assert [file["net"] for file in files] == ["alex", NET]
    assert all(file["official"] for file in files)
    assert report(capsys, "pack", "-o", folder, "--net", NET, "--json")["files"] == files[1:]

    assert call("weights", "verify") == 0  # what the search finds
    assert capsys.readouterr().out.count("the official weights") == 2
    (path,) = folder.glob("squeeze*")
    safetensors.torch.save_file(random_features(generator), path)
    assert call("weights", "verify", folder) == 1
    assert f"error: these are not the official weights: {path}\n" in capsys.readouterr().err
    path.write_bytes(b"")
    assert call("weights", "verify", folder) == 1
    assert "error: the weights of squeeze cannot be used" in capsys.readouterr().err
    assert call("weights", "verify", tmp_path / "nowhere") == 1
    assert "does not exist or is no file" in capsys.readouterr().err


def test_another_process_sees_one_message_and_no_traceback(tmp_path: Path) -> None:
    process = start("weights", "fetch", "vgg")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and out == ""
    assert "Traceback" not in err and "--weights /path/to/" in err


def test_a_damaged_copy_is_told_by_the_command_line(
    capsys: pytest.CaptureFixture[str],
    hub: Path,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = as_checkpoint(features)
    make_official(content, features, monkeypatch)
    place(hub / FILENAME, content)
    place(stripped_path(hub), b"damaged")
    assert call("weights", "fetch", NET) == 0
    assert "lpips-fast: warning:" in (err := capsys.readouterr().err) and "is damaged" in err
    assert call("weights", "list") == 0
    assert capsys.readouterr().err == ""
