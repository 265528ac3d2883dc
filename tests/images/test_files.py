"""What is at a path: regular files are read whole, and all else is refused without waiting."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lpips_fast.images.files import ImageError, ImageMemoryError, fingerprint_of, read_file


def read(path: Path | str) -> bytes:
    return read_file(path, max_bytes=1 << 20)[0]


def test_bytes_and_fingerprint_are_of_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (1, 1000, 64 * 1024, 200_000):
        path.write_bytes(os.urandom(size))
        data, fingerprint = read_file(path, max_bytes=1 << 20)
        assert data == path.read_bytes()
        assert fingerprint == fingerprint_of(path)
        assert (fingerprint.size, fingerprint.modified) == (size, path.stat().st_mtime_ns)
        assert len(fingerprint.digest) == 32


@pytest.mark.parametrize("position", [0, 64 * 1024 - 1, 136_000, 199_999])
def test_a_byte_within_64_kib_of_an_end_changes_the_digest(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    content = bytearray(os.urandom(200_000))
    path.write_bytes(content)
    before = fingerprint_of(path)
    content[position] ^= 1
    path.write_bytes(content)
    assert before is not None and fingerprint_of(path).digest != before.digest  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "no such file$"),
        ("dangling", "no such file, only a link to one$"),
        ("loop", "Too many levels of symbolic links"),
        ("folder", "it is a folder, expected an image file"),
        ("pipe", "it is a pipe, expected an image file"),
        ("link to a pipe", "it is a pipe, expected an image file"),
        ("device", "it is a device, expected an image file"),
        ("socket", "it is a socket, expected an image file"),
        ("empty", "the file is empty"),
        ("large", "the file has 2,000,000 bytes, and no image within the limit of pixels needs"),
        ("sparse", "the file has 1,099,511,627,776 bytes"),
        ("no name", "null byte"),
    ],
)
def test_what_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    path: Path | str = tmp_path / "it.png"
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "dangling":
            os.symlink("nowhere", path)
        elif kind == "loop":
            os.symlink("it.png", path)
        elif kind == "folder":
            os.mkdir(path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link to a pipe":
            os.mkfifo("pipe")
            os.symlink("pipe", path)
        elif kind == "device":
            os.symlink("/dev/zero", path)
        elif kind == "socket":
            server.bind("it.png")
        elif kind in ("empty", "large", "sparse"):
            Path(path).touch()
            os.truncate(path, {"empty": 0, "large": 2_000_000, "sparse": 2**40}[kind])
        elif kind == "no name":
            path = "it\0.png"
        with pytest.raises(ImageError, match=reason):
            read(path)
        if kind not in ("empty", "large", "sparse"):
            assert fingerprint_of(path) is None


def test_no_memory_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(b"x")

    def refuse(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("lpips_fast.images.files._read", refuse)
    with pytest.raises(ImageMemoryError, match=r"file\.png': there is no memory for its 1 bytes"):
        read(path)
    with pytest.raises(MemoryError):
        read(path)
