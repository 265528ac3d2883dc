"""``lpips-fast recommend``: which trunk to use, within limits of agreement, time and memory."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from typing import Any, get_args

import torch

from ..choice.recommendation import PEOPLE_2AFC, Recommendation, recommend_trunk
from ..choice.trunk_costs import Mode, cache_folder
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, add_json_argument, is_quiet, print_to
from .device import add_device_argument, to_device
from .model import DTYPES
from .spellings import as_options


def _add_recommend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-2afc",
        type=float,
        metavar="S",
        help=f"least agreement with people, as published, for example 0.695 (people reach "
        f"{PEOPLE_2AFC.overall})",
    )
    parser.add_argument(
        "--max-latency-ms", type=float, metavar="MS", help="most time for one pair of images"
    )
    parser.add_argument(
        "--max-memory-mb", type=float, metavar="MIB", help="most memory, weights included"
    )
    parser.add_argument(
        "--size",
        type=argument_types.image_size,
        default=(256, 256),
        metavar="N|WxH",
        help="of the images (default: 256)",
    )
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="forward",
        help="what is timed: a distance (forward, default), or its gradient too (step)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the trunk (default: float32)"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--refresh", action="store_true", help="measure again what an earlier call measured"
    )
    add_json_argument(parser)


def _run_recommend(options: argparse.Namespace) -> None:
    width, height = options.size
    to_device(torch.empty(0), options.device)
    with contextlib.redirect_stdout(sys.stderr):
        recommendation = recommend_trunk(
            options.min_2afc,
            options.max_latency_ms,
            options.max_memory_mb,
            device=options.device,
            image_size=(height, width),
            mode=options.mode,
            dtype=DTYPES[options.dtype],
            refresh=options.refresh,
            progress=not is_quiet(),
        )
    if options.json:
        print_to(json.dumps(_report(recommendation), indent=2, allow_nan=False), sys.stdout)
    else:
        print_to(as_options(str(recommendation)), sys.stdout)
    if recommendation.choice is None:
        raise CommandError("no trunk keeps all limits")


def _report(recommendation: Recommendation) -> dict[str, Any]:
    fields = {f.name: getattr(recommendation, f.name) for f in dataclasses.fields(recommendation)}
    candidates = [dataclasses.asdict(c) for c in recommendation.candidates]
    return {
        **fields,
        "reasons": list(recommendation.reasons),
        "candidates": [_without_nan(c) for c in candidates],
        "limits": dict(recommendation.limits),
        "people": dataclasses.asdict(PEOPLE_2AFC),
        "source": "Zhang et al., CVPR 2018, Table 5 (arXiv:1801.03924v2)",
        "cache": str(cache_folder()),
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity: what is not known is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COMMAND = Command(
    "say which trunk to use, by agreement with people, time, memory",
    _add_recommend_arguments,
    _run_recommend,
)
