"""``lpips-fast evaluate --2afc DIR --jnd DIR``: how well a metric agrees with people."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

import torch

from ..judgements.datasets import JNDDataset, TwoAFCDataset
from ..judgements.scoring import evaluate_2afc, evaluate_jnd
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, add_json_argument, is_quiet, print_to
from .judgement_data import add_judgement_arguments
from .model import add_model_arguments, load_model, metric_name


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
    add_judgement_arguments(parser)
    parser.add_argument(
        "--batch",
        type=argument_types.positive,
        default=50,
        metavar="N",
        help="judgements measured at once (default: 50)",
    )
    add_json_argument(parser)


def _run_evaluate(options: argparse.Namespace) -> None:
    if not options.two_afc and not options.jnd:
        raise CommandError("nothing to evaluate on: give --2afc DIR, --jnd DIR, or both")
    triplets = _subsets(TwoAFCDataset, options.two_afc, options.resize)
    pairs = _subsets(JNDDataset, options.jnd, options.resize)
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options)
        common: dict[str, Any] = {"batch_size": options.batch, "workers": options.workers}
        two_afc = {
            name: evaluate_2afc(model, dataset, progress=_label(name), **common)
            for name, dataset in triplets.items()
        }
        jnd = {
            name: evaluate_jnd(model, dataset, progress=_label(name), **common)
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


# ------------------------------------------------------------------------------- output


def _as_json(options: argparse.Namespace, scores: dict[str, list[dict[str, Any]]]) -> str:
    report = {
        "metric": metric_name(options),
        "resize": options.resize,
        **{kind: {"subsets": rows, "mean": _mean(rows)} for kind, rows in scores.items() if rows},
        "dtype": options.dtype,
        "device": str(options.device),
        "package_version": __version__,
        "torch_version": torch.__version__,
    }
    return json.dumps(report, indent=2, allow_nan=False)


def _as_table(options: argparse.Namespace, scores: dict[str, list[dict[str, Any]]]) -> str:
    lines = [metric_name(options)]
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


def _label(name: str) -> str | None:
    return None if is_quiet() else name


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
