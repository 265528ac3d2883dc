"""Checkpoints made here, an empty hub cache, and a server to download from: for tests of weights.

The fixtures are known to all tests; one that reads or writes a cache uses ``hub``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpips_fast.trunk import feature_shapes
from lpips_fast.weights import TRUNK_SOURCES, features_digest

NETS = ("alex", "vgg", "squeeze")
NET = "squeeze"  # the smallest: its features are 2.8 MiB
FILENAME = TRUNK_SOURCES[NET].filename


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, no settings from outside, and no way to the real network."""
    for variable in ("LPIPS_FAST_WEIGHTS", "LPIPS_FAST_MIRROR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


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


def make_official(
    content: bytes,
    features: Mapping[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    net: str = NET,
) -> None:
    """Let the table expect this very file under the official name, and these weights in it."""
    source = dataclasses.replace(
        TRUNK_SOURCES[net],
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        features_sha256=features_digest(features),
    )
    monkeypatch.setitem(TRUNK_SOURCES, net, source)


@pytest.fixture
def official(features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The official checkpoint, as far as the package knows: that of the fixture ``features``."""
    content = as_checkpoint(features)
    make_official(content, features, monkeypatch)
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
    """A server on 127.0.0.1 that hands out `files`, and can misbehave.

    Attributes:
        files: contents by path.
        requests: the paths that were asked for.
        answers_to_cut: so many answers to come break off in the middle.
        failures: so many answers to come are the error 503.
        says_length: whether an answer names its length.
        extra: sent after each answer, beyond the length that it names.
        drip: seconds between the bytes of an answer.
        meeting: no answer before all parties of it have asked.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.answers_to_cut = 0
        self.failures = 0
        self.says_length = True
        self.extra = b""
        self.drip = 0.0
        self.meeting: threading.Barrier | None = None
        self.closed = False
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                content = mirror.files.get(self.path)
                if mirror.meeting is not None:
                    mirror.meeting.wait(timeout=120)
                if mirror.failures > 0:
                    mirror.failures -= 1
                    self.send_error(503)
                    return
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                if mirror.says_length:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if mirror.answers_to_cut > 0:
                    mirror.answers_to_cut -= 1
                    content = content[: len(content) // 2]
                try:
                    while mirror.drip and content and not mirror.closed:
                        self.wfile.write(content[:1])
                        content = content[1:]
                        time.sleep(mirror.drip)
                    self.wfile.write(content + mirror.extra)
                except OSError:
                    pass  # the other side hung up, as it should

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/models"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def offer(self, content: bytes) -> None:
        self.files[f"/models/{FILENAME}"] = content

    def close(self) -> None:
        self.closed = True
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A server in place of the official one; a failed download is tried again without a pause."""
    from lpips_fast.weights import download

    server = Mirror()
    monkeypatch.delenv("LPIPS_FAST_OFFLINE")
    monkeypatch.setenv("LPIPS_FAST_MIRROR", server.address)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield server
    server.close()
