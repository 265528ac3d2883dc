"""``lpips-fast weights``: where each trunk's weights are, and if they are the official ones."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..trunk.table import TRUNKS
from ..weights import (
    MIRROR_VARIABLE,
    OFFLINE_VARIABLE,
    TRUNK_SOURCES,
    WEIGHTS_VARIABLE,
    TrunkLocation,
    TrunkSource,
    WeightsError,
    _sha256,
    _stripped_metadata,
    load_trunk_weights,
    locate_trunk_weights,
)
from .command import Command, CommandError, add_json_argument, print_to, sentence

_KINDS = {
    "env": f"in the folder {WEIGHTS_VARIABLE}",
    "hub": "official checkpoint in torch's hub cache",
    "stripped-cache": "stripped copy in torch's hub cache",
}


def _add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--download",
        action="append",
        choices=(*TRUNKS, "all"),
        default=[],
        metavar="NET",
        help="have the weights of alex, vgg, squeeze or all ready for use without a network; "
        "nothing is downloaded twice",
    )
    add_json_argument(parser)


def _run_weights(options: argparse.Namespace) -> None:
    wanted = TRUNKS if "all" in options.download else dict.fromkeys(options.download)
    with contextlib.redirect_stdout(sys.stderr):
        for net in wanted:
            load_trunk_weights(net)
    trunks = {net: _state(source) for net, source in TRUNK_SOURCES.items()}
    report = {
        "trunks": trunks,
        "hub_cache": str(Path(torch.hub.get_dir()) / "checkpoints"),
        "environment": {
            name: os.environ.get(name)
            for name in (WEIGHTS_VARIABLE, "TORCH_HOME", MIRROR_VARIABLE, OFFLINE_VARIABLE)
        },
    }
    if options.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_to(_text(report), sys.stdout)
    damaged = [net for net, trunk in trunks.items() if trunk["usable"] is False]
    if damaged:
        raise CommandError(f"the weights of {', '.join(damaged)} cannot be used")


def _state(source: TrunkSource) -> dict[str, Any]:
    """What is known of one trunk's weights; reads the whole file to be sure of it."""
    location = locate_trunk_weights(source.net)
    if location is None:
        return {
            "path": None,
            "source": None,
            "usable": None,
            "official": None,
            "state": f"not here; {source.url}, {source.download_mib:.0f} MiB",
        }
    official, state = _origin(source, location)
    usable = True
    try:
        load_trunk_weights(source.net, location.path)
    except WeightsError as error:
        usable, state = False, f"cannot be used: {sentence(error)}"
    return {
        "path": str(location.path),
        "source": location.kind,
        "usable": usable,
        "official": official,
        "state": state,
    }


def _origin(source: TrunkSource, location: TrunkLocation) -> tuple[bool | None, str]:
    """Whether the weights are the official ones, as far as hashes tell, and that in words."""
    stripped = _stripped_metadata(location.path) if location.kind == "stripped-cache" else {}
    digest = stripped.get("source_sha256") or _sha256(location.path)
    official = digest.startswith(source.hash_prefix)
    if official:
        made_of = "made of the official file" if stripped else "the official file"
        return True, f"{made_of} (SHA-256 {digest[:16]}…)"
    if location.kind == "env":
        # A file of convolutions alone has no published hash.
        return None, f"a file of your own (SHA-256 {digest[:16]}…)"
    return False, f"not the official file: SHA-256 {digest[:16]}…, expected {source.hash_prefix}…"


def _text(report: dict[str, Any]) -> str:
    lines = []
    for net, trunk in report["trunks"].items():
        lines.append(f"{net:<8}  {trunk['state']}")
        if trunk["path"]:
            lines.append(f"{'':<8}  {trunk['path']} ({_KINDS[trunk['source']]})")
    lines.append(f"torch's hub cache  {report['hub_cache']}")
    lines += [f"{name}={value}" for name, value in report["environment"].items() if value]
    return "\n".join(lines)


COMMAND = Command(
    "show where the trunks' weights are, and download them", _add_weights_arguments, _run_weights
)
