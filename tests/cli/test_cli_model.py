"""The arguments that all sub-commands share: ``--layers``, ``--dtype``, and how both are told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lpips_fast import LPIPS, cli
from lpips_fast.cli.model import add_model_arguments, distance_name, load_model, metric_name
from lpips_fast.comparison.linear import linear_weight

Image = pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")


def parsed(*arguments: str, **options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, **options)
    return parser.parse_args(["--random-trunk", *arguments])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("one.png", "two.png"):
            pixels = torch.randint(256, (40, 48, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / folder / name)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


class TestNames:
    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ([], "LPIPS"),
            (["--baseline"], "baseline"),
            (["--normalization", "l1"], "LPIPS (l1)"),
            (["--layers", "2,0"], "LPIPS (2 layers)"),
            (["--normalization", "max", "--layers", "3"], "LPIPS (max, 1 layer)"),
        ],
    )
    def test_in_few_words_beside_a_scale(self, arguments: list[str], name: str):
        options = parsed(*arguments)
        assert distance_name(options).startswith("random-trunk ")
        options.random_trunk = False
        assert distance_name(options) == f"{name} distance"

    def test_the_default_is_lpips(self):
        assert metric_name(parsed()) == "random trunk, not LPIPS: LPIPS alex, version 0.1"

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--layers", "2,0"], ", layers 0,2 only"),
            (["--layers", "3"], ", layer 3 only"),
            (["--dtype", "bfloat16"], ", bfloat16"),
            (["--layers", "0", "--dtype", "float64"], ", layer 0 only, float64"),
        ],
    )
    def test_what_is_not_is_told(self, arguments, told):
        assert metric_name(parsed(*arguments)).endswith(f"version 0.1{told}")

    def test_nets(self, capsys):
        assert parsed("--net", "all", all_nets="three columns").net == "all"
        with pytest.raises(SystemExit):
            parsed("--net", "all")
        assert "invalid choice: 'all'" in capsys.readouterr().err

    def test_a_command_without_dtype_has_float32(self, capsys):
        assert parsed(dtype=False).dtype == "float32"
        with pytest.raises(SystemExit):
            parsed("--dtype", "float64", dtype=False)

    @pytest.mark.parametrize("text", ["", "a", "0,", "-1", "0,0", "0.5", "1-3"])
    def test_layers_that_are_none(self, text, capsys):
        with pytest.raises(SystemExit):
            parsed(f"--layers={text}")
        assert "--layers" in capsys.readouterr().err


class TestModels:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_dtype(self, dtype, capsys):
        model = load_model(parsed("--dtype", dtype, "--layers", "0,2"))
        wanted = getattr(torch, dtype)
        assert isinstance(model, LPIPS) and model.layers == (0, 2)
        assert {p.dtype for p in model.net.parameters()} == {wanted}
        outside = torch.float64 if dtype == "float64" else torch.float32
        assert model.scaling_layer.shift.dtype == linear_weight(model.lin0).dtype == outside
        image = torch.rand(1, 3, 40, 40)
        assert model(image, 1 - image).dtype == outside

    def test_a_device_that_is_not_there_is_told_before_weights_are_looked_for(self, monkeypatch):
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        monkeypatch.setattr("lpips_fast.lpips.LPIPS", lambda **_: pytest.fail("it was made"))
        with pytest.raises(cli.CommandError, match="'cuda' cannot be used here"):
            load_model(parsed("--device", "cuda"))


class TestCommands:
    def test_pair(self, folders, run):
        one, other = (str(folder / "one.png") for folder in folders)
        arguments = ("pair", one, other, "--random-trunk", "--json")
        whole = json.loads(run(*arguments)[1])
        part = json.loads(run(*arguments, "--layers", "0,3", "--dtype", "float64")[1])
        assert part["layer_names"] == ["relu1", "relu4"] and part["dtype"] == "float64"
        assert part["layers"] == pytest.approx([whole["layers"][0], whole["layers"][3]], rel=1e-4)
        assert part["distance"] == pytest.approx(sum(part["layers"]))
        assert "layers 0,1 only" in run("pair", one, other, "--random-trunk", "--layers", "0,1")[1]

    def test_a_map_of_some_layers(self, folders, run, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        images = [str(folder / "one.png") for folder in folders]
        arguments = (
            "map",
            *images,
            "-o",
            str(tmp_path / "map.png"),
            "--random-trunk",
            "--layers",
            "1",
        )
        code, out, _ = run(*arguments, "--dtype", "float64")
        assert code == 0 and (tmp_path / "map.png").stat().st_size and "layer 1 only" in out

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_dirs_state_the_dtype_and_the_layers(self, folders, run, tmp_path, dtype):
        path = tmp_path / "distances.csv"
        arguments = ("dirs", *folders, "-o", path, "--random-trunk", "--dtype", dtype)
        code, out, err = run(*arguments, "--layers", "0,2")
        assert code == 0, err
        record = path.with_name("distances.csv.jsonl").read_text().splitlines()
        settings = json.loads(record[0])["lpips-fast"]
        assert (settings["dtype"], settings["layers"]) == (dtype, "0,2")
        assert "layers 0,2 only" in out
        # Another dtype, or other layers, is another file.
        code, _, err = run(*arguments, "--layers", "0,1")
        assert code == 1 and "layers" in err

    def test_all_nets_have_a_number_for_the_layers_that_all_have(self, folders, run, tmp_path):
        arguments = ("dirs", *folders, "-o", tmp_path / "d.csv", "--random-trunk", "--net", "all")
        code, _, err = run(*arguments, "--layers", "6")
        assert code == 1 and "layers holds 6, expected indices of the layers of 'alex'" in err

    def test_pairwise_keeps_the_digits_of_float64(self, folders, run, tmp_path):
        path = tmp_path / "matrix.csv"
        code, _, err = run(
            *("pairwise", folders[0], "-o", path, "--random-trunk", "--no-picture"),
            *("--dtype", "float64", "--layers", "0"),
        )
        assert code == 0, err
        text = path.read_text()
        report = json.loads(path.with_suffix(".json").read_text())
        assert report["dtype"] == "float64" and len(report["layer_names"]) == 1
        value = text.splitlines()[-1].split(",")[1]
        assert len(value.lstrip("0.")) > 9

    def test_training_some_layers_is_offered_and_dtype_is_not(self, run):
        code, _, err = run("train", "nowhere", "-o", "out", "--dtype", "float64")
        assert code == 2 and "--dtype" in err
