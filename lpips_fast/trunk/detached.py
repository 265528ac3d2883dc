"""A module called with its parameters detached: no gradient reaches them, whoever asks for one."""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import kernels

# functional_call puts the detached weights into the module for the time of the call.
_ONE_AT_A_TIME = threading.RLock()


def call_detached(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, whose parameters get no gradient from it.

    Nothing is done where none of them asks for one.
    """
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in module.parameters()):
        return module(x)
    with _ONE_AT_A_TIME if kernels.is_eager() else contextlib.nullcontext():
        detached = {name: p.detach() for name, p in module.named_parameters()}
        return functional_call(module, detached, (x,))
