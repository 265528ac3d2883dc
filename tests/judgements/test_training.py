"""Training: it finds the right answer where that is known, and is the original's, step by step."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import toy_judgements as toy
from parity import trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast.comparison.linear import linear_weight
from lpips_fast.judgements import training
from lpips_fast.judgements.run_folder import RunFolder
from lpips_fast.judgements.scoring import evaluate_2afc
from lpips_fast.judgements.training import (
    EpochRecord,
    Trainer,
    TrainingError,
    TrainingOptions,
    new_model,
)
from lpips_fast.weights import WeightsError

SHORT = TrainingOptions(epochs=2, decay_epochs=1, batch_size=4, learning_rate=1e-3)


def replaced(options: TrainingOptions, **changes: Any) -> TrainingOptions:
    return TrainingOptions(**{**vars(options), **changes})


@pytest.fixture(scope="module")
def generator() -> torch.Generator:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return generator


@pytest.fixture(scope="module")
def items(generator: torch.Generator) -> list[toy.Item]:
    """A few judged triplets, the last batch of which is smaller."""
    return toy.judged(toy.triplets(10, generator), toy.hidden_model(generator), generator)


def model(mode: Any = "lin", **options: Any) -> lpips_fast.LPIPS:
    if mode != "scratch":
        options.setdefault("weights", trunk_weights("alex"))
    return new_model("alex", mode, **options)


def trainer(
    items: list[toy.Item],
    options: TrainingOptions = SHORT,
    mode: Any = "lin",
    validation: dict[str, Any] | None = None,
    **model_options: Any,
) -> Trainer:
    return Trainer(
        model(mode, **model_options), items, options, validation=validation, progress=False
    )


def lin_weights(model: torch.nn.Module) -> Tensor:
    """Of our model, or of the original's."""
    return torch.cat([lin.model[-1].weight.detach().flatten() for lin in model.lins])


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


# ------------------------------------------------------------------- the right answer is known


@pytest.fixture(scope="module")
def world(generator: torch.Generator) -> dict[str, Any]:
    hidden = toy.hidden_model(generator)
    judged = toy.judged(toy.triplets(600, generator), hidden, generator)
    return {"hidden": hidden, "training": judged[150:], "validation": judged[:150]}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_finds_the_hidden_weights(world: dict[str, Any], dropout: float) -> None:
    options = TrainingOptions(epochs=10, decay_epochs=10, learning_rate=3e-2, dropout=dropout)
    run = trainer(
        world["training"], options, initialization="ones", validation={"val": world["validation"]}
    )
    before = evaluate_2afc(run.model, world["validation"])
    ceiling = evaluate_2afc(world["hidden"], world["validation"])
    for _ in range(options.total_epochs):
        record = run.train_epoch()
    after = evaluate_2afc(run.model, world["validation"])
    assert record.validation_2afc["val"] == pytest.approx(after.score)  # scored from the cache
    assert run.people_2afc == pytest.approx(after.people)
    assert record.loss < run.history[0].loss / 2
    # Typically 0.70 before, 0.91 after and 0.95 for the hidden weights themselves.
    assert after.score > before.score + 0.08
    assert after.score > ceiling.score - 0.10
    # Typically 0.75; ones, and random weights, have none.
    found = rank_correlation(
        linear_weight(run.model.lins[0]), linear_weight(world["hidden"].lins[0])
    )
    assert found > 0.4
    # The layers that nobody looked at weigh less than the one that all looked at.
    means = [linear_weight(lin).mean().item() for lin in run.model.lins]
    assert max(means[1:]) < means[0]


# -------------------------------------------------------------------------- the original's


@pytest.mark.parametrize("mode", ["lin", "tune"])
def test_steps_are_the_originals(reference: ModuleType, items: list[toy.Item], mode: str) -> None:
    """Three epochs beside the original's modules, trained as its trainer trains them.

    In float64: where a gradient is all rounding, Adam still makes full steps.
    """
    options = replaced(SHORT, dropout=0.0, cache=False)
    items = [{name: value.double() for name, value in item.items()} for item in items]
    ours = Trainer(model(mode).double(), items, options, progress=False)
    before = parameters(ours.model)
    theirs = reference.LPIPS(
        pnet_rand=True, pnet_tune=mode == "tune", eval_mode=False, verbose=False
    ).double()
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    for lin in theirs.lins:
        lin.model[0].p = 0.0
    loss_of = reference.BCERankingLoss().double()
    loss_of.load_state_dict(ours.ranking_loss.state_dict())
    learned = [*theirs.parameters(), *loss_of.net.parameters()]
    optimizer = torch.optim.Adam(learned, lr=options.learning_rate, betas=(0.5, 0.999))
    for epoch in range(1, options.total_epochs + 1):
        optimizer.param_groups[0]["lr"] = options.rate(epoch)
        with training._seeded(options.seed, epoch, torch.device("cpu")):
            order = torch.randperm(len(items)).tolist()
        losses = []
        for first in range(0, len(order), options.batch_size):
            rows = [items[k] for k in order[first : first + options.batch_size]]
            ref, p0, p1, judge = (
                torch.stack([row[name] for row in rows]) for name in ("ref", "p0", "p1", "judge")
            )
            judge = judge.view(-1, 1, 1, 1)
            loss = loss_of(theirs(ref, p0), theirs(ref, p1), judge * 2 - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for lin in theirs.lins:
                lin.model[1].weight.data.clamp_(min=0)
            losses.append(loss.item() * len(rows))
        record = ours.train_epoch()
        assert record.loss == pytest.approx(sum(losses) / len(items), rel=1e-9)
    for name, value in parameters(theirs).items():
        step, expected = parameters(ours.model)[name] - before[name], value - before[name]
        assert (step - expected).norm() <= 1e-6 * expected.norm(), name


def test_the_learning_rate_is_the_originals() -> None:
    options = TrainingOptions(epochs=3, decay_epochs=4, learning_rate=1e-3)
    rate, rates = options.learning_rate, []
    for epoch in range(1, 8):
        rates.append(rate)
        if epoch > options.epochs:
            rate -= options.learning_rate / options.decay_epochs
    assert [options.rate(epoch) for epoch in range(1, 8)] == pytest.approx(rates)


@pytest.mark.parametrize("mode", ["lin", "tune"])
def test_a_checkpoint_loads_in_the_original(
    reference: ModuleType, items: list[toy.Item], tmp_path: Path, mode: str
) -> None:
    run = trainer(items, mode=mode)
    run.run(tmp_path, curve=False)
    ref = torch.stack([item["ref"] for item in items])
    p0 = torch.stack([item["p0"] for item in items])
    file = str(tmp_path / "model.pth")
    with torch.no_grad():
        expected = run.model(ref, p0)
        assert expected.min() > 0
        for package in (reference, lpips_fast):
            loaded = package.LPIPS(net="alex", model_path=file, pnet_rand=True, verbose=False)
            torch.testing.assert_close(loaded(ref, p0), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------ what learns


def test_the_cache_changes_nothing_but_the_time(items: list[toy.Item]) -> None:
    items = [{name: value.double() for name, value in item.items()} for item in items]
    options = replaced(SHORT, dropout=0.0)
    cached, plain = (
        Trainer(
            model().double(),
            items,
            replaced(options, cache=cache),
            validation={"val": items[:3]},
            progress=False,
        )
        for cache in (True, False)
    )
    assert (cached.caches, plain.caches) == (True, False)
    for _ in range(options.total_epochs):
        one, other = cached.train_epoch(), plain.train_epoch()
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        assert one.train_2afc == pytest.approx(other.train_2afc)
        assert one.validation_2afc == pytest.approx(other.validation_2afc)
    torch.testing.assert_close(
        lin_weights(cached.model), lin_weights(plain.model), rtol=1e-6, atol=1e-9
    )


def test_the_trunk_is_run_once_an_image(
    items: list[toy.Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(items, validation={"val": items[:3]})
    images = []
    encode = run.model.encode
    monkeypatch.setattr(run.model, "encode", lambda x: images.append(len(x)) or encode(x))
    for _ in range(3):
        run.train_epoch()
    assert sum(images) == 3 * 10 + 3 * 3


@pytest.mark.parametrize("mode", ["lin", "tune", "scratch"])
def test_what_a_mode_learns(items: list[toy.Item], mode: str) -> None:
    run = trainer(items, replaced(SHORT, epochs=1, decay_epochs=0), mode)
    before = parameters(run.model)
    ranking = parameters(run.ranking_loss)
    run.train_epoch()
    after = parameters(run.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if mode != "lin" or name.startswith("lin")}
    assert changed == expected
    assert all(not torch.equal(ranking[k], v) for k, v in parameters(run.ranking_loss).items())
    assert run.caches == (mode == "lin")
    assert run.model.pnet_rand == (mode == "scratch")
    assert not run.model.training


@pytest.mark.parametrize("cache", [True, False])
def test_weights_stay_non_negative(items: list[toy.Item], cache: bool) -> None:
    run = trainer(items, replaced(SHORT, learning_rate=0.1, cache=cache))
    assert lin_weights(run.model).min() == 0  # random ones, projected
    for _ in range(3):
        run.train_epoch()
        assert lin_weights(run.model).min() == 0
    assert lin_weights(run.model).max() > 0


def test_squeezes_trunk_is_not_projected() -> None:
    """The original clamps every 1x1 convolution, those of the frozen trunk too."""
    weights = trunk_weights("squeeze")
    run = Trainer(new_model("squeeze", weights=weights), [{}], SHORT, progress=False)
    expand = run.model.net.state_dict()["slice2.3.squeeze.weight"]
    assert torch.equal(expand, weights["features.3.squeeze.weight"])
    assert expand.min() < 0


def test_initializations() -> None:
    ones, published, random = (model(initialization=k) for k in ("ones", "pretrained", "random"))
    assert torch.equal(lin_weights(ones), torch.ones(1152))
    expected = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)
    assert torch.equal(lin_weights(published), lin_weights(expected))
    before = torch.get_rng_state()
    assert torch.equal(lin_weights(random), lin_weights(model(initialization="random")))
    assert not torch.equal(lin_weights(random), lin_weights(model(seed=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_decay_makes_weights_smaller(items: list[toy.Item]) -> None:
    sums = []
    for weight_decay in (0.0, 30.0):
        run = trainer(items, replaced(SHORT, weight_decay=weight_decay), initialization="ones")
        for _ in range(3):
            run.train_epoch()
        sums.append(lin_weights(run.model).sum().item())
    assert sums[1] < 0.9 * sums[0]


@pytest.mark.parametrize("cache", [True, False])
def test_dropout_takes_part(items: list[toy.Item], cache: bool) -> None:
    results = []
    for dropout in (0.0, 0.5, 0.9):
        run = trainer(items, replaced(SHORT, dropout=dropout, cache=cache))
        run.train_epoch()
        results.append(lin_weights(run.model))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


# --------------------------------------------------------------------------- runs and resume


@pytest.mark.parametrize(
    ("mode", "cache"), [("lin", True), ("lin", False), ("tune", True), ("scratch", True)]
)
def test_a_resumed_run_has_the_same_bits(
    items: list[toy.Item], tmp_path: Path, mode: str, cache: bool
) -> None:
    options = replaced(SHORT, cache=cache)
    whole, interrupted, resumed = (
        trainer(items, options, mode, validation={"val": items[:3]}) for _ in range(3)
    )
    whole.run(tmp_path / "whole", curve=False)
    interrupted.train_epoch()
    interrupted.save(tmp_path / "parts", curve=False)
    torch.rand(3)  # what else the process draws does not matter
    resumed.run(tmp_path / "parts", resume=True, curve=False)

    def without_time(records: list[EpochRecord]) -> list[dict[str, Any]]:
        return [{**vars(record), "seconds": 0} for record in records]

    assert without_time(resumed.history) == without_time(whole.history)
    for part in ("model", "ranking_loss"):
        one, other = (parameters(getattr(run, part)) for run in (whole, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one)
    states = [
        torch.load(tmp_path / name / "model.pth", weights_only=True) for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_seed_decides(items: list[toy.Item]) -> None:
    runs = [trainer(items, replaced(SHORT, seed=seed)) for seed in (0, 0, 1)]
    before = torch.get_rng_state()
    for run in runs:
        run.train_epoch()
    assert torch.equal(torch.get_rng_state(), before)
    weights = [lin_weights(run.model) for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_files_of_a_run(items: list[toy.Item], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the learning curve is drawn with Matplotlib")
    run = trainer(items, validation={"a": items[:3], "b": items[3:7]})
    history = run.run(tmp_path / "deep" / "run")
    folder = tmp_path / "deep" / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("model.pth", "training_state.pth", "log.csv", "training.json", "learning_curve.png")
    }
    summary = json.loads((folder / "training.json").read_text())
    assert [EpochRecord(**record) for record in summary["history"]] == history
    assert summary["options"]["batch_size"] == 4
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for row, record in zip(rows, history):
        assert float(row["loss"]) == pytest.approx(record.loss, rel=1e-6)
        assert float(row["2afc:b"]) == pytest.approx(record.validation_2afc["b"], rel=1e-6)
        mean = (float(row["2afc:a"]) + float(row["2afc:b"])) / 2
        assert float(row["validation_2afc"]) == pytest.approx(mean, rel=1e-6)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_epoch_is_saved_when_it_is_time(
    items: list[toy.Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for interval, expected in ((0.0, [1, 2, 3]), (1e9, [3])):
        monkeypatch.setattr(training, "_SAVE_INTERVAL", interval)
        run, saved = trainer(items), []
        monkeypatch.setattr(run, "save", lambda *a, run=run, to=saved, **k: to.append(run.epoch))
        run.run(tmp_path, curve=False)
        assert saved == expected


def test_progress_is_shown(
    items: list[toy.Item],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Trainer(model(), items, SHORT).run(tmp_path / "unseen", curve=False)
    assert capsys.readouterr() == ("", "")  # where nobody looks
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    Trainer(model(), items, SHORT).run(tmp_path / "seen", curve=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 3/3" in err and "30/30" in err and "loss=" in err


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "epochs is -1, expected at least 0"),
        ({"epochs": 0, "decay_epochs": 0}, "nothing to train"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, expected at least 0 and below 1"),
        ({"beta1": -0.5}, "beta1 is -0.5"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**changes)


def test_models_that_cannot_be_trained(items: list[toy.Item]) -> None:
    weights = trunk_weights("alex")

    def lpips(**options: Any) -> lpips_fast.LPIPS:
        return lpips_fast.LPIPS(weights=weights, verbose=False, **options)

    with pytest.raises(ValueError, match="baseline"):
        Trainer(lpips(lpips=False), items)
    with pytest.raises(ValueError, match="one distance an image"):
        Trainer(lpips(spatial=True), items)
    with pytest.raises(ValueError, match="use_dropout=False"):
        Trainer(lpips(use_dropout=False), items)
    Trainer(lpips(use_dropout=False), items, TrainingOptions(dropout=0), progress=False)
    with pytest.raises(ValueError, match="data set is empty"):
        Trainer(lpips(), [])
    with pytest.raises(ValueError, match="mode is 'all', expected one of lin, tune, scratch"):
        new_model(mode="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initialization is 'zeros', expected one of random"):
        new_model(initialization="zeros")  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", [True, False])
def test_divergence_is_told(items: list[toy.Item], cache: bool) -> None:
    run = trainer(items, replaced(SHORT, learning_rate=1e38, cache=cache))
    with pytest.raises(TrainingError, match=r"diverged in epoch \d.*lower learning rate than 1e"):
        for _ in range(3):
            run.train_epoch()


def test_folders_that_cannot_be_used(items: list[toy.Item], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no training run to resume"):
        trainer(items).run(tmp_path, resume=True)
    trainer(items).run(tmp_path, curve=False)
    with pytest.raises(TrainingError, match="already holds a training run"):
        trainer(items).run(tmp_path, curve=False)


class Named(list):
    """Items with a fingerprint, as data sets of files have one."""

    fingerprint = "other"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: trainer(i, replaced(SHORT, batch_size=5)), "began with batch_size=4, and now"),
        (lambda i: trainer(i, replaced(SHORT, seed=1)), "began with seed=0"),
        (lambda i: trainer(i, mode="tune"), "began with learns_trunk=False"),
        (lambda i: trainer(i[:9]), "began with judgements=10, and now it is 9"),
        (lambda i: trainer(Named(i)), "began with other judgements"),
        (
            lambda i: trainer(i, weights=trunk_weights("alex", seed=1)),
            "began with other weights of the trunk",
        ),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(
    items: list[toy.Item],
    tmp_path: Path,
    make: Callable[[list[toy.Item]], Trainer],
    message: str,
) -> None:
    run = trainer(items)
    run.train_epoch()
    run.save(tmp_path, curve=False)
    with pytest.raises(TrainingError, match=message):
        make(items).run(tmp_path, resume=True)


def test_a_damaged_state_is_told(items: list[toy.Item], tmp_path: Path) -> None:
    state = tmp_path / "training_state.pth"
    state.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        trainer(items).run(tmp_path, resume=True)
    torch.save({"lin0": torch.zeros(1)}, state)
    with pytest.raises(TrainingError, match="not the state of a training run"):
        trainer(items).run(tmp_path, resume=True)


# --------------------------------------------------------------------------- files that suffer


def saved_state(items: list[toy.Item], folder: Path) -> dict[str, Any]:
    run = trainer(items, validation={"val": items[:3]})
    run.train_epoch()
    run.save(folder, curve=False)
    return torch.load(folder / "training_state.pth", weights_only=True)


def first_name(state: dict[str, Any]) -> str:
    return next(iter(state["learned"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(epoch=None), "its epoch is None, expected 0 to 3"),
        (lambda s: s.update(epoch=4), "its epoch is 4, expected 0 to 3"),
        (lambda s: s.update(epoch=2), "it has 1 records of 2 epochs"),
        (lambda s: s.pop("history"), "it has no records of 1 epochs"),
        (lambda s: s["history"][0].pop("loss"), "its record of epoch 1 is none"),
        (lambda s: s["history"][0].update(epoch=3), "its record of epoch 1 is none"),
        (lambda s: s["history"][0].update(loss=float("nan")), "what is no finite number"),
        (lambda s: s["history"][0].update(validation_2afc=[0.5]), "no scores by name"),
        (lambda s: s.update(people_2afc="many"), "people_2afc is 'many', expected a number"),
        (lambda s: s.update(learned=[]), "learned is list, expected tensors by name"),
        (lambda s: s["learned"].pop(first_name(s)), "learned lacks "),
        (lambda s: s["learned"].update(more=torch.ones(1)), "learned has more, which the model"),
        (lambda s: s["learned"].update({first_name(s): 1}), "is 1, expected a tensor"),
        (
            lambda s: s["learned"].update({first_name(s): torch.ones(3)}),
            r"is torch.float32 \(3,\), expected torch.float32 \(1, 64, 1, 1\)",
        ),
        (lambda s: s["learned"][first_name(s)].fill_(float("inf")), "holds NaN or infinity"),
        (lambda s: s["ranking_loss"].clear(), "ranking_loss lacks "),
        (lambda s: s.update(optimizer=0), "its optimizer is none"),
        (lambda s: s["optimizer"]["param_groups"].pop(), "has other parameters or settings"),
        (
            lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=9.0),
            "has other parameters or settings",
        ),
        (lambda s: s["optimizer"]["state"].update({99: {}}), "moments of parameter 99"),
        (lambda s: s["optimizer"]["state"][0].pop("step"), "moments of parameter 0 are none"),
        (
            lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
            r"exp_avg of parameter 0 is torch.float32 \(3,\), expected",
        ),
        (lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1), "0 are negative"),
    ],
)
def test_a_state_that_lacks_something_is_refused_and_nothing_is_taken_from_it(
    items: list[toy.Item], tmp_path: Path, damage: Callable[[Any], Any], message: str
) -> None:
    state = saved_state(items, tmp_path)
    damage(state)
    torch.save(state, tmp_path / "training_state.pth")
    run = trainer(items, validation={"val": items[:3]})
    before = parameters(run.model)
    with pytest.raises(TrainingError, match=f"training_state.pth is damaged, .*{message}"):
        run.run(tmp_path, resume=True, curve=False)
    assert run.epoch == 0 and run.history == []
    assert all(torch.equal(value, before[name]) for name, value in parameters(run.model).items())


def test_a_half_written_state_is_told_at_any_length(items: list[toy.Item], tmp_path: Path) -> None:
    saved_state(items, tmp_path)
    state = tmp_path / "training_state.pth"
    whole = state.read_bytes()
    run = trainer(items, validation={"val": items[:3]})
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        state.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"training_state\.pth"):
            run.run(tmp_path, resume=True, curve=False)
    state.write_bytes(whole)
    run.run(tmp_path, resume=True, curve=False)
    assert run.epoch == 3


@pytest.mark.parametrize(
    "name", ["model.pth", "log.csv", "training.json", "learning_curve.png", "training_state.pth"]
)
def test_a_save_that_fails_leaves_the_last_one_whole(
    items: list[toy.Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("matplotlib", reason="the learning curve is drawn with Matplotlib")
    run = trainer(items)
    run.train_epoch()
    run.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    run.train_epoch()
    with pytest.raises(
        TrainingError,
        match=f"cannot write .*{name}: No space left on device; the run as it was saved before",
    ):
        run.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before.keys()  # no halves left
    for kept in (name, "training_state.pth"):
        assert (tmp_path / kept).read_bytes() == before[kept]
    monkeypatch.undo()
    resumed = trainer(items)
    resumed.run(tmp_path, resume=True, curve=False)
    assert resumed.epoch == 3


def test_folders_that_take_no_files(items: list[toy.Item], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder, reason in ((file, "it is no folder"), (file / "run", "Not a directory")):
        with pytest.raises(TrainingError, match=f"cannot write to {folder}: {reason}"):
            trainer(items).run(folder, curve=False)
    assert file.read_text() == "mine"
    (tmp_path / "run" / "model.pth").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"model\.pth: it is not a regular file"):
        trainer(items).run(tmp_path / "run", curve=False)


def test_two_runs_in_one_folder(items: list[toy.Item], tmp_path: Path) -> None:
    refused = pytest.raises(TrainingError, match=r"another run writes to .*: wait for it to end")
    with RunFolder(tmp_path), refused:
        trainer(items).run(tmp_path, curve=False)
    assert trainer(items).run(tmp_path, curve=False)


def test_a_folder_that_vanishes_is_made_again(
    items: list[toy.Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_INTERVAL", 0.0)
    folder = tmp_path / "run"
    run = trainer(items)
    train_epoch = run.train_epoch

    def epoch_without_a_folder() -> EpochRecord:
        if run.epoch == 1:
            shutil.rmtree(folder)
        return train_epoch()

    monkeypatch.setattr(run, "train_epoch", epoch_without_a_folder)
    run.run(folder, curve=False)
    assert len((folder / "log.csv").read_text().splitlines()) == 1 + 3
    assert trainer(items).run(folder, resume=True, curve=False) == run.history


def test_a_folder_that_another_took_is_left_alone(
    items: list[toy.Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run = trainer(items)
    train_epoch = run.train_epoch

    def epoch_elsewhere() -> EpochRecord:
        if run.epoch == 1:
            folder.rename(tmp_path / "moved")
            folder.mkdir()
            (folder / "model.pth").write_text("another's")
        return train_epoch()

    monkeypatch.setattr(run, "train_epoch", epoch_elsewhere)
    with pytest.raises(TrainingError, match="was replaced by another folder while a run wrote"):
        run.run(folder, curve=False)
    assert (folder / "model.pth").read_text() == "another's"
