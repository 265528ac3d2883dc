"""``lpips-fast weights``: where the trunks' weights are, and what they are."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..trunk.table import TRUNKS
from ..weights import (
    MIRROR_VARIABLE,
    OFFLINE_VARIABLE,
    TRUNK_SOURCES,
    WEIGHTS_VARIABLE,
    load_trunk_weights,
)
from ..weights.inventory import TrunkState, inspect_located, inspect_path, pack
from .command import (
    Command,
    CommandError,
    add_common_arguments,
    add_json_argument,
    is_quiet,
    print_to,
)
from .outputs import add_output_argument, settle_output

_KINDS = {
    "env": f"in the folder {WEIGHTS_VARIABLE}",
    "package": "in the package",
    "hub": "official checkpoint in torch's hub cache",
    "stripped-cache": "stripped copy in torch's hub cache",
}
_NETS = (*TRUNKS, "all")


def _add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_list)
    parser.add_argument(
        "--download",
        action="append",
        choices=_NETS,
        default=[],
        metavar="NET",
        help="fetch NET, then list",
    )
    add_json_argument(parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, action: Callable[[argparse.Namespace], None], summary: str) -> Any:
        description = f"{summary[0].upper()}{summary[1:]}."
        sub = actions.add_parser(name, help=summary, description=description, allow_abbrev=False)
        sub.set_defaults(action=action)
        # Without SUPPRESS the default here would undo the option before the action's name.
        sub.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="one JSON object on standard output, nothing else",
        )
        add_common_arguments(sub, default=argparse.SUPPRESS)
        return sub

    add("list", _list, "where the trunks' weights are, and if they are official (default)")
    fetch = add("fetch", _fetch, "have weights ready for use without a network, then list")
    fetch.add_argument(
        "nets",
        nargs="*",
        metavar="NET",
        type=_net,  # not `choices`, which refuses that there is none
        help=f"{', '.join(TRUNKS)} or all (default); nothing is downloaded twice",
    )
    verify = add("verify", _verify, "fail unless all weights that are here are the official ones")
    verify.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, or folders as pack writes them (default: what the search finds)",
    )
    packing = add("pack", _pack, "write weights into a folder for machines without a network")
    add_output_argument(packing, Path, "FOLDER", "made if need be")
    packing.add_argument(
        "--net",
        action="append",
        choices=_NETS,
        default=[],
        help="may be repeated (default: all)",
    )


def _net(name: str) -> str:
    if name not in _NETS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_NETS)}")
    return name


def _run_weights(options: argparse.Namespace) -> None:
    options.action(options)


def _list(options: argparse.Namespace) -> None:
    _get(options.download)
    trunks = {net: _located(net) for net in TRUNK_SOURCES}
    environment = {
        name: os.environ.get(name)
        for name in (WEIGHTS_VARIABLE, "TORCH_HOME", MIRROR_VARIABLE, OFFLINE_VARIABLE)
    }
    report = {
        "trunks": trunks,
        "hub_cache": str(Path(torch.hub.get_dir()) / "checkpoints"),
        "environment": environment,
    }
    lines = []
    for net, trunk in trunks.items():
        lines.append(f"{net:<8}  {trunk['state']}")
        if trunk["path"]:
            lines.append(f"{'':<8}  {trunk['path']} ({_KINDS[trunk['source']]})")
    lines.append(f"torch's hub cache  {report['hub_cache']}")
    lines += [f"{name}={value}" for name, value in environment.items() if value]
    _print(options, report, lines)
    _fail_for(net for net, trunk in trunks.items() if trunk["usable"] is False)


def _fetch(options: argparse.Namespace) -> None:
    options.download = options.nets or ["all"]
    _list(options)


def _verify(options: argparse.Namespace) -> None:
    states = []
    if options.paths:
        for path in options.paths:
            states += inspect_path(path)
    else:
        states = [found[1] for net in TRUNK_SOURCES if (found := inspect_located(net))]
    _print_states(options, states)
    _fail_for(state.net for state in states if not state.usable)
    others = [str(state.path) for state in states if not state.official]
    if others:
        raise CommandError(f"these are not the official weights: {', '.join(others)}")


def _pack(options: argparse.Namespace) -> None:
    settle_output(options)
    with contextlib.redirect_stdout(sys.stderr):
        states = pack(options.output, _named(options.net or ["all"]), progress=not is_quiet())
    _print_states(options, states)
    if not options.json:
        print_to(f"{WEIGHTS_VARIABLE}={options.output.expanduser().resolve()}", sys.stdout)


# ---------------------------------------------------------------------------------------------


def _named(nets: Iterable[str]) -> list[str]:
    return list(TRUNKS) if "all" in nets else list(dict.fromkeys(nets))


def _get(nets: Iterable[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        for net in _named(nets):
            load_trunk_weights(net, progress=not is_quiet())


def _located(net: str) -> dict[str, Any]:
    found = inspect_located(net)
    if found is None:
        source = TRUNK_SOURCES[net]
        return {
            "path": None,
            "source": None,
            "usable": None,
            "official": None,
            "state": f"not here; {source.url}, {source.download_mib:.0f} MiB",
        }
    location, state = found
    return {**_facts(state), "source": location.kind}


def _facts(state: TrunkState) -> dict[str, Any]:
    return {
        "path": str(state.path),
        "usable": state.usable,
        "official": state.official,
        "features_sha256": state.features_sha256,
        "state": _in_words(state),
    }


def _in_words(state: TrunkState) -> str:
    if state.features_sha256 is None:
        return f"cannot be used: {state.problem}"
    digest = f"SHA-256 of the convolutions {state.features_sha256[:16]}…"
    if state.official:
        return f"the official weights ({digest})"
    expected = TRUNK_SOURCES[state.net].features_sha256[:16]
    return f"not the official weights ({digest}, expected {expected}…)"


def _print_states(options: argparse.Namespace, states: list[TrunkState]) -> None:
    lines = [f"{state.net:<8}  {_in_words(state)}\n{'':<8}  {state.path}" for state in states]
    facts = [{"net": state.net, **_facts(state)} for state in states]
    _print(options, {"files": facts}, lines or ["no weights are here"])


def _print(options: argparse.Namespace, report: dict[str, Any], lines: list[str]) -> None:
    if options.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_to("\n".join(lines), sys.stdout)


def _fail_for(unusable: Iterable[str]) -> None:
    if nets := list(unusable):
        raise CommandError(f"the weights of {', '.join(nets)} cannot be used")


COMMAND = Command(
    "show where the trunks' weights are; fetch, verify, pack them",
    _add_weights_arguments,
    _run_weights,
)
