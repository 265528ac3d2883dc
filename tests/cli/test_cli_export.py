from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

import lpips_fast
from lpips_fast.cli import main
from lpips_fast.export.exported import load_exported
from lpips_fast.export.files import ExportError, write_whole

RANDOM = ("--random-trunk", "--net", "alex", "--layers", "0,1")


@pytest.fixture
def folder(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra images")
    generator = np.random.default_rng()
    photos = tmp_path / "photos"
    photos.mkdir()
    for k, size in enumerate([(40, 40), (64, 50), (40, 90)]):
        noise = generator.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
        image_module.fromarray(noise).resize(size).save(photos / f"{k}.png")
    return photos


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["export", "-o", *map(str, arguments)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_writes_a_file_and_checks_it(capsys, tmp_path):
    path = tmp_path / "m.pt2"
    code, out, _ = run(
        capsys, path, *RANDOM, "--size", "48x40", "--dynamic", "batch", "--unit-range", "--check"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{path}: torch.export, ")
    assert "random trunk, not LPIPS: LPIPS alex" in lines[1]
    assert lines[2] == (
        "  in0, in1: float32 (batch, 3, 40, 48) in [0, 1] -> distance: float32 (batch,)"
    )
    assert lines[3].startswith("  checked: at most ")
    record = load_exported(path).record
    assert (record.normalize, record.image_size) == (True, (40, 48))


def test_maps(capsys, tmp_path):
    code, out, _ = run(capsys, tmp_path / "m.ts", *RANDOM, "--spatial", "--format", "torchscript")
    assert code == 0
    assert "distance_map: float32 (batch, 1, height, width)" in out
    image = torch.zeros(1, 3, 50, 40)
    assert load_exported(tmp_path / "m.ts")(image, image).shape == (1, 1, 50, 40)


def test_check_fails_beyond_its_tolerance(capsys, tmp_path):
    code, out, err = run(capsys, tmp_path / "m.ts", *RANDOM, "--check", "--tolerance", "-1")
    assert code == 1
    assert out == ""
    assert "from the model, expected at most -1" in err.splitlines()[-1]


@pytest.mark.export_runtime("export")
def test_int8(capsys, tmp_path, folder):
    path = tmp_path / "m.onnx"
    code, out, _ = run(
        capsys,
        path,
        *RANDOM,
        "--size",
        "40",
        "--dynamic",
        "none",
        "--int8",
        "--calibration",
        folder,
    )
    assert code == 0
    assert "int8 (static): " in out
    assert "42 pairs of the calibration images" in out
    assert load_exported(path).record.quantized


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m.onnx", "--int8"], "give both or neither"),
        (["m.onnx", "--calibration", "."], "give both or neither"),
        (["m.onnx", "--int8", "--calibration", "missing"], "missing does not exist"),
        (["m.onnx", "--int8", "--calibration", "empty"], "empty holds no images"),
        (["m.ts", "--int8", "--calibration", "."], "writes onnx and openvino, not torchscript"),
        (["m.mlpackage", "--check"], "runs on Apple devices alone"),
        (["m.h5"], "does not say its format by its suffix"),
        (["missing/m.ts", *RANDOM], "its folder does not exist"),
        (["m.ts", *RANDOM, "--size", "10"], "needs at least 15x15"),
    ],
)
def test_bad_input_is_told_in_one_sentence(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert says in err.splitlines()[-1]
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("arguments", [["m.onnx", "--format", "tflite"], ["m.ts", "--size", "x"]])
def test_wrong_command_lines(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    assert stopped.value.code == 2


def test_an_export_that_fails_leaves_what_was_there(capsys, tmp_path, monkeypatch):
    path = tmp_path / "m.ts"
    path.write_text("before")

    def refuse(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    code, _, err = run(capsys, path, *RANDOM)
    assert code == 1
    assert err.splitlines()[-1].endswith(f"cannot write {path}: No space left on device")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["m.ts"]


def test_an_export_takes_the_place_of_what_a_link_leads_to(capsys, tmp_path):
    (tmp_path / "real.ts").write_text("before")
    (tmp_path / "m.ts").symlink_to("real.ts")
    assert run(capsys, tmp_path / "m.ts", *RANDOM)[0] == 0
    assert (tmp_path / "m.ts").is_symlink()
    assert load_exported(tmp_path / "real.ts").record.net == "alex"


def test_exports_to_what_is_no_file(capsys, tmp_path):
    (tmp_path / "m.ts").mkdir()
    (tmp_path / "null.pt2").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.ts")
    (tmp_path / "m.mlpackage").touch()
    for name in ("m.ts", "null.pt2", "pipe.ts", "m.mlpackage"):
        code, _, err = run(capsys, tmp_path / name, *RANDOM)
        assert code == 1 and "what has this name is not a" in err.splitlines()[-1]
    with pytest.raises(ExportError, match="is not a regular file"):
        load_exported(tmp_path / "pipe.ts")


def test_an_export_whose_folder_vanishes(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"m\.ts: its folder has gone"):
        write_whole(tmp_path / "gone" / "m.ts", b"")


def test_an_export_never_overwrites_the_checkpoint(capsys, tmp_path):
    torch.save(lpips_fast.LPIPS(pnet_rand=True, verbose=False).state_dict(), tmp_path / "c.pth")
    os.link(tmp_path / "c.pth", tmp_path / "m.ts")
    code, _, err = run(capsys, tmp_path / "m.ts", "--checkpoint", tmp_path / "c.pth")
    assert code == 1 and "c.pth, which is read: name another file" in err.splitlines()[-1]
