"""One grammar for all sub-commands, and the old spellings, which are understood and told."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from image_folders import call, make_folders, random_pixels, write_png

from lpips_fast import cli
from lpips_fast.cli import device, progress, spellings
from lpips_fast.cli.command import set_quiet

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")

RANDOM = "--random-trunk"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(3)
    paths = [tmp_path / name for name in ("one.png", "other.png")]
    for path in paths:
        write_png(path, random_pixels(40, 48, generator))
    return paths


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    yield
    set_quiet(False)


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


# ------------------------------------------------------------------------------ the grammar


def test_all_commands_take_what_stands_anywhere() -> None:
    for name, parser in parsers().items():
        assert {"--quiet", "--debug", "--version", "--help"} <= options_of(parser).keys(), name


def test_an_option_means_the_same_wherever_it_is() -> None:
    found = {name: options_of(parser) for name, parser in parsers().items()}
    assert [n for n, flags in found.items() if "--out" in flags or "--batch-size" in flags] == []
    for flags in found.values():
        assert ("-o" in flags) == ("--output" in flags)
        if "--output" in flags:
            assert flags["-o"] is flags["--output"]
    # A size is of images that are made up; those of files are resized.
    assert {n for n, flags in found.items() if "--size" in flags} == {
        "bench",
        "recommend",
        "export",
    }
    for flags in found.values():
        assert not {"--size", "--resize"} <= flags.keys()
        if "--size" in flags:
            assert flags["--size"].type("64") == flags["--size"].type("64x64") == (64, 64)
            assert flags["--size"].type("64x32") == (64, 32)
    writing = {n for n, flags in found.items() if "--output" in flags}
    commands = "dirs pairwise nearest map analyze train export compress"
    assert writing == set(commands.split())


def test_one_default_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        name: options_of(parser)["--device"]
        for name, parser in parsers().items()
        if "--device" in options_of(parser)
    }
    assert len(found) == 12
    for name, action in found.items():
        # A file is the same wherever it was written.
        expected = "cpu" if name == "export" else "auto"
        assert action.default == expected, name
        told = "cpu" if name == "export" else "a GPU if there is one"
        assert f"(default: {told})" in str(action.help), name
    for is_there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=is_there: there)
        assert device.device("auto") == torch.device(expected)


# ------------------------------------------------------------------------------ old spellings


def test_old_spellings_do_what_the_new_ones_do(
    images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The old one, the new one, and what is said of it.
    maps = tmp_path / "old.png", tmp_path / "new.png"
    for old, new, note in (
        (
            ("pair", *images, "--version", "0.0", "--json"),
            ("pair", *images, "--lpips-version", "0.0", "--json"),
            "--version is --lpips-version now",
        ),
        (
            (*images, "--version=0.0", "--json"),
            (*images, "--lpips-version=0.0", "--json"),
            "--version is --lpips-version now",
        ),
        (("--package-version",), ("--version",), "--package-version is --version now"),
        (
            ("map", *images, maps[0], RANDOM),
            ("map", *images, "-o", maps[1], RANDOM),
            f"what is written is named after -o now: -o {maps[0]}",
        ),
    ):
        found = []
        for arguments in (old, new):
            capsys.readouterr()
            assert call(*arguments) == 0
            found.append(capsys.readouterr())
        assert found[0].out.replace("old.", "new.") == found[1].out
        assert note in found[0].err and "now" not in found[1].err
    assert maps[0].read_bytes() == maps[1].read_bytes()


@pytest.mark.parametrize(("command", "old"), [key for key in spellings.RENAMED if key[0]])
def test_every_old_option_has_a_new_one(command: str, old: str) -> None:
    new = spellings.RENAMED[command, old]
    flags = options_of(parsers()[command])
    assert new in flags and old not in flags
    notes = [f"{old} is {new} now"]
    assert spellings.renewed(command, [command, old, "7"]) == ([command, new, "7"], notes)
    assert spellings.renewed(command, [command, f"{old}=7"]) == ([command, f"{new}=7"], notes)
    for other in ([command, "--", old], [command, f"{old}s"]):
        assert spellings.renewed(command, other) == (other, [])
    assert spellings.renewed("info", [old]) == ([old], [])  # of another command, it is no option


def test_version_takes_no_file_for_a_version() -> None:
    for arguments in (["--version", "1.png"], ["--version"]):
        assert spellings.renewed("pair", arguments) == (arguments, [])


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pair", "one.png", "one.png", "--max-pixels", "9"), "raise --max-pixels if you trust"),
        (("pair", "clear.png", "one.png", "--alpha", "refuse"), "pass --alpha white to composite"),
        (("pair", "one.png", "one.png", "--layers", "9", RANDOM), "--layers holds 9, expected"),
        (("pair", "one.png", "one.png", "--resize", "9", RANDOM), "pixels, and trunk 'alex' needs"),
        (
            ("analyze", "one.png", "one.png", "--resize", "9", RANDOM, "-o", "x"),
            "--resize enlarges",
        ),
        (("recommend", "--min-2afc", "80"), "--min-2afc is 80.0"),
        (("recommend", "--max-latency-ms", "0"), "--max-latency-ms is 0.0"),
        (("recommend", "--max-memory-mb", "-1"), "--max-memory-mb is -1.0"),
        (("pairwise", "A", "--memory-limit", "1K", RANDOM), "--memory-limit is 0.00 MiB"),
    ],
)
def test_errors_name_the_options(
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    Image.new("RGBA", (48, 40), (9, 9, 9, 9)).save(tmp_path / "clear.png")
    make_folders(tmp_path, ["1.png", "2.png"], [(64, 64)])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert call(*arguments) == 1
    err = capsys.readouterr().err
    assert words in err
    assert not re.search(r"(?<!-)\b(max_pixels|memory_limit|max_\w+|min_2afc|in0)\b", err)


def test_a_path_is_not_taken_for_an_argument() -> None:
    for text in ("cannot read 'max_pixels'", "no a/max_pixels.png", "no batch_size.csv here"):
        assert spellings.as_options(text) == text


def test_what_is_written_is_named_once(
    images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "map.png"
    for arguments, words in (
        (("map", *images), "is not named: give it once, after -o"),
        (("map", *images, output, "-o", output), "is named twice: give it once, after -o"),
        (("export", RANDOM), "is not named"),
        (("weights", "pack"), "is not named"),
    ):
        capsys.readouterr()
        assert call(*arguments) == 2
        assert words in capsys.readouterr().err
    assert not output.exists()


# ------------------------------------------------------------------------------ quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_leaves_out_bars_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_folders(tmp_path, ["1.png", "2.png"], [(32, 32)])
    (folders[0] / "alone.png").write_bytes((folders[0] / "1.png").read_bytes())
    for quiet in ((), ("--quiet",)):
        for turn in range(2):  # the second finds nothing to do, and notes it
            terminal = Terminal()
            monkeypatch.setattr(sys, "stderr", terminal)
            capsys.readouterr()
            output = tmp_path / f"out{len(quiet)}.csv"
            page = ("--report", tmp_path / "page.html") if turn else ()
            assert call("dirs", *folders, "-o", output, RANDOM, *page, *quiet) == 0
            told = terminal.getvalue()
            assert "warning: without a partner" in told and "warning: the trunk is random" in told
            assert ("images/s" in told or "images" in told) == (not quiet)
            assert ("nothing to do" in told) == (turn == 1 and not quiet)
            assert ("drawing" in told) == (turn == 1 and not quiet)
            assert "Mean" in capsys.readouterr().out


def test_quiet_stands_before_the_command_too(
    images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ("--quiet", "pair", *images, "--version", "0.0"),
        ("pair", *images, "--version", "0.0", "--quiet"),
        ("--quiet", *images, "--version", "0.0"),
    ):
        assert call(*arguments) == 0
        out, err = capsys.readouterr()
        assert out.startswith("Distance: ") and err == ""


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(3, "images") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_bar_does_not_stand_at_its_end_while_work_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.open_ended(4, "images", "comparing") as advance:
        advance(4)
        advance(3)  # more than was foreseen
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert "comparing: 7 images" in last and "%" not in last


# ------------------------------------------------------------------------------ names


def test_equal_names_are_told_apart_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpips_fast.cli import pair

    drawn = []
    monkeypatch.setattr(
        pair, "save_heatmap", lambda map, path, **facts: drawn.append(facts) or path
    )
    generator = torch.Generator().manual_seed(4)
    files = [tmp_path / folder / "1.png" for folder in ("ours", "theirs")]
    for file in files:
        write_png(file, random_pixels(32, 32, generator))
    assert call("pair", *files, "--map", tmp_path / "map.png", RANDOM) == 0
    assert drawn[0]["names"] == ["ours/1.png", "theirs/1.png"]
    assert drawn[0]["title"] == "ours/1.png  vs  theirs/1.png"


def test_json_of_a_pair_names_the_weights_as_the_csv_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_folders(tmp_path, ["1.png"], [(32, 32)])
    capsys.readouterr()
    assert call("dirs", *folders, "-o", tmp_path / "out.csv", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert call("pair", *(folder / "1.png" for folder in folders), "--json") == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert weights == settings["weights of alex"] and "SHA-256" in weights
