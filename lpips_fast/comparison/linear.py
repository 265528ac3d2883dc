"""The learned part: a non-negative weight per channel and layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..normalization import LEARNED, LearnedNorm
from ..trunk import architecture, name_by_shapes
from ..weights import WeightsError, load_lin_weights, load_trunk_and_linear_weights, narrow_name
from .scaling import like_of

if TYPE_CHECKING:
    from ..lpips import LPIPS


class NetLinLayer(nn.Module):
    """One layer's weights per channel, as a 1x1 convolution behind an optional dropout."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*layers, nn.Conv2d(chn_in, chn_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


# Functions, not properties: the original's trainer takes whatever has a `weight` for a convolution.


def linear_weight(lin: NetLinLayer) -> Tensor:
    """(chn_out, chn_in, 1, 1)."""
    return lin.model[-1].weight  # type: ignore[return-value]


def layer_weight(model: LPIPS, layer: int) -> Tensor:
    """(C,): ones in the baseline, without a gradient in a frozen model."""
    if not model.lpips:
        return like_of(model).new_ones(model.chns[layer])
    weight = linear_weight(model.lins[layer]).view(-1)  # type: ignore[arg-type]
    return weight.detach() if model.frozen else weight


@torch.no_grad()
def project_linear_weights(model: nn.Module) -> None:
    """Takes the linear weights of an LPIPS model to the nearest that a distance allows, w >= 0.

    Shifts of a learned normalisation too.
    """
    for lin in model.lins:  # type: ignore[union-attr]
        linear_weight(lin).clamp_(min=0)
    if model.normalization == LEARNED:
        for norm in model.norms:  # type: ignore[union-attr]
            norm.project()


def drops(lin: NetLinLayer) -> bool:
    """Whether a call would drop channels at random, which no fused kernel does."""
    dropout = lin.model[0]
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def load_trunk(
    net: str, weights: Any, learned: dict[str, Tensor] | None, *, is_random: bool
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None, str]:
    """A trunk's weights, the linear ones beside them, and its name, which says its widths.

    Args:
        net: as it is asked for.
        weights: where from; ``None`` searches.
        learned: the state dict of a checkpoint that will be loaded and may hold a trunk too.
        is_random: none are wanted.

    Raises:
        WeightsError: they are of other widths than asked for, or not to be had.
    """
    held = net if learned is None else narrow_name(learned, net)
    if held != net:  # the checkpoint's own trunk, which alone fits it
        return None, None, held
    if is_random:
        return None, None, net
    trunk, linear = load_trunk_and_linear_weights(architecture(net), weights)
    found = name_by_shapes(architecture(net), {name: w.shape for name, w in trunk.items()})
    if net not in (found, architecture(net)):
        raise WeightsError(f"the weights are of the trunk {found!r}, and {net!r} was asked for")
    return trunk, linear, found


def add_linear_layers(model: LPIPS, use_dropout: bool) -> None:
    """One for every layer of the trunk, and what a learned normalisation has beside them."""
    for k, channels in enumerate(model.chns):
        model.add_module(f"lin{k}", NetLinLayer(channels, use_dropout=use_dropout))
    # The same modules again under `lins`, as in the original, whose checkpoints hold both.
    model.lins = nn.ModuleList(getattr(model, f"lin{k}") for k in range(model.L))
    model.register_load_state_dict_pre_hook(rename_linear_weights)
    if model.normalization == LEARNED:
        model.norms = nn.ModuleList(LearnedNorm(channels) for channels in model.chns)


def load_linear_weights(
    model: LPIPS,
    model_path: str | os.PathLike[str] | None,
    learned: dict[str, Tensor] | None,
    beside_trunk: dict[str, Tensor] | None,
    verbose: bool,
) -> None:
    """Loads what was learned: from a file, from the trunk's checkpoint, or from the package.

    Args:
        model_path, learned: a file of linear weights, or a whole checkpoint, and what it holds.
        beside_trunk: linear weights that the trunk's checkpoint holds too.
        verbose: print where they come from.

    Raises:
        WeightsError: a layer's weights are missing, and would stay random without a word; or what
            a normalisation learned is there and the model has another one, or is there in part.
    """
    net, version = model.net_name, model.version
    if model_path is not None and learned is not None:
        state_dict = learned
        source = str(Path(model_path).resolve())
    elif beside_trunk is not None:
        state_dict = beside_trunk
        source = "the checkpoint that holds the trunk's weights"
    else:
        state_dict = load_lin_weights(net, version)
        source = f"the linear weights of lpips {version}, packaged"
    if verbose:
        print(f"Loading model from: {source}")
    _check_norms(model, state_dict, source)
    missing, _ = model.load_state_dict(state_dict, strict=False)
    # The same modules stand under two names; one of them is enough.
    without = [
        key
        for key in missing
        if key.startswith("lin") and key.replace("lin", "lins.", 1) in missing
    ]
    if without:
        raise WeightsError(
            f"{source} holds no linear weights for trunk {net} "
            f"(missing {without[0]!r}); expected keys like 'lin0.model.1.weight'"
        )


def _check_norms(model: LPIPS, state_dict: dict[str, Tensor], source: str) -> None:
    """Of a learned normalisation all is loaded, or nothing is there and it starts as l2."""
    found = {key for key in state_dict if key.startswith("norms.")}
    if not found:
        return
    if model.normalization != LEARNED:
        raise WeightsError(
            f"{source} holds weights that were learned with a normalisation of their own: load "
            f"them with normalization={LEARNED!r}, not {model.normalization!r}"
        )
    absent = {f"norms.{key}" for key in model.norms.state_dict()} - found
    if absent:
        raise WeightsError(
            f"{source} holds only a part of a learned normalisation: {min(absent)!r} is missing"
        )


def rename_linear_weights(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before loading: linear weights under any name that the original gives them.

    With or without dropout the convolution is ``model.1`` or ``model.0``, and a file may hold
    ``linK``, ``lins.K`` or both. A state dict that holds some but not all of them is an error even
    where loading is not strict: the rest would stay random without a word.
    """
    found, absent = 0, []
    count = len(module.chns)  # type: ignore[arg-type]
    for k in range(count):
        position = len(getattr(module, f"lin{k}").model) - 1
        is_there = False
        for group in (f"{prefix}lin{k}", f"{prefix}lins.{k}"):
            for index in (position, 1 - position):
                weight = state_dict.pop(f"{group}.model.{index}.weight", None)
                if weight is not None:
                    state_dict[f"{group}.model.{position}.weight"] = weight
                    is_there = True
                    break
        if is_there:
            found += 1
        else:
            absent.append(f"{prefix}lin{k}")
    if found and absent:
        error_msgs.append(
            f"linear weights of {len(absent)} of {count} layers are missing, "
            f"first {absent[0]!r}: is the checkpoint of another trunk?"
        )
