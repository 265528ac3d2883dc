"""``lpips-fast train`` and ``evaluate``: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpips_fast
from lpips_fast import cli
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.judgements.datasets import JNDDataset, TwoAFCDataset
from lpips_fast.judgements.scoring import evaluate_2afc, evaluate_jnd

pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
pytest.importorskip("matplotlib", reason="train draws a learning curve")

# One process, few epochs: the work itself is tested elsewhere.
QUICK = ("--random-trunk", "--workers", "0")
TRAIN = (*QUICK, "--epochs", "2", "--decay-epochs", "1", "--batch", "4", "--no-curve")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process; return exit code, standard output and error."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def bapps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as BAPPS is, of random patches."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("bapps")
    for kind, path, count in (
        (TwoAFCDataset, "2afc/train/mix", 6),
        (TwoAFCDataset, "2afc/train/cnn", 4),
        (TwoAFCDataset, "2afc/val/cnn", 3),
        (TwoAFCDataset, "2afc/val/color", 5),
        (JNDDataset, "jnd/val/cnn", 5),
    ):
        for k in range(count):
            base = rng.integers(256, size=(64, 64, 3))
            images = {
                part: np.clip(base + rng.normal(0, 60 * i, base.shape), 0, 255).astype(np.uint8)
                for i, part in enumerate(kind.IMAGES)  # type: ignore[attr-defined]
            }
            kind.write(root / path, f"{k:06d}", int(rng.integers(1, 6)) / 5, **images)  # type: ignore[attr-defined]
    return root


# ------------------------------------------------------------------------------------ train


def test_train_then_evaluate(run: Any, bapps: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, printed, err = run(
        *("train", bapps / "2afc/train", "-o", out, "--validation", bapps / "2afc/val"),
        *TRAIN[:-1],
    )
    assert code == 0, err
    assert "the trunk is random" in err
    lines = printed.splitlines()
    assert lines[0].startswith("Trained LPIPS alex, mode lin, on 10 judgements: 3 epochs in ")
    assert [line.split("  ")[0] for line in lines[1:8]] == [
        "",
        "ranking loss",
        "2AFC training",
        "2AFC cnn",
        "2AFC color",
        "2AFC validation, mean",
        "one more person",
    ]
    assert {path.name for path in out.iterdir()} == {
        *("model.pth", "training_state.pth", "log.csv", "training.json", "learning_curve.png")
    }
    history = json.loads((out / "training.json").read_text())["history"]
    assert len(history) == 3
    assert history[-1]["learning_rate"] == 1e-4

    # The checkpoint holds the trunk, so that no weights are searched for.
    code, printed, err = run(
        *("evaluate", "--2afc", bapps / "2afc/val", "--checkpoint", out / "model.pth"),
        *("--workers", "2", "--json"),
    )
    assert code == 0, err
    report = json.loads(printed)
    assert {row["subset"]: row["score"] for row in report["2afc"]["subsets"]} == pytest.approx(
        history[-1]["validation_2afc"]
    )


def test_options_arrive(run: Any, bapps: Path, tmp_path: Path) -> None:
    code, _, err = run(
        *("train", bapps / "2afc/train/cnn", bapps / "2afc/train/mix", "-o", tmp_path, *TRAIN),
        *("--mode", "scratch", "--init", "ones", "--learning-rate", "0.002", "--dropout", "0.1"),
        *("--weight-decay", "0.01", "--seed", "5", "--no-cache", "--net", "squeeze"),
    )
    assert code == 0, err
    assert "the trunk is random" not in err  # it is meant to be
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["net"] == "squeeze"
    assert summary["judgements"] == 10
    assert summary["learns"] == "trunk and linear weights"
    assert summary["options"] == {
        **{"epochs": 2, "decay_epochs": 1, "batch_size": 4, "beta1": 0.5, "cache": False},
        **{"learning_rate": 0.002, "dropout": 0.1, "weight_decay": 0.01, "seed": 5},
    }
    assert not (tmp_path / "learning_curve.png").exists()


def test_resume(run: Any, bapps: Path, tmp_path: Path) -> None:
    command = ("train", bapps / "2afc/train/mix", "-o", tmp_path, *TRAIN)
    assert run(*command)[0] == 0
    before = (tmp_path / "log.csv").read_text()
    code, _, err = run(*command)
    assert (code, err.splitlines()[-1]) == (
        1,
        f"lpips-fast: error: {tmp_path} already holds a training run: resume it, or choose another "
        "folder",
    )
    assert run(*command, "--resume")[0] == 0  # there is nothing left to do
    assert (tmp_path / "log.csv").read_text() == before
    code, _, err = run(*command, "--resume", "--seed", "3")
    assert code == 1
    assert "cannot be resumed: it began with seed=0, and now it is 3" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--baseline",), "--init ones begins training with it"),
        (("--epochs", "-1"), "epochs is -1, expected at least 0"),
        (("--dropout", "1"), "dropout is 1.0, expected at least 0 and below 1"),
        (("--validation", "nowhere"), "nowhere is no folder"),
        (("--device", "cuda:99"), "the device 'cuda:99' cannot be used here"),
        (("--resume",), "no training run to resume"),
    ],
)
def test_what_train_refuses(
    run: Any, bapps: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(
        "train", bapps / "2afc/train/cnn", "-o", tmp_path / "o", *TRAIN, *arguments
    )
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert "bug" not in err
    assert not (tmp_path / "o" / "model.pth").exists()


def test_a_folder_without_judgements(run: Any, bapps: Path, tmp_path: Path) -> None:
    code, _, err = run("train", bapps / "jnd", "-o", tmp_path, *TRAIN)
    assert code == 1
    assert "expected the layout of BAPPS, a folder with ref/ p0/ p1/ judge/" in err


def test_train_says_what_is_missing_before_it_works(
    run: Any, bapps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("train", bapps / "2afc/train/cnn", "-o", tmp_path / "o", *TRAIN[:-1])
    assert (code, err.splitlines()[-1]) == (
        1,
        "lpips-fast: error: drawing a learning curve needs Matplotlib: "
        'pip install "lpips-fast[plots]"',
    )


# --------------------------------------------------------------------------------- evaluate


def model() -> lpips_fast.LPIPS:
    """The one that ``--random-trunk`` gives."""
    torch.manual_seed(0)
    return lpips_fast.LPIPS(pnet_rand=True, verbose=False)


def test_evaluate_as_json(run: Any, bapps: Path) -> None:
    code, out, err = run(
        *("evaluate", "--2afc", bapps / "2afc/val", "--jnd", bapps / "jnd", *QUICK, "--json")
    )
    assert code == 0, err
    report = json.loads(out)
    cnn = evaluate_2afc(model(), TwoAFCDataset(bapps / "2afc/val/cnn"))
    color = evaluate_2afc(model(), TwoAFCDataset(bapps / "2afc/val/color"))
    jnd = evaluate_jnd(model(), JNDDataset(bapps / "jnd/val/cnn"))
    assert report["2afc"]["subsets"] == [
        {"subset": "cnn", "judgements": 3, "score": cnn.score, "people": cnn.people},
        {"subset": "color", "judgements": 5, "score": color.score, "people": color.people},
    ]
    assert report["2afc"]["mean"]["score"] == pytest.approx((cnn.score + color.score) / 2)
    assert report["jnd"] == {
        "subsets": [{"subset": "val/cnn", "judgements": 5, "score": jnd.score}],
        "mean": {"score": jnd.score},
    }
    assert report["resize"] == 64


def test_evaluate_as_a_table(run: Any, bapps: Path) -> None:
    folders = ("--2afc", bapps / "2afc/val/cnn", "--2afc", bapps / "2afc/train")
    code, out, err = run("evaluate", *folders, "--jnd", bapps / "jnd", *QUICK)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "random trunk, not LPIPS: LPIPS alex, version 0.1"
    assert lines[2].split() == ["2AFC", "score,", "%", "judgements", "metric", "people"]
    # Two sub-sets of one name are told apart by where they were found.
    names = ["cnn", f"{bapps / '2afc/train'}/cnn", "mix", "mean"]
    assert [line.split()[0] for line in lines[3:7]] == names
    assert lines[8].split()[-2:] == ["judgements", "metric"]
    score = evaluate_jnd(model(), JNDDataset(bapps / "jnd/val/cnn")).score
    assert lines[9].split() == ["val/cnn", "5", f"{100 * score:.2f}"]
    assert len({len(line) for line in lines[2:7]}) == 1


def test_linear_weights_alone_go_on_the_trunk_that_is_found(
    run: Any, bapps: Path, tmp_path: Path, real_weights: Path
) -> None:
    published = {f"lin{k}.model.1.weight": w for k, w in enumerate(_lins(real_weights))}
    torch.save(published, tmp_path / "lin.pth")
    arguments = ("--2afc", bapps / "2afc/val/cnn", "--weights", real_weights, "--workers", 0)
    code, out, err = run("evaluate", *arguments, "--checkpoint", tmp_path / "lin.pth", "--json")
    assert code == 0, err
    code, expected, err = run("evaluate", *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["2afc"] == json.loads(expected)["2afc"]


def _lins(weights: Path) -> list[torch.Tensor]:
    lpips = lpips_fast.LPIPS(weights=weights, verbose=False)
    return [linear_weight(lin).detach().clone() for lin in lpips.lins]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save(model().state_dict(), path)
    return path


def test_checkpoints_that_do_not_fit(
    run: Any, bapps: Path, tmp_path: Path, checkpoint: Path
) -> None:
    def error(*arguments: Any) -> str:
        code, out, err = run("evaluate", "--2afc", bapps / "2afc/val/cnn", *arguments)
        assert (code, out) == (1, "")
        return err.splitlines()[-1]

    assert "name its own trunk with --net" in error("--checkpoint", checkpoint, "--net", "squeeze")
    assert "exclude each other" in error("--checkpoint", checkpoint, "--baseline")
    assert "exclude each other" in error("--checkpoint", checkpoint, "--random-trunk")
    assert "leave out --weights" in error("--checkpoint", checkpoint, "--weights", "alex.pth")
    assert "does not exist" in error("--checkpoint", tmp_path / "nothing.pth")
    part = {k: v for k, v in torch.load(checkpoint).items() if "slice3" not in k}
    torch.save(part, tmp_path / "part.pth")
    assert "holds only a part of trunk 'alex'" in error("--checkpoint", tmp_path / "part.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate on: give --2afc DIR, --jnd DIR, or both"),
        (("--jnd", "nowhere"), "nowhere is no folder"),
        (("--2afc", "BAPPS/jnd"), "holds judge/"),
        (("--2afc", "BAPPS/jnd", "--batch", "2"), "holds judge/"),
    ],
)
def test_what_evaluate_refuses(
    run: Any, bapps: Path, arguments: tuple[str, ...], message: str
) -> None:
    arguments = tuple(a.replace("BAPPS", str(bapps)) for a in arguments)
    code, out, err = run("evaluate", *arguments, *QUICK)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]


def test_a_negative_number_of_workers_is_a_wrong_command_line(run: Any, bapps: Path) -> None:
    code, _, err = run("evaluate", "--2afc", bapps / "2afc", "--workers", "-1")
    assert code == 2
    assert "-1 is negative" in err
