"""A warning when learning linear weights have turned negative."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..notices import level_of_the_caller, may_read_values
from .linear import NetLinLayer, linear_weight


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
