"""Checkpoint files: nothing in them is executed, and nothing that they claim is believed."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from weight_files import NET, as_checkpoint, assert_same, place, random_features

from lpips_fast.weights import (
    WeightsError,
    WeightsNotFoundError,
    load_trunk_weights,
    read_state_dict,
)

pytestmark = pytest.mark.usefixtures("hub")


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


def refused(path: Path, words: str) -> str:
    """Read the file, which must fail with one sentence that holds `words`; return it."""
    with pytest.raises(WeightsError, match=words) as error:
        read_state_dict(path)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# Archives whose records are not what their pickle says
# ---------------------------------------------------------------------------------------------


def rewrite(
    path: Path,
    change: Callable[[str, bytes], bytes | None],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write an archive again, each record as `change` returns it; ``None`` leaves it out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


@pytest.fixture
def saved(tmp_path: Path, features: dict[str, Tensor]) -> Path:
    return place(tmp_path / "a.pth", as_checkpoint(features))


def test_archive_written_again_is_read(saved: Path, features: dict[str, Tensor]) -> None:
    rewrite(saved, lambda name, content: content)
    assert_same(load_trunk_weights(NET, saved), features)


@pytest.mark.parametrize("cut", [1, 4, 1000])
def test_record_shorter_than_its_tensor(cut: int, saved: Path) -> None:
    # Mapped by torch, the tensor would go on into the next record, and nobody would know.
    rewrite(saved, lambda name, content: content[:-cut] if name.endswith("/data/0") else content)
    assert "and its tensor needs 6912" in refused(saved, "record 'a[^']*/data/0' is of")


def test_missing_record(saved: Path) -> None:
    rewrite(saved, lambda name, content: None if name.endswith("/data/3") else content)
    refused(saved, "no record .*/data/3, which a tensor needs")


def test_missing_pickle(saved: Path) -> None:
    rewrite(saved, lambda name, content: None if name.endswith("data.pkl") else content)
    refused(saved, "0 records 'data.pkl', expected one")


def test_zip_bomb(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, buffer)
    path = place(tmp_path / "bomb.pth", buffer.getvalue())

    def inflate(name: str, content: bytes) -> bytes:
        return bytes(1 << 26) if name.endswith("/data/0") else content

    rewrite(path, inflate, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 18
    refused(path, "is compressed, from .* which torch.save never does")


def test_records_that_share_their_bytes(saved: Path) -> None:
    # Every entry of the directory points at one large record: stored, and larger than the file.
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    position = content.index(b"PK\x01\x02")
    while content[position : position + 4] == b"PK\x01\x02":
        content[position + 20 : position + 28] = struct.pack("<2I", *[largest.file_size] * 2)
        name, extra, comment = struct.unpack_from("<3H", content, position + 28)
        position += 46 + name + extra + comment
    saved.write_bytes(content)
    refused(saved, r"its records claim \d+ bytes and the file has")


class Tensors:
    """Pickles to calls of torch's own functions with arguments of our choice."""

    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return getattr(torch._utils, self.function), self.arguments


class Storage:
    """Stands for a storage of so many elements, in one record."""

    def __init__(self, count: Any, kind: Any = torch.FloatStorage, key: str = "0") -> None:
        self.id = ("storage", kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    more: tuple[Any, ...] = ()

    def persistent_id(self, obj: Any) -> Any:
        return (*obj.id, *self.more) if isinstance(obj, Storage) else None


class LegacyPickler(Pickler):
    more = (None,)  # it is no view of another storage


def pickled(state: Any, pickler: type[Pickler] = Pickler) -> bytes:
    buffer = io.BytesIO()
    pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()


def archive_of(path: Path, state: Any, record: bytes = bytes(16)) -> Path:
    torch.save(torch.zeros(4), path)
    contents = {"data.pkl": pickled(state), "0": record}
    rewrite(path, lambda name, content: contents.get(name.split("/")[-1], content))
    return path


def legacy_of(path: Path, state: Any, record: bytes = bytes(16)) -> Path:
    torch.save(torch.zeros(4), path, _use_new_zipfile_serialization=False)
    with path.open("rb") as file:
        head = [pickle.load(file) for _ in range(3)]
    content = b"".join(pickle.dumps(part, protocol=2) for part in head)
    content += pickled(state, LegacyPickler)
    content += pickle.dumps(["0"], protocol=2) + struct.pack("<q", len(record) // 4) + record
    path.write_bytes(content)
    return path


def tensor_of(
    storage: Any, offset: Any = 0, size: Any = (4,), stride: Any = (1,), **options: Any
) -> Tensors:
    return Tensors("_rebuild_tensor_v2", storage, offset, size, stride, False, {})


CLAIMS = {
    "too many rows": (tensor_of(Storage(4), size=(5,)), r"shape \(5,\) whose storage has 4 elem"),
    "offset": (tensor_of(Storage(4), offset=1), "whose storage has 4 elements"),
    "stride": (tensor_of(Storage(4), stride=(2,)), "whose storage has 4 elements"),
    "negative offset": (tensor_of(Storage(4), offset=-1, size=(2,)), "offset, shape and strides"),
    "negative stride": (tensor_of(Storage(4), offset=3, stride=(-1,)), "offset, shape and strides"),
    "no integers": (tensor_of(Storage(4), size=(2.5,)), "offset, shape and strides"),
    "ranks": (tensor_of(Storage(4), size=(2, 2)), r"shape \(2, 2\) with strides \(1,\)"),
    "storage": (
        tensor_of(Storage(5), size=(5,)),
        "of 16 bytes, and its tensor|damaged or cut short",
    ),
    "huge": (tensor_of(Storage(2**60), size=(2**60,)), "and its tensor needs|claim"),
    "wide": (
        tensor_of(Storage(4, torch.DoubleStorage)),
        "of 16 bytes, and its tensor needs 32|damaged or cut short",
    ),
    "negative storage": (tensor_of(Storage(-1), size=(0,)), "has -1 elements"),
    "no number": (tensor_of(Storage("4"), size=(4,)), "has '4' elements"),
    "two sizes": (
        [tensor_of(Storage(4)), tensor_of(Storage(2), size=(2,))],
        "storage '0' has two sizes",
    ),
    "another kind": (tensor_of(Storage(4, torch.nn.Linear)), "expected a storage"),
}


@pytest.mark.parametrize("write", [archive_of, legacy_of])
@pytest.mark.parametrize("claim", CLAIMS)
def test_claims(claim: str, write: Callable[..., Path], tmp_path: Path) -> None:
    state, words = CLAIMS[claim]
    refused(write(tmp_path / "a.pth", {"x": state} if isinstance(state, Tensors) else state), words)


@pytest.mark.parametrize("write", [archive_of, legacy_of])
def test_claims_that_hold(write: Callable[..., Path], tmp_path: Path) -> None:
    record = torch.arange(4.0).numpy().tobytes()
    storage = Storage(4)
    state = {
        "all": tensor_of(storage),
        "square": tensor_of(storage, size=(2, 2), stride=(1, 2)),
        "expanded": tensor_of(storage, offset=3, size=(5, 1), stride=(0, 1)),
        "empty": tensor_of(storage, offset=4, size=(0, 7), stride=(7, 1)),
    }
    read = read_state_dict(write(tmp_path / "a.pth", state, record))
    assert torch.equal(read["all"], torch.arange(4.0))
    assert torch.equal(read["square"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    assert torch.equal(read["expanded"], torch.full((5, 1), 3.0))
    assert read["empty"].shape == (0, 7)


def test_whatever_torch_saves_is_read(tmp_path: Path) -> None:
    shared = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "model": {"a": shared, "b": shared[1, ::2], "c": torch.nn.Parameter(shared.half())},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "other": [torch.ones(2, dtype=torch.bool), torch.tensor(1 + 2j), torch.empty(0), None],
        "types": [torch.zeros(3, dtype=torch.uint16), torch.zeros(3).to(torch.float8_e4m3fn)],
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
    }
    for name, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        if name == "legacy":  # which cannot hold these
            state = {k: v for k, v in state.items() if k not in ("types", "meta")}
        torch.save(state, tmp_path / name, **options)
        read = read_state_dict(tmp_path / name)
        assert read.keys() == state.keys()
        assert torch.equal(read["model"]["b"], shared[1, ::2])
        assert torch.equal(read["model"]["c"], shared.half())
        assert read["other"][1].item() == 1 + 2j


# ---------------------------------------------------------------------------------------------
# Pickles that ask for memory
# ---------------------------------------------------------------------------------------------

BOMBS = {
    "bytearray by its opcode": b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b".",
    "bytearray by its class": b"\x80\x02c__builtin__\nbytearray\n\x8a\x06"
    + (1 << 45).to_bytes(6, "little")
    + b"\x85R.",
    "bytes": b"\x80\x02\x8e" + struct.pack("<Q", 1 << 45) + b".",
    "text": b"\x80\x02\x8d" + struct.pack("<Q", 1 << 45) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 45) + b".",
    "no end": b"\x80\x02]",
    "reaches below the stack": b"\x80\x02R.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_bomb(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(torch.zeros(4), path)
    rewrite(path, lambda name, content: BOMBS[bomb] if name.endswith("data.pkl") else content)
    refused(path, "cannot be read as a checkpoint")
    path.write_bytes(BOMBS[bomb])
    refused(path, "cannot be read as a checkpoint")


def test_index_in_a_pickle_reserves_no_memory(tmp_path: Path) -> None:
    content = b"\x80\x02]r\xff\xff\xff\x7f."  # memorise an empty list as number 2^31 - 1
    path = tmp_path / "a.pth"
    torch.save(torch.zeros(4), path)
    rewrite(path, lambda name, old: content if name.endswith("data.pkl") else old)
    assert read_state_dict(path) == []


# ---------------------------------------------------------------------------------------------
# What is no file
# ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipes_and_devices_are_no_files(
    tmp_path: Path, features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / f"{NET}.features.pth")
    for path in (tmp_path / f"{NET}.features.pth", Path("/dev/zero"), tmp_path):
        with pytest.raises(WeightsNotFoundError, match="does not exist or is no file"):
            read_state_dict(path)
    with pytest.raises(WeightsNotFoundError, match="is no file"):
        load_trunk_weights(NET, tmp_path / f"{NET}.features.pth")
    torch.save(features, tmp_path / f"{NET}.pth")
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path))
    assert_same(load_trunk_weights(NET), features)  # the pipe is passed over


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "loop/x.pth"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(WeightsNotFoundError, match="does not exist"):
        load_trunk_weights(NET, tmp_path / name)


def test_sparse_file_of_a_terabyte(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        path = tmp_path / name
        path.touch()
        try:
            os.truncate(path, 1 << 40)
        except OSError:
            pytest.skip("no file of a terabyte on this file system")
        refused(path, "cannot be read as a checkpoint")


def test_random_damage_is_told_or_harmless(saved: Path, features: dict[str, Tensor]) -> None:
    """Flipped bytes in the archive's frame: an error in a sentence, or the values as they were."""
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        info = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    spans = [
        (info.header_offset, info.header_offset + info.file_size + 100),
        (whole.index(b"PK\x01\x02"), len(whole)),
    ]
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    told = 0
    for _ in range(150):
        content = bytearray(whole)
        start, end = dice.choice(spans)
        for _ in range(dice.choice((1, 1, 2, 8))):
            content[dice.randrange(start, end)] = dice.randrange(256)
        saved.write_bytes(content)
        try:
            loaded = load_trunk_weights(NET, saved)
        except WeightsError as error:
            told += 1
            assert str(saved) in str(error)
        else:
            assert loaded.keys() == features.keys()
    assert told > 50
