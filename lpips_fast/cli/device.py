"""Moving a model to the device that was asked for, or saying why it cannot be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .command import CommandError, sentence

if TYPE_CHECKING:
    from ..lpips import LPIPS


def to_device(model: LPIPS, device: torch.device) -> LPIPS:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(
            f"the device {str(device)!r} cannot be used here with torch {torch.__version__}: "
            f"{sentence(RuntimeError(str(error)))}"
        ) from error
