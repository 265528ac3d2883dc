"""Reading judgements: what comes back, in which order, and what is said of broken data sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lpips_fast.images.reading import ImageError
from lpips_fast.judgements.datasets import JNDDataset, JudgementsError, TwoAFCDataset, load_batches

Image = pytest.importorskip("PIL.Image", reason="judgements are read with Pillow")

KINDS = pytest.mark.parametrize("kind", [TwoAFCDataset, JNDDataset])


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def pixels(rng: np.random.Generator, height: int = 64, width: int = 64) -> np.ndarray:
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def write(
    kind: Any, folder: Path, rng: np.random.Generator, count: int = 3, **size: int
) -> list[tuple[float, dict[str, np.ndarray]]]:
    written = []
    for k in range(count):
        images = {part: pixels(rng, **size) for part in kind.IMAGES}
        fraction = float(np.float32(rng.random()))
        kind.write(folder, f"{k:06d}", fraction, **images)
        written.append((fraction, images))
    return written


# ---------------------------------------------------------------------------- what is read


@KINDS
def test_what_was_written_is_read(kind: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    written = write(kind, tmp_path / "cnn", rng)
    dataset = kind(tmp_path / "cnn")
    assert len(dataset) == 3
    assert dataset.names == ["cnn/000000", "cnn/000001", "cnn/000002"]
    for item, (fraction, images) in zip(dataset, written):
        assert item.keys() == {*kind.IMAGES, kind.JUDGEMENT}
        assert item[kind.JUDGEMENT].shape == ()
        assert item[kind.JUDGEMENT].item() == fraction
        for part, image in images.items():
            expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
            torch.testing.assert_close(item[part], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(256, 256), (100, 75), (48, 64), (64, 91)])
def test_resized_as_the_original(
    reference: ModuleType, tmp_path: Path, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    from torchvision import transforms

    del reference  # it makes torchvision importable
    write(JNDDataset, tmp_path, rng, 1, height=shape[0], width=shape[1])
    original = transforms.Compose(
        [transforms.Resize(64), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    expected = original(Image.open(tmp_path / "p0" / "000000.png").convert("RGB"))
    torch.testing.assert_close(JNDDataset(tmp_path)[0]["p0"], expected, rtol=0, atol=1e-6)
    assert JNDDataset(tmp_path, size=None)[0]["p0"].shape[1:] == shape
    assert min(JNDDataset(tmp_path, size=32)[0]["p0"].shape[1:]) == 32


def test_partners_are_found_by_name_whatever_their_suffix(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    write(JNDDataset, tmp_path, rng, 2)
    image = pixels(rng)
    (tmp_path / "p1" / "000001.png").unlink()
    Image.fromarray(image).save(tmp_path / "p1" / "000001.BMP")
    (tmp_path / "p1" / ".hidden.png").write_bytes(b"")
    (tmp_path / "p1" / "Thumbs.db").write_bytes(b"")
    dataset = JNDDataset(tmp_path)
    assert len(dataset) == 2
    expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(dataset[1]["p1"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("array", [0.25, [0.25], [[0.25]], np.float64(0.25), np.float16(0.25)])
def test_judgements_of_any_shape_with_one_number(
    tmp_path: Path, rng: np.random.Generator, array: Any
) -> None:
    write(JNDDataset, tmp_path, rng, 1)
    np.save(tmp_path / "same" / "000000.npy", array)
    same = JNDDataset(tmp_path)[0]["same"]
    assert (same.item(), same.dtype) == (0.25, torch.float32)


def test_several_sub_sets_as_one(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("cnn", "mix"):
        write(TwoAFCDataset, tmp_path / name, rng, 2)
    both = TwoAFCDataset([tmp_path / "mix", tmp_path / "cnn"])
    assert both.names == ["mix/000000", "mix/000001", "cnn/000000", "cnn/000001"]
    alone = TwoAFCDataset(tmp_path / "cnn")
    assert torch.equal(both[3]["ref"], alone[1]["ref"])
    assert both.fingerprint != alone.fingerprint
    assert alone.fingerprint == TwoAFCDataset(str(tmp_path / "cnn")).fingerprint


def test_find(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("2afc/val/cnn", "2afc/val/color", "2afc/train/mix"):
        write(TwoAFCDataset, tmp_path / name, rng, 1)
    write(JNDDataset, tmp_path / "jnd/val/cnn", rng, 1)
    (tmp_path / "2afc" / "circle").symlink_to(tmp_path)
    (tmp_path / "2afc" / "val" / "linked").symlink_to(tmp_path / "2afc" / "val" / "cnn")
    found = TwoAFCDataset.find(tmp_path / "2afc" / "val")
    assert list(found) == ["cnn", "color", "linked"]
    assert found["color"] == tmp_path / "2afc" / "val" / "color"
    assert list(TwoAFCDataset.find(found["cnn"])) == ["cnn"]
    assert list(JNDDataset.find(tmp_path / "jnd")) == ["val/cnn"]
    assert {"train/mix", "val/cnn"} <= TwoAFCDataset.find(tmp_path / "2afc").keys()
    assert len(TwoAFCDataset.open_all(tmp_path / "2afc" / "val", size=32)["cnn"]) == 1


# ---------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_any_order(tmp_path: Path, rng: np.random.Generator, workers: int) -> None:
    write(TwoAFCDataset, tmp_path, rng, 5)
    dataset = TwoAFCDataset(tmp_path)
    order = rng.permutation(5).tolist()
    before = torch.get_rng_state()
    batches = list(load_batches(dataset, 2, order=order, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch["judge"]) for batch in batches] == [2, 2, 1]
    for part in ("ref", "p0", "p1", "judge"):
        expected = torch.stack([dataset[k][part] for k in order])
        assert torch.equal(torch.cat([batch[part] for batch in batches]), expected)
    in_order = torch.cat([batch["judge"] for batch in load_batches(dataset, 3, workers=workers)])
    assert torch.equal(in_order, torch.stack([item["judge"] for item in dataset]))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_the_same_sentence(
    tmp_path: Path, rng: np.random.Generator, workers: int
) -> None:
    write(JNDDataset, tmp_path, rng, 2)
    (tmp_path / "p0" / "000001.png").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        list(load_batches(JNDDataset(tmp_path), 2, workers=workers))
    message = str(caught.value)
    assert "000001.png" in message and "\n" not in message


def test_a_batch_of_different_sizes(tmp_path: Path, rng: np.random.Generator) -> None:
    write(JNDDataset, tmp_path, rng, 1)
    JNDDataset.write(tmp_path, "wide", 0.5, p0=pixels(rng, 64, 80), p1=pixels(rng, 64, 80))
    with pytest.raises(JudgementsError, match="64x64 and 80x64 pixels in p0/"):
        list(load_batches(JNDDataset(tmp_path), 2))
    assert len(list(load_batches(JNDDataset(tmp_path), 1))) == 2


# ----------------------------------------------------------------------------------- errors


@KINDS
def test_a_missing_folder(kind: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    for part in (*kind.IMAGES, kind.JUDGEMENT):
        folder = tmp_path / part
        write(kind, folder, rng, 1)
        for file in (folder / part).iterdir():
            file.unlink()
        (folder / part).rmdir()
        with pytest.raises(JudgementsError, match=rf"{part} is missing; expected a folder of"):
            kind(folder)


@KINDS
def test_a_missing_partner(kind: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    for part in (*kind.IMAGES, kind.JUDGEMENT):
        folder = tmp_path / part
        write(kind, folder, rng, 3)
        next((folder / part).glob("000001.*")).unlink()
        with pytest.raises(JudgementsError, match=rf"/{part} has no partner for 000001\."):
            kind(folder)


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    for part in ("p0", "p1", "same"):
        (tmp_path / part).mkdir()
    with pytest.raises(JudgementsError, match="p0 holds no image"):
        JNDDataset(tmp_path)
    with pytest.raises(JudgementsError, match="holds judge/; expected the layout of BAPPS"):
        TwoAFCDataset.find(tmp_path)
    with pytest.raises(JudgementsError, match="nowhere is no folder"):
        TwoAFCDataset.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one folder"):
        JNDDataset([])
    with pytest.raises(ValueError, match="size is 0"):
        JNDDataset(tmp_path, size=0)


def test_two_files_of_one_name(tmp_path: Path, rng: np.random.Generator) -> None:
    write(JNDDataset, tmp_path, rng, 1)
    Image.fromarray(pixels(rng)).save(tmp_path / "p0" / "000000.jpg")
    with pytest.raises(JudgementsError, match=r"one name, 000000\.jpg and 000000\.png"):
        JNDDataset(tmp_path)


def test_images_that_differ_in_size(tmp_path: Path, rng: np.random.Generator) -> None:
    JNDDataset.write(tmp_path, "a", 0.5, p0=pixels(rng, 64, 64), p1=pixels(rng, 64, 70))
    with pytest.raises(JudgementsError, match=r"differ in size .*p0 64x64, p1 70x64"):
        JNDDataset(tmp_path)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .*000000.npy': the file is empty"),
        (b"not an array", "cannot read .*000000.npy as a NumPy array"),
        (np.array([{}], dtype=object), "cannot read .*000000.npy as a NumPy array"),
        (np.array([0.5, 0.5]), r"holds an array of shape \(2,\), expected one number"),
        (np.array(["half"]), "holds <U4, expected a number"),
        (np.array([1.5]), r"is 1.5, expected a fraction of people in \[0, 1\]"),
        (np.array([-1]), "is -1, expected a fraction"),
        (np.array([np.nan]), "is nan, expected a fraction"),
    ],
)
def test_broken_judgements(
    tmp_path: Path, rng: np.random.Generator, content: Any, message: str
) -> None:
    write(TwoAFCDataset, tmp_path, rng, 1)
    path = tmp_path / "judge" / "000000.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(JudgementsError, match=message) as caught:
        TwoAFCDataset(tmp_path)[0]
    assert "\n" not in str(caught.value)


def test_an_archive_for_a_judgement(tmp_path: Path, rng: np.random.Generator) -> None:
    write(JNDDataset, tmp_path, rng, 1)
    with (tmp_path / "same" / "000000.npy").open("wb") as file:
        np.savez(file, a=0.5)
    with pytest.raises(JudgementsError, match="holds an archive"):
        JNDDataset(tmp_path)[0]


def test_what_write_refuses(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="expected the images ref, p0, p1, got p0, p1"):
        TwoAFCDataset.write(tmp_path, "a", 0.5, p0=pixels(rng), p1=pixels(rng))
    with pytest.raises(JudgementsError, match="the judgement of a is 2"):
        JNDDataset.write(tmp_path, "a", 2, p0=pixels(rng), p1=pixels(rng))
    assert not list(tmp_path.iterdir())


def test_a_missing_pillow_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    write(JNDDataset, tmp_path, rng, 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"lpips-fast\[images\]"):
        list(load_batches(JNDDataset(tmp_path), 1))
    with pytest.raises(ImportError, match=r"lpips-fast\[images\]"):
        JNDDataset.write(tmp_path, "b", 0.5, p0=pixels(rng), p1=pixels(rng))


HUGE = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "it is a pipe, expected a NumPy array"),
        (os.mkdir, "it is a folder, expected a NumPy array"),
        (lambda path: path.symlink_to("nowhere"), "no such file, only a link to one"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, expected a NumPy array"),
        (
            lambda path: (path.touch(), os.truncate(path, 2**40)),
            "the file has 1,099,511,627,776 bytes, and one number needs no more than 65,536",
        ),
        (
            lambda path: path.write_bytes((HUGE % b"1000000000000").ljust(127) + b"\n"),
            r"holds an array of shape \(1000000000000,\), expected one number",
        ),
        (
            lambda path: path.write_bytes((HUGE % b"alse, 'a': (").ljust(127) + b"\n"),
            "as a NumPy array: ",
        ),
        (lambda path: path.write_bytes(b"\x93NUMPY\x03\x00"), "version 3.0, expected 1.0 or 2.0"),
    ],
)
def test_what_is_no_judgement_is_told_and_not_waited_for(
    tmp_path: Path, rng: np.random.Generator, make: Any, message: str
) -> None:
    write(TwoAFCDataset, tmp_path, rng, 1)
    path = tmp_path / "judge" / "000000.npy"
    path.unlink()
    make(path)
    with pytest.raises(JudgementsError, match=message):
        TwoAFCDataset(tmp_path)[0]


def test_a_judgement_that_vanishes(tmp_path: Path, rng: np.random.Generator) -> None:
    write(TwoAFCDataset, tmp_path, rng, 2)
    dataset = TwoAFCDataset(tmp_path)
    (tmp_path / "judge" / "000001.npy").unlink()
    with pytest.raises(JudgementsError, match=r"000001\.npy': no such file"):
        list(load_batches(dataset, 1, workers=1))
