"""The arguments of every sub-command that measures with a model, and the model they ask for."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..normalization import LEARNED, NORMALIZATIONS, depends_on_batch
from ..trunk.table import TRUNKS, architecture, check_layers, trunk_spec
from ..weights import load_trunk_weights, locate_trunk_weights, lpips_state_dict, read_state_dict
from . import argument_types
from .command import CommandError, is_quiet, tell
from .device import add_device_argument, to_device

if TYPE_CHECKING:
    from ..lpips import LPIPS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


# Not those by which a pair's distance depends on what a command puts in a batch with it.
_NORMALIZATIONS = (*(kind for kind in NORMALIZATIONS if not depends_on_batch(kind)), LEARNED)  # type: ignore[arg-type]


def add_model_arguments(
    parser: argparse.ArgumentParser,
    *,
    all_nets: str | None = None,
    dtype: bool = True,
    checkpoint: bool = True,
    device: str | None = None,
) -> None:
    """Arguments for every sub-command that measures with a model; see :func:`load_model`.

    Args:
        all_nets: what ``--net all`` does, for a sub-command that takes it.
        dtype: whether the sub-command lets its user choose one; float32 otherwise.
        checkpoint: whether it takes learned weights.
        device: the default, where it is not that of all others.
    """
    nets, help_of_net = tuple(TRUNKS), "trunk (default: alex)"
    if all_nets is not None:
        nets, help_of_net = (*nets, "all"), f"{help_of_net}; all: {all_nets}"
    parser.add_argument("--net", choices=nets, default="alex", help=help_of_net)
    parser.add_argument(
        "--lpips-version",
        dest="version",
        choices=("0.1", "0.0"),
        default="0.1",
        help="of the metric, not of this package (default: 0.1)",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="unweighted features, no linear layers"
    )
    parser.add_argument(
        "--normalization",
        choices=_NORMALIZATIONS,
        default="l2",
        help="of the features; LPIPS is l2 (default); learned: what train learned with it",
    )
    parser.add_argument(
        "--layers",
        type=argument_types.layers,
        metavar="0,1,…",
        help="compare these layers only, which is faster and not LPIPS (default: all)",
    )
    if dtype:
        parser.add_argument(
            "--dtype",
            choices=tuple(DTYPES),
            default="float32",
            help="of the trunk (default: float32); below it distances are float32 still",
        )
    else:
        parser.set_defaults(dtype="float32")
    trunk = parser.add_mutually_exclusive_group()
    trunk.add_argument(
        "--weights", metavar="PATH", help="trunk weights: a file, or a folder that holds one"
    )
    trunk.add_argument(
        "--random-trunk",
        action="store_true",
        help="a random trunk, always the same: for trying things out, its numbers are not LPIPS",
    )
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            metavar="FILE",
            help="learned weights, such as the model.pth of train; a trunk in it is used too",
        )
    else:
        parser.set_defaults(checkpoint=None)
    add_device_argument(parser, device)


def load_model(options: argparse.Namespace) -> LPIPS:
    from ..lpips import LPIPS

    to_device(torch.empty(0), options.device)  # before weights are looked for, and downloaded
    if options.checkpoint is not None:
        return _load_checkpoint(options)
    if options.random_trunk:
        tell("warning", "the trunk is random (--random-trunk): these numbers are not LPIPS")
        torch.manual_seed(0)
    elif is_quiet() and options.weights is None:
        load_trunk_weights(options.net, progress=False)  # a download that shows no bar
    model = LPIPS(
        net=options.net,
        version=options.version,
        lpips=not options.baseline,
        pnet_rand=options.random_trunk,
        weights=options.weights,
        normalization=options.normalization,
        verbose=False,
        **model_options(options),
    )
    _tell_if_narrow(model)
    return to_device(in_dtype(model, options), options.device)


def _tell_if_narrow(model: LPIPS) -> None:
    if model.net_name != architecture(model.net_name):
        tell("note", f"the trunk is a narrow one, whose distances are not LPIPS: {model.net_name}")


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
    _tell_if_narrow(model)
    return to_device(in_dtype(model, options), options.device)


def weights_text(options: argparse.Namespace, net: str, model: LPIPS) -> str:
    """Which weights a model has: their files' names, and digests that no copying changes."""
    if options.random_trunk:
        source = "random, not LPIPS"
    elif options.weights:
        source = Path(options.weights).name
    elif options.checkpoint:
        source = "downloaded or of the checkpoint"
    else:
        location = locate_trunk_weights(net)
        source = location.path.name if location else "downloaded"
    text = f"{source}, SHA-256 of its convolutions {_digest(model.net)}"
    if options.checkpoint:
        learned = _digest(torch.nn.ModuleList(model.lins))
        text += f"; {Path(options.checkpoint).name}, SHA-256 of its linear weights {learned}"
    return text


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        # As float32, so that float64 has the digest of the float32 that it was made of.
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of LPIPS that every sub-command passes on as they are."""
    dtype = None if options.dtype == "float32" else DTYPES[options.dtype]
    return {"dtype": dtype, "layers": options.layers}


def in_dtype(model: LPIPS, options: argparse.Namespace) -> LPIPS:
    """The model with scaling, weights and sums in float64 too, where that is asked for."""
    return model.double() if options.dtype == "float64" else model


def layer_names(options: argparse.Namespace) -> list[str]:
    """The names of the layers that are compared, as torchvision's documentation has them."""
    names = list(trunk_spec(options.net).taps)
    return [names[layer] for layer in check_layers(options.net, options.layers)]


def layers_text(options: argparse.Namespace) -> str:
    """The layers that are compared, for a file or a report."""
    return "all" if options.layers is None else ",".join(map(str, options.layers))


def metric_name(options: argparse.Namespace) -> str:
    metric = "baseline (no linear layers)" if options.baseline else "LPIPS"
    trunk = "random trunk, not LPIPS: " if options.random_trunk else ""
    # LPIPS is l2, of all layers; what is not is told.
    other = "" if options.normalization == "l2" else f", normalization {options.normalization}"
    if options.layers is not None:
        plural = "s" if len(options.layers) > 1 else ""
        other += f", layer{plural} {layers_text(options)} only"
    if options.dtype != "float32":
        other += f", {options.dtype}"
    if options.checkpoint:
        other += f", weights of {options.checkpoint}"
    return f"{trunk}{metric} {options.net}, version {options.version}{other}"


def random_trunk_warning(options: argparse.Namespace) -> str:
    """What stands above all else where numbers are not LPIPS; empty where they are."""
    if not options.random_trunk:
        return ""
    return "The trunk is random (--random-trunk): these numbers are not LPIPS."


def distance_name(options: argparse.Namespace) -> str:
    """What distances are called beside a scale: :func:`metric_name` in few words."""
    names = ["random-trunk"] if options.random_trunk else []
    if options.baseline:
        names.append("baseline")
    details = [] if options.normalization == "l2" else [options.normalization]
    if options.layers is not None:
        details.append(f"{len(options.layers)} layer{'s' if len(options.layers) > 1 else ''}")
    told = f" ({', '.join(details)})" if details else ""
    return f"{' '.join(names) or 'LPIPS'}{told} distance"
