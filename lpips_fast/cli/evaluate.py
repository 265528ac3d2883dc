"""``lpips-fast evaluate --2afc DIR --jnd DIR``: how well a metric agrees with people."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..judgements.datasets import JNDDataset, TwoAFCDataset
from ..judgements.scoring import evaluate_2afc, evaluate_jnd
from ..version import __version__
from ..weights import lpips_state_dict, read_state_dict
from .command import Command, CommandError, add_json_argument, print_to
from .device import to_device
from .judgement_data import add_judgement_arguments
from .model import add_model_arguments, in_dtype, load_model, metric_name, model_options

if TYPE_CHECKING:
    from ..lpips import LPIPS


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--2afc",
        dest="two_afc",
        action="append",
        default=[],
        metavar="DIR",
        help="2AFC sub-sets (ref/ p0/ p1/ judge/), or a folder above them; may be repeated",
    )
    parser.add_argument(
        "--jnd",
        action="append",
        default=[],
        metavar="DIR",
        help="JND sub-sets (p0/ p1/ same/), or a folder above them; may be repeated",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="learned weights, such as the model.pth of train"
    )
    add_judgement_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="default: 50")
    add_json_argument(parser)


def _run_evaluate(options: argparse.Namespace) -> None:
    if not options.two_afc and not options.jnd:
        raise CommandError("nothing to evaluate on: give --2afc DIR, --jnd DIR, or both")
    if options.batch_size < 1:
        raise CommandError(f"--batch-size is {options.batch_size}, expected at least 1")
    triplets = _subsets(TwoAFCDataset, options.two_afc, options.size)
    pairs = _subsets(JNDDataset, options.jnd, options.size)
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options) if options.checkpoint is None else _load_checkpoint(options)
        common: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers}
        two_afc = {
            name: evaluate_2afc(model, dataset, progress=name, **common)
            for name, dataset in triplets.items()
        }
        jnd = {
            name: evaluate_jnd(model, dataset, progress=name, **common)
            for name, dataset in pairs.items()
        }
    scores = {
        "2afc": [
            {"subset": name, "judgements": len(r.judge), "score": r.score, "people": r.people}
            for name, r in two_afc.items()
        ],
        "jnd": [
            {"subset": name, "judgements": len(r.same), "score": r.score} for name, r in jnd.items()
        ],
    }
    print_to(_as_json(options, scores) if options.json else _as_table(options, scores), sys.stdout)


def _subsets(kind: Any, roots: list[str], size: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for root in roots:
        for name, dataset in kind.open_all(root, size).items():
            found[name if name not in found else f"{root}/{name}"] = dataset
    return found


def _load_checkpoint(options: argparse.Namespace) -> LPIPS:
    """A model with learned weights; a trunk in the checkpoint spares the search for another."""
    from ..lpips import LPIPS

    for flag in ("baseline", "random_trunk"):
        if getattr(options, flag):
            name = flag.replace("_", "-")
            raise CommandError(f"--checkpoint and --{name} exclude each other: leave one out")
    checkpoint = read_state_dict(options.checkpoint)
    keys = lpips_state_dict(checkpoint, options.net, options.checkpoint).keys()
    holds_trunk = any(key.startswith("net.") for key in keys)
    if holds_trunk and options.weights:
        raise CommandError(f"{options.checkpoint} holds a trunk of its own: leave out --weights")
    try:
        model = LPIPS(
            net=options.net,
            version=options.version,
            pnet_rand=holds_trunk,
            model_path=options.checkpoint,
            weights=options.weights,
            normalization=options.normalization,
            verbose=False,
            **model_options(options),
        )
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise CommandError(
            f"{options.checkpoint} does not fit trunk {options.net!r}: "
            "name its own trunk with --net"
        ) from error
    if holds_trunk:
        absent = [key for key in model.net.state_dict() if f"net.{key}" not in keys]
        if absent:
            raise CommandError(
                f"{options.checkpoint} holds only a part of trunk {options.net!r}: "
                f"'net.{absent[0]}' is missing"
            )
    return to_device(in_dtype(model, options), options.device)


# ------------------------------------------------------------------------------- output


def _metric(options: argparse.Namespace) -> str:
    learned = f", weights of {options.checkpoint}" if options.checkpoint else ""
    return f"{metric_name(options)}{learned}"


def _as_json(options: argparse.Namespace, scores: dict[str, list[dict[str, Any]]]) -> str:
    report = {
        "metric": _metric(options),
        "size": options.size,
        **{kind: {"subsets": rows, "mean": _mean(rows)} for kind, rows in scores.items() if rows},
        "dtype": options.dtype,
        "device": str(options.device),
        "package_version": __version__,
        "torch_version": torch.__version__,
    }
    return json.dumps(report, indent=2, allow_nan=False)


def _as_table(options: argparse.Namespace, scores: dict[str, list[dict[str, Any]]]) -> str:
    lines = [_metric(options)]
    titles = {"2afc": "2AFC score, %", "jnd": "JND average precision, %"}
    for kind, rows in scores.items():
        if not rows:
            continue
        if len(rows) > 1:
            rows = [*rows, {"subset": "mean", "judgements": None, **_mean(rows)}]
        width = max(len(titles[kind]), *(len(row["subset"]) for row in rows))
        people = f"{'people':>10}" if kind == "2afc" else ""
        lines += ["", f"{titles[kind]:<{width}}{'judgements':>13}{'metric':>10}{people}"]
        for row in rows:
            count = "" if row["judgements"] is None else row["judgements"]
            figures = [row["score"]] + ([row["people"]] if kind == "2afc" else [])
            cells = "".join(f"{100 * figure:>10.2f}" for figure in figures)
            lines.append(f"{row['subset']:<{width}}{count:>13}{cells}")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over sub-sets, each of which counts as much as the others, as in the paper."""
    return {
        name: sum(row[name] for row in rows) / len(rows)
        for name in ("score", "people")
        if name in rows[0]
    }


COMMAND = Command(
    "score a metric by its agreement with human judgements", _add_evaluate_arguments, _run_evaluate
)
