"""The learned part: a non-negative weight per channel and layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .notices import level_of_the_caller, may_read_values


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


@torch.no_grad()
def project_linear_weights(model: nn.Module) -> None:
    """Takes the linear weights of an LPIPS model to the nearest that a distance allows, w >= 0."""
    for lin in model.lins:  # type: ignore[union-attr]
        linear_weight(lin).clamp_(min=0)


class NegativeWeightsNotice:
    """Warns once when learning linear weights have turned negative: then it is no distance.

    So it goes with a loss whose own weights an optimiser was given: less is always better. Weights
    are looked at in calls with a graph in which they are other than in the call before, the first,
    the second, the fourth, the eighth such call and so on: on GPUs a look is a synchronisation. One
    notice serves a model, its copies and its replicas.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._version: int | None = None
        self._changes = 0

    def __deepcopy__(self, memo: dict[int, object]) -> NegativeWeightsNotice:
        return self

    def look(self, lins: nn.ModuleList) -> None:
        """Once a call with a graph.

        Args:
            lins: the linear layers; others than :class:`NetLinLayer` are nobody's to judge.
        """
        # Compiled code is not to depend on what is noted here.
        if torch.compiler.is_compiling() or self._has_warned or type(lins[0]) is not NetLinLayer:
            return
        first = linear_weight(lins[0])  # optimisers write all layers or none
        version = -1 if first.is_inference() else first._version
        if version == self._version or not may_read_values():
            return
        is_first, self._version = self._version is None, version
        if is_first:  # as they were loaded
            return
        self._changes += 1
        if self._changes & (self._changes - 1):  # no power of two
            return
        weights = [linear_weight(lin).detach() for lin in lins if type(lin) is NetLinLayer]
        if any(type(w) is not Tensor or w.is_meta for w in weights):
            return
        least = torch.stack([w.min() for w in weights]).min().item()
        if least < 0:
            self._has_warned = True
            warnings.warn(
                "linear weights of LPIPS have learned to be negative, the least is "
                f"{least:.3g}: the result is no distance any more; pass frozen=True to a loss, or "
                "clamp the weights after each step where they are to learn",
                stacklevel=level_of_the_caller(),
            )


def dropout_rate(lin: NetLinLayer) -> float | None:
    """The rate of the dropout in front, or ``None`` where there is none."""
    dropout = lin.model[0]
    return dropout.p if isinstance(dropout, nn.Dropout) else None


def drops(lin: NetLinLayer) -> bool:
    """Whether a call would drop channels at random, which no fused kernel does."""
    return bool(dropout_rate(lin)) and lin.model[0].training


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
