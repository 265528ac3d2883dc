"""Moving a model or a tensor to the device that was asked for, or saying why it cannot be done."""

from __future__ import annotations

from typing import TypeVar

import torch

from .command import CommandError, sentence

_Movable = TypeVar("_Movable", bound=torch.nn.Module | torch.Tensor)


def to_device(what: _Movable, device: torch.device) -> _Movable:
    try:
        return what.to(device)  # type: ignore[return-value]
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(
            f"the device {str(device)!r} cannot be used here with torch {torch.__version__}: "
            f"{sentence(RuntimeError(str(error)))}"
        ) from error
