"""``lpips-fast dirs``: its file, what it says, and every way in which a run can be interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from image_folders import (
    call,
    make_folders,
    random_pixels,
    rows_of,
    settings_of,
    start,
    write_png,
)

import lpips_fast

pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")

RANDOM = "--random-trunk"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_folders(tmp_path, [f"{i}.png" for i in range(12)])


# ------------------------------------------------------------------------------- the file


def test_the_file_says_how_it_was_made(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", output, RANDOM, "--resize", "48", "--crop", "40x36") == 0
    facts = settings_of(output)
    expected = {
        "lpips-fast": lpips_fast.__version__,
        "torch": torch.__version__,
        "metric": "LPIPS",
        "net": "alex",
        "version": "0.1",
        "dtype": "float32",
        "device": "cpu",
        "batch": "16",
        "resize": "shorter side to 48, Pillow bicubic",
        "crop": "centre 40x36",
        "alpha": "white",
        "folder A": str(folders[0]),
        "folder B": str(folders[1]),
        "sub-folders": "no",
        "paired by": "name",
    }
    assert {key: facts.get(key) for key in expected} == expected
    assert facts["weights of alex"].startswith("random, not LPIPS, SHA-256 of its convolutions ")
    rows = [row.split(",") for row in rows_of(output)]
    assert [name for name, _, _ in rows] == [f"{i}.png" for i in range(12)]
    values = [float(distance) for _, distance, _ in rows]
    last = json.loads(Path(f"{output}.jsonl").read_text().splitlines()[-1])["summary"]
    summary = last["columns"][""]["distance"]
    assert (last["pairs"], last["failed"], summary["count"]) == (12, 0, 12)
    assert summary["mean"] == pytest.approx(statistics.mean(values), abs=1e-8)
    assert summary["standard_error"] == pytest.approx(statistics.stdev(values) / 12**0.5, abs=1e-8)
    assert summary["median"] == pytest.approx(statistics.median(values), abs=1e-8)
    out, err = capsys.readouterr()
    assert out.startswith(
        f"Mean: {statistics.mean(values):.6f} ± {statistics.stdev(values) / 12**0.5:.6f} "
        "(standard error), 12 pairs\n"
    )
    assert str(output) in out and "random trunk, not LPIPS" in out
    assert err.count("\n") == 1 and "these numbers are not LPIPS" in err


def test_weights_are_named_and_told_apart_by_a_digest(
    folders: tuple[Path, Path],
    tmp_path: Path,
    real_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(real_weights))
    assert call("dirs", *folders, "-o", tmp_path / "real.csv") == 0
    line = settings_of(tmp_path / "real.csv")["weights of alex"]
    location = lpips_fast.weights.locate_trunk_weights("alex")
    assert location is not None and location.path.name in line
    capsys.readouterr()
    code = call("dirs", *folders, "-o", tmp_path / "real.csv", RANDOM)
    err = capsys.readouterr().err
    assert code == 1
    assert "was made in another way: weights of alex is" in err and "there and random, not" in err


def test_distances_are_those_of_pair(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (RANDOM, "--net", "squeeze", "--lpips-version", "0.0")
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", *options) == 0
    for row in rows_of(tmp_path / "out.csv")[::5]:
        name, distance, _ = row.split(",")
        capsys.readouterr()
        assert call(folders[0] / name, folders[1] / name, *options, "--json") == 0
        single = json.loads(capsys.readouterr().out)["distance"]
        assert float(distance) == pytest.approx(single, rel=1e-5)


def test_all_nets_in_three_columns(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = folders[0] / "3.png", folders[1] / "3.png"
    for path in small:  # alex needs 31x31
        write_png(path, random_pixels(20, 24, torch.Generator().manual_seed(1)))
    output = tmp_path / "all.csv"
    assert call("dirs", *folders, "-o", output, RANDOM, "--net", "all", "--json") == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "name,distance_alex,distance_vgg,distance_squeeze,error\n" in output.read_text()
    results = {net: report["results"][f"distance_{net}"] for net in ("alex", "vgg", "squeeze")}
    assert [result["count"] for result in results.values()] == [11, 12, 12]
    reason = "24x20 pixels are too small for trunk 'alex', which needs 31x31"
    assert report["failed"] == [{"name": "3.png", "error": reason}]
    assert f"warning: 3.png: {reason}\n" in err
    rows = [row.split(",") for row in rows_of(output)]
    for i, net in enumerate(("alex", "vgg", "squeeze")):
        values = [float(row[1 + i]) for row in rows if row[1 + i]]
        assert results[net]["mean"] == pytest.approx(statistics.mean(values))
    assert call("dirs", *folders, "-o", tmp_path / "vgg.csv", RANDOM, "--net", "vgg") == 0
    assert [row.split(",")[1] for row in rows_of(tmp_path / "vgg.csv")] == [row[2] for row in rows]
    assert report["settings"]["net"] == "alex, vgg, squeeze"


def test_the_number_of_workers_does_not_matter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for workers in (1, 3):
        path = tmp_path / f"{workers}.csv"
        assert call("dirs", *folders, "-o", path, RANDOM, "--workers", workers) == 0
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()


NAMES = ["two words.png", "Übergröße.png", "画像 $5.png", "#1.png", 'a,b "c".png', "new\nline.png"]


def test_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_folders(tmp_path / "Bilder – 画像", NAMES)
    (b / NAMES[2]).write_bytes(b"")
    output = tmp_path / "Größe 1.csv"
    capsys.readouterr()
    assert call("dirs", a, b, "-o", output, RANDOM, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"][0]["name"] == NAMES[2]
    assert f"{NAMES[2]}: cannot read '{b}/{NAMES[2]}': the file is empty" in err
    import csv

    read = list(csv.reader(io.StringIO(output.read_bytes().decode(), newline="")))
    assert {fields[0] for fields in read[1:]} == set(NAMES)
    whole = output.read_bytes()
    assert call("dirs", a, b, "-o", output, RANDOM) == 1
    assert output.read_bytes() == whole


# ------------------------------------------------------------------------------- pairing


def test_what_has_no_partner_is_told(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    for i in range(7):
        (b / f"{i}.png").unlink()
    (b / "new.jpg").write_bytes(b"")
    (b / "6.webp").write_bytes(b"")
    (a / "notes.txt").write_text("")
    assert call("dirs", a, b, "-o", tmp_path / "out.csv", RANDOM, "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["only_in_a"] == [f"{i}.png" for i in range(7)]
    assert report["only_in_b"] == ["6.webp", "new.jpg"]
    assert report["passed_over"] == ["notes.txt"]
    assert report["results"]["distance"]["count"] == 5
    assert "0.png, 1.png, 2.png, 3.png, 4.png, and 2 more" in err
    assert "6.webp, new.jpg" in err and "notes.txt" in err
    assert "1 would pair but for their suffixes: --match stem" in err


def test_sub_folders(tmp_path: Path) -> None:
    a, b = make_folders(tmp_path, ["1.png", "x/1.png", "x/y/10.png", "x/y/9.png"])
    output = tmp_path / "out.csv"
    assert call("dirs", a, b, "-o", output, RANDOM, "--recursive") == 0
    names = [row.split(",")[0] for row in rows_of(output)]
    assert names == ["1.png", "x/1.png", "x/y/9.png", "x/y/10.png"]


def test_equal_but_for_the_suffix(tmp_path: Path) -> None:
    a, b = make_folders(tmp_path, ["1.png", "2.png"])
    (b / "2.png").rename(b / "2.bmp.png")
    (b / "2.bmp.png").rename(b / "2.PNG")
    output = tmp_path / "out.csv"
    assert call("dirs", a, b, "-o", output, RANDOM, "--match", "stem") == 0
    assert len(rows_of(output)) == 2


# ------------------------------------------------------------------------------- failures


def assert_failed(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert (code, out) == (1, "")
    assert last.startswith("lpips-fast: error: ") and "Traceback" not in err
    for part in parts:
        assert part in last


def test_broken_files_are_rows_and_the_rest_goes_on(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", tmp_path / "sound.csv", RANDOM) == 0
    content = (folders[1] / "5.png").read_bytes()
    (folders[1] / "5.png").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert call("dirs", *folders, "-o", output, RANDOM) == 1
    out, err = capsys.readouterr()
    assert "11 pairs\n" in out
    assert "warning: 5.png: cannot read" in err
    assert err.splitlines()[-1] == (
        f"lpips-fast: error: 1 of 12 pairs could not be measured: see the column error of {output}"
    )
    rows, sound = rows_of(output), rows_of(tmp_path / "sound.csv")
    assert rows[5].startswith("5.png,,cannot read '") and "damaged or cut short" in rows[5]
    assert [r for i, r in enumerate(rows) if i != 5] == [r for i, r in enumerate(sound) if i != 5]


def test_many_broken_files_are_not_all_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("A", "B"):
        (tmp_path / folder).mkdir()
        for i in range(30):
            (tmp_path / folder / f"{i}.png").write_bytes(b"")
    output = tmp_path / "out.csv"
    assert call("dirs", tmp_path / "A", tmp_path / "B", "-o", output, RANDOM) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Mean: none, 0 pairs\n")
    assert err.count("the file is empty") == 20 and "and 10 failures more" in err
    assert sum("the file is empty" in row for row in rows_of(output)) == 30


def test_a_folder_that_vanishes_ends_the_run_and_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_folders(tmp_path, [f"{i}.png" for i in range(70)])
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    arguments = ("dirs", a, b, RANDOM, "--workers", 1)
    assert call(*arguments, "-o", whole) == 0
    append = lpips_fast.folders.results.ResultFile.append

    def append_and_unmount(self, *rows):
        append(self, *rows)
        if self.done == 5:
            b.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(lpips_fast.folders.results.ResultFile, "append", append_and_unmount)
        capsys.readouterr()
        code = call(*arguments, "-o", output)
    assert_failed(
        capsys, code, f"the folder {b} is gone", "of 70 rows are in", "goes on from there"
    )
    assert 5 <= len(rows_of(output)) < 70
    (tmp_path / "elsewhere").rename(b)
    assert call(*arguments, "-o", output) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--net", "squeeze"), "net is alex there and squeeze here"),
        (("--crop", "32x32"), "crop is none there and centre 32x32 here"),
        (("--resize", "32"), "resize is none there and shorter side to 32, Pillow bicubic here"),
        (("--alpha", "drop"), "alpha is white there and drop here"),
        (("--baseline",), "metric is LPIPS there and baseline"),
        (("--batch", "3"), "batch is 16 there and 3 here"),
    ],
)
def test_a_file_of_another_run_is_refused(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, ...],
    message: str,
) -> None:
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", output, RANDOM) == 0
    before = output.read_bytes()
    capsys.readouterr()
    code = call("dirs", *folders, "-o", output, RANDOM, *change)
    assert_failed(capsys, code, message, "--overwrite")
    assert output.read_bytes() == before
    settings = settings_of(output)
    assert call("dirs", *folders, "-o", output, RANDOM, *change, "--overwrite") == 0
    assert settings_of(output) != settings


def test_a_pair_more_is_measured_with_what_shares_its_batches(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", output, RANDOM) == 0
    for folder in folders:
        shutil.copy(folder / "0.png", folder / "12.png")
    capsys.readouterr()
    assert call("dirs", *folders, "-o", output, RANDOM) == 0
    err = capsys.readouterr().err
    assert "note: new: 12.png\n" in err and "note: going on with 12 of 13 rows" in err
    assert call("dirs", *folders, "-o", tmp_path / "fresh.csv", RANDOM) == 0
    assert output.read_bytes() == (tmp_path / "fresh.csv").read_bytes()


def test_nothing_to_do(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out.csv"
    code = call("dirs", folders[0], tmp_path / "empty", "-o", output, RANDOM)
    assert_failed(capsys, code, "have no image in common; see --recursive")
    code = call("dirs", folders[0], tmp_path / "gone", "-o", output, RANDOM)
    assert_failed(capsys, code, "gone does not exist, expected a folder of images")
    code = call("dirs", *folders, "-o", tmp_path / "gone" / "out.csv", RANDOM)
    assert_failed(capsys, code, "its folder does not exist")
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: -o/--output"),
        (["--pairs", "x.csv", "C"], "folders and --pairs exclude each other"),
        (["--match", "{}.png"], "is not name, stem or two patterns such as {}_gt.png {}_pred.jpg"),
        (["--match", "{}.png", "{}{}.jpg"], "holds {} 2 times, expected once"),
        (["--metrics", "lpips,fid"], "are no metrics: choose from lpips,psnr,ssim"),
        (["--metrics", "psnr", "--per-layer"], "--per-layer lists the layers of lpips"),
        (["--json", "--table", "latex"], "--json and --table exclude each other"),
        (["-o", "out.json"], "'out.json' does not end in .csv, which is what is written"),
        (["-o", "-", "--json"], "with -o - the rows are on standard output: leave out --json"),
        (["-o", "-", "--overwrite"], "leave out --overwrite"),
        (["--net", "resnet"], "invalid choice: 'resnet'"),
        (["--resize", "0"], "'0' is not a size such as 256x256 or 256"),
        (["--resize", "256x"], "'256x' is not a size such as 256x256 or 256"),
        (["--crop", "256"], "'256' is not a size such as 256x256"),
        (["--batch", "0"], "'0' is not a number from 1"),
        (["--workers", "-1"], "'-1' is not a number from 1"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    positional = ["A", "B", "-o", "out.csv"] if arguments else []
    assert call("dirs", *positional, *arguments) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------- interruptions

# The command line, slowed down so that there is time to interrupt it, and listening to Ctrl-C even
# where the tests themselves run in the background, whose children a shell tells to ignore it.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from lpips_fast import cli
from lpips_fast.folders import evaluating
measure = evaluating.Evaluation.measure
def slow(self, pairs):
    time.sleep(0.1)
    return measure(self, pairs)
evaluating.Evaluation.measure = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def wait_for_rows(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b".png,") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no rows came"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_rows_and_the_run_goes_on_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    a, b = make_folders(tmp_path, [f"{i}.png" for i in range(200)])
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert call("dirs", a, b, RANDOM, "-o", whole) == 0
    process = start("dirs", a, b, RANDOM, "-o", output, program=("-c", SLOW))
    try:
        wait_for_rows(output, 10, process)
        # Meanwhile a second run on the same file is refused, and changes nothing.
        capsys.readouterr()
        second = call("dirs", a, b, RANDOM, "-o", output, "--overwrite")
        assert_failed(capsys, second, f"another run is writing to {output}")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, "")
    written = rows_of(output)
    assert 10 <= len(written) < 200
    assert err.splitlines()[-1] == (
        f"lpips-fast: note: stopped; {len(written)} of 200 rows are in {output}, and the same "
        "command goes on from there"
    )
    assert whole.read_bytes().startswith(output.read_bytes())
    assert call("dirs", a, b, RANDOM, "-o", output) == 0
    assert f"going on with {len(written)} of 200 rows" in capsys.readouterr().err
    assert output.read_bytes() == whole.read_bytes()


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    # Enough for chunks of several pairs, so that the file may end within one.
    folders = make_folders(tmp_path, [f"{i}.png" for i in range(200)], sizes=[(32, 32)])
    output = tmp_path / "out.csv"
    arguments = ("dirs", *folders, "-o", output, "--random-trunk", "--net", "squeeze")
    assert call(*arguments) == 0
    whole = output.read_bytes()
    record_path = tmp_path / "out.csv.jsonl"
    record = record_path.read_bytes()
    for _ in range(4):
        # What a kill leaves: the record is at least as far as the CSV.
        length = random.randrange(len(record))
        done = max(0, record[:length].count(b"\n") - 1)
        lines = whole.splitlines(keepends=True)
        csv = b"".join(lines[: 1 + random.randint(0, done)])
        record_path.write_bytes(record[:length])
        output.write_bytes(csv if b"\n" in record[:length] else b"")
        assert call(*arguments) == 0
        assert output.read_bytes() == whole, f"record cut after {length} bytes, CSV {len(csv)}"


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own, with so many bytes."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options]).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as under a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", ["disk", "quota"])
def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    a, b = make_folders(tmp_path, [f"{i:040}.png" for i in range(130)], sizes=[(32, 32)])
    whole, disk = tmp_path / "whole.csv", tmp_path / "disk"
    output = disk / "out.csv"
    assert call("dirs", a, b, RANDOM, "-o", whole) == 0
    with contextlib.ExitStack() as stack:
        if limit == "disk":
            stack.enter_context(small_disk(disk, 32 * 1024))
        else:
            disk.mkdir()
        capsys.readouterr()
        with small_files(24 * 1024) if limit == "quota" else contextlib.nullcontext():
            code = call("dirs", a, b, RANDOM, "-o", output)
        reason = "No space left on device" if limit == "disk" else "File too large"
        done = len(rows_of(output))
        assert 20 < done < 130
        assert_failed(
            capsys,
            code,
            f"cannot write {output}.jsonl: {reason}; the {done} rows of {output} are whole, and "
            "the same command goes on from there",
        )
        assert whole.read_bytes().startswith(output.read_bytes())
        assert output.read_bytes().endswith(b",\n")
        if limit == "disk":
            subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert call("dirs", a, b, RANDOM, "-o", output) == 0
        assert output.read_bytes() == whole.read_bytes()


# ------------------------------------------------------------------------------- several metrics


def read_csv(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_metrics_in_one_run(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    shutil.copy(folders[0] / "3.png", folders[1] / "3.png")
    options = (RANDOM, "--metrics", "ssim,lpips,psnr", "--per-layer")
    assert call("dirs", *folders, "-o", output, *options, "--json") == 0
    rows = read_csv(output)
    layers = [f"distance_relu{k}" for k in range(1, 6)]
    assert list(rows[0]) == ["name", "ssim", "distance", *layers, "psnr", "error"]
    for row in rows[::4]:
        parts = [float(row[layer]) for layer in layers]
        assert sum(parts) == pytest.approx(float(row["distance"]), abs=5e-8)
        images = [lpips_fast.images.read_image(folder / row["name"]).double() for folder in folders]
        values = [((image + 1) * 127.5).round() for image in images]
        ssim = lpips_fast.fidelity.ssim(*values, data_range=255).item()
        psnr = lpips_fast.fidelity.psnr(*values, data_range=255).item()
        assert float(row["ssim"]) == pytest.approx(ssim, abs=1e-6)
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-5)
    same = rows[3]
    assert (same["ssim"], same["psnr"], same["distance"]) == ("1.00000000", "inf", "0.00000000")
    report = json.loads(capsys.readouterr().out)
    assert report["results"]["psnr"]["mean"] is None and report["results"]["psnr"]["infinite"] == 1
    assert report["results"]["ssim"]["count"] == 12
    assert call("dirs", *folders, "-o", output, *options) == 0
    out, err = capsys.readouterr()
    assert "Mean psnr: inf (identical: 1), 12 pairs" in out
    assert "note: nothing to do: all 12 rows are there, and no image changed" in err


def test_without_lpips_no_trunk_is_needed(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lpips_fast.cli.dirs.load_model", load)
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", "--metrics", "psnr") == 0


def test_several_folders_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gt, one = make_folders(tmp_path / "1", [f"{i}.png" for i in range(4)], sizes=[(40, 40)])
    two = tmp_path / "two_%"
    shutil.copytree(gt, two)
    output = tmp_path / "out.csv"
    arguments = ("dirs", gt, "-o", output, one, two, RANDOM, "--metrics", "lpips,psnr,ssim")
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["results"]) == ["B", "two_%"]
    rows = read_csv(output)
    assert [(row["name"], row["folder"]) for row in rows[:2]] == [
        ("0.png", "B"),
        ("0.png", "two_%"),
    ]
    distances = [float(row["distance"]) for row in rows if row["folder"] == "B"]
    difference = report["differences"]["two_%"]["distance"]
    assert difference["mean"] == pytest.approx(-statistics.mean(distances))
    assert difference["standard_error"] == pytest.approx(statistics.stdev(distances) / 2)
    assert report["differences"]["reference"] == "B"
    assert call(*arguments, "--table", "markdown") == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    assert lines[0][1:-1] == ["", "distance (alex) ↓", "PSNR ↑", "SSIM ↑", "pairs"]
    mean = statistics.mean(distances)
    assert lines[2][1] == "B" and lines[2][2].startswith(f"{mean:.4f} ± ")
    assert lines[3][1:] == [
        *("two\\_%", "**0.0000 ± 0.0000**", "**inf**", "**1.0000 ± 0.0000**", "4", "")
    ]
    assert lines[5][1] == "paired difference" and lines[7][1] == "two\\_% − B"
    assert lines[7][2].startswith(f"-{mean:.4f} ± ") and lines[7][3] == "—"
    assert call(*arguments, "--table", "latex") == 0
    out = capsys.readouterr().out
    assert out.startswith("\\begin{tabular}{lrrrr}\n\\toprule\n & distance (alex) $\\downarrow$ & ")
    assert "two\\_\\% & \\textbf{0.0000 $\\pm$ 0.0000} & \\textbf{inf}" in out


def test_rows_on_standard_output(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", RANDOM) == 0
    capsys.readouterr()
    assert call("dirs", *folders, "-o", "-", RANDOM) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "out.csv").read_text()
    assert "Mean: " in err and list(tmp_path.glob("-*")) == []


def test_listed_pairs_and_patterns(tmp_path: Path) -> None:
    a, b = make_folders(tmp_path, ["1.png", "2.png"])
    assert call("dirs", a, b, "-o", tmp_path / "names.csv", RANDOM) == 0
    (tmp_path / "pairs.csv").write_text("a,b\nA/1.png,B/1.png\nA/2.png,B/2.png\n")
    assert call("dirs", "--pairs", tmp_path / "pairs.csv", "-o", tmp_path / "l.csv", RANDOM) == 0
    for name in ("1", "2"):
        (a / f"{name}.png").rename(a / f"{name}_gt.png")
        (b / f"{name}.png").rename(b / f"{name}_pred.png")
    patterns = ("--match", "{}_gt.png", "{}_pred.png")
    assert call("dirs", *patterns, a, b, "-o", tmp_path / "p.csv", RANDOM) == 0
    numbers = [
        [row["distance"] for row in read_csv(tmp_path / f"{k}.csv")] for k in ("names", "l", "p")
    ]
    assert numbers[0] == numbers[1] == numbers[2]


def test_learned_weights_are_used(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    with torch.no_grad():
        for lin in model.lins:
            lin.model[-1].weight.mul_(2)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", output, "--checkpoint", tmp_path / "model.pth") == 0
    images = [lpips_fast.images.read_image(folder / "0.png") for folder in folders]
    with torch.no_grad():
        expected = model(*images).item()
    assert float(rows_of(output)[0].split(",")[1]) == pytest.approx(expected, rel=1e-5)
    assert "model.pth, SHA-256 of its linear weights" in settings_of(output)["weights of alex"]


# ------------------------------------------------------------------------------- foreign files


def test_what_is_no_file_is_a_row_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{i}.png" for i in range(8)]
    a, b = make_folders(tmp_path, names, sizes=[(32, 32)])
    for name in names[1:]:
        (a / name).unlink()
    os.mkfifo(a / "1.png")
    (a / "2.png").mkdir()
    (a / "3.png").symlink_to("3.png")
    (a / "4.png").symlink_to("nowhere")
    (a / "5.png").symlink_to("/dev/zero")
    (a / "6.png").touch()
    os.truncate(a / "6.png", 2**40)
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(a)  # a socket's path is short
        server.bind("7.png")
        os.chdir(before)
        output = tmp_path / "out.csv"
        assert call("dirs", a, b, "-o", output, RANDOM) == 1
    rows = read_csv(output)
    assert float(rows[0]["distance"]) > 0
    reasons = [
        "it is a pipe, expected an image file",
        "it is a folder, expected an image file",
        "Too many levels of symbolic links",
        "no such file, only a link to one",
        "it is a device, expected an image file",
        "the file has 1,099,511,627,776 bytes, and no image within the limit of pixels needs more",
        "it is a socket, expected an image file",
    ]
    for row, reason in zip(rows[1:], reasons, strict=True):
        assert row["distance"] == "" and reason in row["error"]


def test_too_many_pixels_are_a_row(folders: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    write_png(folders[0] / "3.png", random_pixels(70, 70, torch.Generator()))
    assert call("dirs", *folders, "-o", output, RANDOM, "--max-pixels", 64 * 48) == 1
    errors = [row["error"] for row in read_csv(output)]
    assert "it declares 70x70 pixels, more than the limit of 3,072" in errors[3]
    assert errors[:3] == [""] * 3 and errors[4:] == [""] * 8


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you")],
)
def test_no_memory_for_a_pair_is_a_row(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    write_png(folders[0] / "3.png", random_pixels(80, 90, torch.Generator()))
    write_png(folders[1] / "3.png", random_pixels(80, 90, torch.Generator()))
    forward = lpips_fast.LPIPS.forward

    def refuse(self, in0, *arguments, **options):
        if in0.shape[-1] == 90:
            raise error
        return forward(self, in0, *arguments, **options)

    monkeypatch.setattr(lpips_fast.LPIPS, "forward", refuse)
    output = tmp_path / "out.csv"
    assert call("dirs", *folders, "-o", output, RANDOM) == 1
    rows = read_csv(output)
    assert f"no memory to measure 90x80 pixels: '{folders[0]}/3.png'" in rows[3]["error"]
    assert all(row["distance"] for k, row in enumerate(rows) if k != 3)


def test_an_input_is_never_an_output(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = folders[0] / "0.png"
    before = image.read_bytes()
    assert call("dirs", *folders, "-o", image, RANDOM, "--overwrite") == 2
    assert "does not end in .csv" in capsys.readouterr().err
    for output in ("link.csv", "hard.csv"):
        path = tmp_path / output
        path.symlink_to(image) if output == "link.csv" else os.link(image, path)
        code = call("dirs", *folders, "-o", path, RANDOM, "--overwrite")
        assert_failed(
            capsys, code, f"{path} would overwrite {image}, which is read: name another file"
        )
    os.link(image, tmp_path / "out.csv.jsonl")
    code = call("dirs", *folders, "-o", tmp_path / "out.csv", RANDOM, "--overwrite")
    assert_failed(capsys, code, "out.csv.jsonl would overwrite ", "which is read")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b\nA/1.png,B/1.png\n")
    code = call("dirs", "--pairs", pairs, "-o", pairs, RANDOM, "--overwrite")
    assert_failed(capsys, code, "pairs.csv, which is read")
    assert image.read_bytes() == before and pairs.read_text().startswith("a,b")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_standard_output_that_is_full(folders: tuple[Path, Path], tmp_path: Path) -> None:
    commands = [
        ("dirs", *folders, "-o", "-", RANDOM),
        ("dirs", *folders, "-o", tmp_path / "out.csv", RANDOM, "--json"),
        ("pair", folders[0] / "0.png", folders[1] / "0.png", RANDOM),
    ]
    for command in commands:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "lpips_fast", *map(str, command)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            "lpips-fast: error: cannot write to standard output: No space left on device"
        )


# The command line, whose threads are busy for a minute and whose main thread waits for them.
STUCK = """
import sys, time
from lpips_fast import cli
from lpips_fast.folders import evaluating
def stuck(self, pairs):
    print("stuck", file=sys.stderr, flush=True)
    time.sleep(60)
evaluating.Evaluation.measure = stuck
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigterm_ends_a_run_that_is_stuck(folders: tuple[Path, Path], tmp_path: Path) -> None:
    process = start(
        *("dirs", *folders, RANDOM, "--workers", 1, "-o", tmp_path / "out.csv"),
        program=("-c", STUCK),
    )
    try:
        assert process.stderr is not None
        while "stuck" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)  # of 60, however slow the machine
    finally:
        process.kill()
    assert process.returncode == 143
    assert "lpips-fast: note: stopped" in process.stderr.read()


# ------------------------------------------------------------------------------- scale

MEASURED = """
import resource, sys
from lpips_fast import cli
code = cli.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def peak_memory(a: Path, b: Path, output: Path) -> int:
    """MiB of a run in a process of its own."""
    process = start("dirs", a, b, RANDOM, "-o", output, program=("-c", MEASURED))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    peak = int(err.splitlines()[-1])
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


@pytest.mark.usefixtures("usual_allocator")
def test_10000_images_take_no_more_memory_than_few(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    originals = [f"{i}.png" for i in range(4)]
    a, b = make_folders(tmp_path / "originals", originals, sizes=[(32, 32)])
    for parent, number in ((few, 150), (many, 10_000)):
        for folder in (a, b):
            (parent / folder.name).mkdir(parents=True)
            for i in range(number):
                os.link(folder / originals[i % 4], parent / folder.name / f"{i}.png")
    peak_of_few = peak_memory(few / "A", few / "B", tmp_path / "few.csv")
    peak_of_many = peak_memory(many / "A", many / "B", tmp_path / "many.csv")
    print(f"peak of few {peak_of_few} MiB, of many {peak_of_many} MiB")
    # A decoded pair takes 6 KiB, 24 as floating point: kept, they would be 59 MiB and more.
    assert peak_of_many < peak_of_few + 40
    rows = rows_of(tmp_path / "many.csv")
    assert len(rows) == 10_000
    # Equal files have equal distances, whichever batch they were in.
    assert len({row.split(",")[1] for row in rows}) == 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (folders[1] / "3.png").write_bytes(b"")
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", RANDOM) == 1
    shown = terminal.getvalue()
    assert "24/24" in shown and " images/s" in shown
    # A message has a line of its own, with the bar wiped away before it.
    line = next(line for line in shown.split("\n") if "3.png: cannot read" in line)
    assert line.rpartition("\r")[2].startswith("lpips-fast: warning: 3.png: cannot read")
