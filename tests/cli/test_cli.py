"""The command line: what it prints, where, with which exit code, and the files it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpips_fast
from lpips_fast import cli

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, str]:
    """Two fresh random images of the same size."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    paths = []
    for name in ("one.png", "other.png"):
        pixels = torch.randint(256, (64, 72, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths[0], paths[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process; return exit code, standard output and error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


RANDOM = "--random-trunk"


# ------------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("pair", "published"),
    [(("ref", "p0"), "0.721881"), (("ref", "p1"), "0.138"), (("p0", "p1"), "0.719658")],
)
def test_published_distances(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    real_weights: Path,
    example_images: dict[str, Path],
    pair: tuple[str, str],
    published: str,
) -> None:
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(real_weights))
    paths = [str(example_images[name]) for name in pair]
    code, out, err = run(*paths, "--json")
    assert (code, err) == (0, "")
    last_digit = 10.0 ** -len(published.split(".")[1])
    assert json.loads(out)["distance"] == pytest.approx(float(published), abs=last_digit)
    code, out, err = run(*paths)
    assert (code, err) == (0, "")
    told = float(out.splitlines()[0].removeprefix("Distance: "))
    assert told == pytest.approx(float(published), abs=last_digit)


@pytest.mark.parametrize("file", ["", "alex.features.pth"])
def test_weights_from_a_path(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    real_weights: Path,
    example_images: dict[str, Path],
    file: str,
) -> None:
    path = real_weights / file
    if not path.exists():
        pytest.skip(f"no {file} in the weights folder")
    monkeypatch.delenv("LPIPS_FAST_WEIGHTS", raising=False)
    paths = [str(example_images[name]) for name in ("ref", "p0")]
    code, out, _ = run(*paths, "--weights", str(path), "--json")
    assert code == 0
    report = json.loads(out)
    assert report["distance"] == pytest.approx(0.721881, abs=1e-5)
    assert report["weights"].startswith(f"{path.name}, SHA-256 of its convolutions ")


def test_human_output(run: Any, images: tuple[str, str]) -> None:
    code, out, err = run(*images, RANDOM)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("Distance: ")
    assert float(lines[0].removeprefix("Distance: ")) > 0
    assert images[0] in lines[1] and images[1] in lines[1] and "72x64" in lines[1]
    assert "random trunk, not LPIPS" in lines[2] and "alex, version 0.1" in lines[2]
    assert err == (
        "lpips-fast: warning: the trunk is random (--random-trunk): these numbers are not LPIPS\n"
    )


def test_pair_may_be_left_out(run: Any, images: tuple[str, str]) -> None:
    named = run("pair", *images, RANDOM)
    assert named[0] == 0
    assert run(*images, RANDOM) == named
    assert run(RANDOM, *images) == named
    assert run("--debug", *images, RANDOM) == named


def test_equal_images_have_distance_zero(run: Any, images: tuple[str, str]) -> None:
    code, out, _ = run(images[0], images[0], RANDOM)
    assert code == 0
    assert out.startswith("Distance: 0.000000\n")


def test_json(run: Any, images: tuple[str, str]) -> None:
    code, out, _ = run(*images, RANDOM, "--json", "--net", "squeeze", "--lpips-version", "0.0")
    assert code == 0
    report = json.loads(out)
    assert report["distance"] == pytest.approx(sum(report["layers"]), rel=1e-5)
    assert len(report["layers"]) == len(report["layer_names"]) == 7
    assert report["images"] == [{"path": path, "width": 72, "height": 64} for path in images]
    expected = {
        "metric": "lpips",
        "net": "squeeze",
        "version": "0.0",
        "trunk": "random",
        "checkpoint": None,
        "resize": "none",
        "alpha": "white",
        "map": None,
        "device": "cpu",
        "dtype": "float32",
        "package_version": lpips_fast.__version__,
        "torch_version": torch.__version__,
    }
    assert {key: report[key] for key in expected} == expected
    assert report["weights"].startswith("random, not LPIPS, SHA-256 of its convolutions ")


def test_json_is_the_models_number(run: Any, images: tuple[str, str]) -> None:
    _, out, _ = run(*images, RANDOM, "--json")
    torch.manual_seed(0)
    model = lpips_fast.LPIPS(net="alex", pnet_rand=True, verbose=False)
    in0, in1 = (lpips_fast.images.read_image(path) for path in images)
    with torch.no_grad():
        assert json.loads(out)["distance"] == pytest.approx(model(in0, in1).item(), rel=1e-6)


def test_nothing_but_json_on_standard_output(
    run: Any, images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = cli.pair.load_model

    def noisy(options: Any) -> Any:
        print("a library that prints")
        return load_model(options)

    monkeypatch.setattr(cli.pair, "load_model", noisy)
    code, out, err = run(*images, RANDOM, "--json", "--map", str(tmp_path / "map.png"))
    assert code == 0
    json.loads(out)
    assert "a library that prints" in err


def test_the_random_trunk_is_always_the_same(run: Any, images: tuple[str, str]) -> None:
    first = run(*images, RANDOM, "--json")
    torch.rand(3)
    assert run(*images, RANDOM, "--json") == first


def test_per_layer(run: Any, images: tuple[str, str]) -> None:
    _, out, _ = run(*images, RANDOM, "--per-layer", "--net", "alex")
    layers = [line for line in out.splitlines() if line.startswith("  relu")]
    assert [line.split(":")[0] for line in layers] == [f"  relu{k}" for k in range(1, 6)]
    total = float(out.splitlines()[0].removeprefix("Distance: "))
    assert sum(float(line.split(":")[1]) for line in layers) == pytest.approx(total, rel=0.02)


def test_baseline(run: Any, images: tuple[str, str]) -> None:
    _, weighted, _ = run(*images, RANDOM, "--json")
    code, out, _ = run(*images, RANDOM, "--json", "--baseline")
    assert code == 0
    assert json.loads(out)["metric"] == "baseline"
    assert json.loads(out)["distance"] != json.loads(weighted)["distance"]


def test_map(run: Any, images: tuple[str, str], tmp_path: Path) -> None:
    target = tmp_path / "out map.png"
    code, out, _ = run(*images, RANDOM, "--json", "--map", str(target))
    assert code == 0
    report = json.loads(out)["map"]
    assert report["picture"] == str(target)
    assert report["numbers"] == str(tmp_path / "out map.npy")
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        assert 1500 < width < 3000 and 500 < height < 1500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 200
    numbers = np.load(report["numbers"])
    assert numbers.shape == (64, 72) and numbers.dtype == np.float32
    assert numbers.mean() == pytest.approx(report["mean"], rel=1e-5)
    assert numbers.std() > 0


def test_the_map_leaves_the_number_alone(run: Any, images: tuple[str, str], tmp_path: Path) -> None:
    _, without, _ = run(*images, RANDOM, "--json")
    _, with_map, _ = run(*images, RANDOM, "--json", "--map", str(tmp_path / "map.png"))
    assert json.loads(with_map)["distance"] == json.loads(without)["distance"]
    _, human, _ = run(*images, RANDOM, "--map", str(tmp_path / "map.png"))
    assert human.splitlines()[-1] == f"  map: {tmp_path / 'map.png'}, {tmp_path / 'map.npy'}"


def test_alpha(run: Any, tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    transparent, black = tmp_path / "transparent.png", tmp_path / "black.png"
    Image.fromarray(pixels).save(transparent)
    Image.fromarray(pixels[..., :3]).save(black)
    paths = (str(transparent), str(black))
    assert json.loads(run(*paths, RANDOM, "--json")[1])["distance"] > 0
    assert json.loads(run(*paths, RANDOM, "--json", "--alpha", "drop")[1])["distance"] == 0
    code, out, err = run(*paths, RANDOM, "--alpha", "refuse")
    assert (code, out) == (1, "")
    assert "transparent.png' has transparent pixels" in err


@pytest.mark.parametrize("name", ["two words.png", "Übergröße 画像 $5.png"])
def test_names(run: Any, images: tuple[str, str], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.open(images[0]).save(path)
    target = tmp_path / f"map of {name}"
    code, out, _ = run(str(path), images[1], RANDOM, "--map", str(target))
    assert code == 0
    assert name in out
    assert target.is_file() and target.with_suffix(".npy").is_file()
    code, out, _ = run(str(path), images[1], RANDOM, "--json")
    assert json.loads(out)["images"][0]["path"] == str(path)


# ------------------------------------------------------------------------ failures: 1


def assert_failed(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[-1].startswith("lpips-fast: error: ")
    assert "Traceback" not in err
    assert [line for line in lines if "error" in line] == lines[-1:]
    for part in parts:
        assert part in lines[-1]


def test_sizes_that_differ(run: Any, images: tuple[str, str], tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.new("RGB", (70, 64)).save(small)
    assert_failed(
        run(images[0], str(small), RANDOM), "differ in size", "is 72x64", "small.png is 70x64"
    )


def test_missing_file(run: Any, images: tuple[str, str]) -> None:
    assert_failed(run(images[0], "gone.png", RANDOM), "cannot read 'gone.png': no such file")


def test_not_an_image(run: Any, images: tuple[str, str], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    assert_failed(run(str(notes), images[0], RANDOM), "notes.txt': not an image")


def test_images_that_are_too_small(run: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "tiny.png")
    Image.new("RGB", (4, 4)).save(path)
    assert_failed(run(path, path, RANDOM), "4")


def test_missing_weights(run: Any, images: tuple[str, str], tmp_path: Path) -> None:
    assert_failed(run(*images, "--weights", str(tmp_path / "gone.pth")), "gone.pth")


def test_map_in_a_folder_that_does_not_exist(
    run: Any, images: tuple[str, str], tmp_path: Path
) -> None:
    target = str(tmp_path / "gone" / "map.png")
    assert_failed(run(*images, RANDOM, "--map", target), target, "folder does not exist")


def test_the_map_never_overwrites_an_image(
    run: Any, images: tuple[str, str], tmp_path: Path
) -> None:
    before = Path(images[1]).read_bytes()
    (tmp_path / "folder").mkdir()
    roundabout = str(tmp_path / "folder" / ".." / "other.png")
    assert_failed(run(*images, RANDOM, "--map", roundabout), "would overwrite", images[1])
    assert Path(images[1]).read_bytes() == before


def test_weights_that_are_nowhere_list_the_ways(
    run: Any, images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", "1")
    monkeypatch.delenv("LPIPS_FAST_WEIGHTS", raising=False)
    code, out, err = run(*images, "--net", "vgg")
    assert (code, out) == (1, "")
    assert err.startswith("lpips-fast: error: ")
    assert "--weights /path/to/vgg16-397923af.pth" in err and "Traceback" not in err
    assert err.count("\n") > 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(run: Any, images: tuple[str, str]) -> None:
    assert_failed(run(*images, RANDOM, "--device", "cuda"), "device 'cuda' cannot be used")


def test_debug_shows_the_traceback(images: tuple[str, str]) -> None:
    for arguments in (["--debug", images[0], "gone.png"], [images[0], "gone.png", "--debug"]):
        with pytest.raises(lpips_fast.images.ImageError):
            cli.main(arguments)


def test_an_unforeseen_error_says_so(
    run: Any, images: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise TypeError("no such\nthing")

    monkeypatch.setattr(cli.image_files, "read_image_uint8", broken)
    assert_failed(run(*images), "TypeError: no such thing (this is a bug; --debug shows where)")


def test_an_interrupt_ends_quietly(
    run: Any, images: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.image_files, "read_image_uint8", interrupted)
    assert run(*images) == (130, "", "")


# ------------------------------------------------------------------ wrong command lines: 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.png"], "required: B"),
        (["pair"], "required: A, B"),
        (["inof"], "invalid choice: 'inof'"),
        (["a.png", "b.png", "c.png"], "unrecognized arguments: c.png"),
        (["a.png", "b.png", "--net", "resnet"], "invalid choice: 'resnet'"),
        (["a.png", "b.png", "--lpips-version", "0.2"], "invalid choice: '0.2'"),
        (["a.png", "b.png", "--lpips-version"], "expected one argument"),
        (["a.png", "b.png", "--alpha", "black"], "invalid choice: 'black'"),
        (["a.png", "b.png", "--device", "gpu"], "'gpu' is no device"),
        (["a.png", "b.png", "--map", "map.txt"], "'map.txt' does not end in .png"),
        (["a.png", "b.png", "--weights", "w.pth", "--random-trunk"], "not allowed with"),
        (["a.png", "b.png", "--jso"], "unrecognized arguments: --jso"),
        (["info", "more"], "unrecognized arguments: more"),
    ],
)
def test_usage_errors(run: Any, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lpips-fast: error: ") and err.count("\n") == 1
    assert message in err


# ------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("arguments", [["--help"], ["pair", "--help"], ["info", "-h"]])
def test_help(run: Any, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("usage: lpips-fast")


def test_help_lists_every_command(run: Any) -> None:
    out = " ".join(run("--help")[1].split())  # argparse breaks long lines
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.summary}" in out


def test_no_command_lists_the_commands_a_line_each(run: Any) -> None:
    for arguments in ((), ("--quiet",), ("--debug",)):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert max(map(len, lines)) < 80
        for name, command in cli.COMMANDS.items():
            assert f"  {name:<9}  {command.summary}" in lines


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_version_is_that_of_the_package_everywhere(run: Any, command: str | None) -> None:
    arguments = ["--version"] if command is None else [command, "--version"]
    assert run(*arguments) == (0, f"lpips-fast {lpips_fast.__version__}\n", "")


def test_info(run: Any) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert lpips_fast.__version__ in out


def test_as_a_program(images: tuple[str, str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    program = [sys.executable, "-m", "lpips_fast"]
    done = subprocess.run(
        [*program, *images, RANDOM, "--json"], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["distance"] > 0
    failed = subprocess.run(
        [*program, images[0], "gone – 画像.png"], capture_output=True, env=environment, check=False
    )
    assert failed.returncode == 1
    assert failed.stdout == b""
    assert failed.stderr.count(b"\n") == 1 and b"no such file" in failed.stderr
