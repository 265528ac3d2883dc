"""``lpips-fast train DIR… -o OUT``: learn LPIPS's weights from human judgements."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..judgements.datasets import TwoAFCDataset
from ..judgements.learning_curve import require_matplotlib
from ..judgements.training import (
    CURVE_FILE,
    LOG_FILE,
    MODEL_FILE,
    Initialization,
    Mode,
    Trainer,
    TrainingOptions,
    new_model,
)
from . import argument_types
from .command import Command, CommandError, is_quiet, print_to, tell
from .device import to_device
from .judgement_data import add_judgement_arguments
from .model import add_model_arguments

if TYPE_CHECKING:
    from ..lpips import LPIPS


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = TrainingOptions()
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        help="2AFC sub-sets (ref/ p0/ p1/ judge/), or folders above them, such as 2afc/train",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="a folder")
    parser.add_argument(
        "--validation",
        action="append",
        default=[],
        metavar="DIR",
        help="2AFC sub-sets to score after each epoch; may be given several times",
    )
    add_model_arguments(parser, dtype=False, checkpoint=False)
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="lin",
        help="what learns: the linear weights (lin, default), the trunk too (tune), or the trunk "
        "too and from random weights (scratch)",
    )
    parser.add_argument(
        "--init",
        choices=get_args(Initialization),
        default="random",
        help="linear weights to begin with (default: random)",
    )
    numbers = (
        ("--epochs", int, defaults.epochs, "epochs at the full learning rate"),
        ("--decay-epochs", int, defaults.decay_epochs, "epochs in which the rate falls to 0"),
        ("--learning-rate", float, defaults.learning_rate, "of Adam"),
        ("--batch", argument_types.positive, defaults.batch_size, "triplets a step"),
        ("--dropout", float, defaults.dropout, "rate before the linear layers"),
        ("--weight-decay", float, defaults.weight_decay, "of the metric's weights, decoupled"),
        ("--seed", int, defaults.seed, "the same seed gives the same bits on one machine"),
    )
    for flag, kind, default, text in numbers:
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="run the frozen trunk in every epoch, not once: slower, with the original's dropout",
    )
    add_judgement_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in OUT, with the same options"
    )
    parser.add_argument("--no-curve", action="store_true", help=f"do not draw {CURVE_FILE}")


def _run_train(options: argparse.Namespace) -> None:
    if options.baseline:
        raise CommandError(
            "--baseline has no linear weights to learn; --init ones begins training with it"
        )
    if not options.no_curve:
        require_matplotlib()
    training_options = TrainingOptions(
        epochs=options.epochs,
        decay_epochs=options.decay_epochs,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        batch_size=options.batch,
        dropout=options.dropout,
        cache=not options.no_cache,
        seed=options.seed,
    )
    found = [TwoAFCDataset.find(folder) for folder in options.folders]
    dataset = TwoAFCDataset([path for paths in found for path in paths.values()], options.resize)
    validation = {}
    for root in options.validation:
        for name, subset in TwoAFCDataset.open_all(root, options.resize).items():
            validation[name if name not in validation else f"{root}/{name}"] = subset

    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(
            _model(options),
            dataset,
            training_options,
            validation=validation,
            workers=options.workers,
            progress=not is_quiet(),
        )
        trainer.run(options.output, resume=options.resume, curve=not options.no_curve)
    print_to(_report(options, trainer), sys.stdout)


def _model(options: argparse.Namespace) -> LPIPS:
    if options.random_trunk and options.mode != "scratch":
        tell("warning", "the trunk is random (--random-trunk): the result is not LPIPS")
    model = new_model(
        options.net,
        options.mode,
        initialization=options.init,
        weights=options.weights,
        random_trunk=options.random_trunk,
        version=options.version,
        seed=options.seed,
        normalization=options.normalization,
        layers=options.layers,
    )
    return to_device(model, options.device)


def _report(options: argparse.Namespace, trainer: Trainer) -> str:
    first, last = trainer.history[0], trainer.history[-1]
    seconds = sum(record.seconds for record in trainer.history)
    once = ", the trunk once" if trainer.caches else ""
    lines = [
        f"Trained LPIPS {options.net}, mode {options.mode}, on {len(trainer.dataset)} judgements: "
        f"{len(trainer.history)} epochs in {seconds:.1f} s{once}",
        f"{'':<24}{'first epoch':>14}{'last':>10}",
        f"{'ranking loss':<24}{first.loss:>14.4f}{last.loss:>10.4f}",
        _score_line("2AFC training", first.train_2afc, last.train_2afc),
    ]
    for name, score in last.validation_2afc.items():
        lines.append(_score_line(f"2AFC {name}", first.validation_2afc[name], score))
    if first.mean_validation_2afc is not None and len(last.validation_2afc) > 1:
        assert last.mean_validation_2afc is not None
        means = first.mean_validation_2afc, last.mean_validation_2afc
        lines.append(_score_line("2AFC validation, mean", *means))
    if trainer.people_2afc is not None:
        lines.append(f"{'one more person':<24}{'':>14}{100 * trainer.people_2afc:>8.2f} %")
    other = "" if options.normalization == "l2" else f"normalization={options.normalization!r}, "
    other += "" if options.layers is None else f"layers={options.layers}, "
    files = [LOG_FILE] if options.no_curve else [LOG_FILE, CURVE_FILE]
    lines.append(
        f"{options.output / MODEL_FILE}: load it with LPIPS(net={options.net!r}, "
        f"{other}model_path=…)"
    )
    lines.append(", ".join(str(options.output / name) for name in files))
    return "\n".join(lines)


def _score_line(name: str, first: float, last: float) -> str:
    return f"{name:<24}{100 * first:>12.2f} %{100 * last:>8.2f} %"


COMMAND = Command("learn LPIPS from human judgements", _add_train_arguments, _run_train)
