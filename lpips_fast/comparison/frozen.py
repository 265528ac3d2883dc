"""``frozen=True``: a loss inside a trained module that can neither learn nor be lost.

A loss that lies in the module that is trained shares its fate: ``parent.requires_grad_(True)`` and
an optimiser over ``parent.parameters()`` teach the loss to be small, ``parent.train()`` turns on
its dropout, and its weights swell every checkpoint. A frozen model keeps its parameters as
parameters, so that it moves and casts with its parent, and

- uses them detached: no gradient reaches them, whoever asks for one
  (:mod:`lpips_fast.trunk.detached`), and never drops channels;
- has no part in its parent's ``state_dict()``, and is not missed there; what an older checkpoint
  holds for it is dropped, with a warning where it is not what the model has (:func:`hide_weights`).

By itself it is as any other: its own ``state_dict()`` is whole, and its own ``load_state_dict``
loads.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

# What a checkpoint may hold of an LPIPS model, of whatever trunk.
_OF_LPIPS = re.compile(r"(net|lin\d+|lins\.\d+|norms\.\d+|scaling_layer)\.")
_ANY_POSITION = re.compile(r"^(?:lins\.|lin)(\d+)\.model\.\d+\.")


def freeze(model: nn.Module) -> None:
    """Stops a model from learning and dropping channels, when its weights are there."""
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # where somebody calls train() of each module


def hide_weights(model: nn.Module) -> None:
    """Keeps a model's weights out of the checkpoints of modules that hold it."""
    model.register_state_dict_post_hook(_leave_out)
    model.register_load_state_dict_pre_hook(_drop)
    model.register_load_state_dict_post_hook(_not_missed)


def _leave_out(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    if prefix:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]


def _drop(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    if not prefix:
        return
    # What the model's own modules will miss stands behind what others have missed before.
    model._missing_before_frozen = len(missing_keys)  # type: ignore[assignment]
    dropped = {
        key: state_dict.pop(key)
        for key in list(state_dict)
        if key.startswith(prefix) and _OF_LPIPS.match(key.removeprefix(prefix))
    }
    differing = _differing(model, prefix, dropped)
    if differing:
        warnings.warn(
            f"the checkpoint holds other weights than the frozen loss {prefix.rstrip('.')!r} has, "
            f"first {differing[0]!r}; they were dropped and the loss keeps its own: to use them, "
            "load them by the loss's own load_state_dict",
            stacklevel=2,
        )


def _differing(model: nn.Module, prefix: str, dropped: dict[str, Any]) -> list[str]:
    own = {_by_one_name(key): value for key, value in model.state_dict().items()}
    differing = []
    for key, value in dropped.items():
        mine = own.get(_by_one_name(key.removeprefix(prefix)))
        if mine is None or not _same(value, mine):
            differing.append(key)
    return differing


def _by_one_name(key: str) -> str:
    """Linear weights stand as ``linK`` and ``lins.K``, with dropout and without."""
    return _ANY_POSITION.sub(r"lin\1.", key)


def _same(value: Any, mine: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != mine.shape:
        return False
    if value.is_meta or mine.is_meta or type(value) is not type(mine):
        return True  # nothing can be said, and nothing is loaded
    value = value.detach().to(device=mine.device, dtype=mine.dtype)
    return torch.equal(value, mine.detach())


def _not_missed(model: nn.Module, incompatible_keys: Any) -> None:
    before = model.__dict__.pop("_missing_before_frozen", None)
    if before is not None:
        del incompatible_keys.missing_keys[before:]
