"""Checkpoint files, read without executing anything and without believing what they claim."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .errors import WeightsError, WeightsNotFoundError
from .records import RecordError, check_records, is_zip

logger = logging.getLogger(__name__)


def read_state_dict(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint file (`.safetensors`, or torch's `.pth`) without unpickling objects.

    Returns:
        What the file holds, its tensors on the CPU and possibly mapped from the file: mostly a
        state dict, but that is for the caller to check.

    Raises:
        WeightsNotFoundError: there is no such file.
        WeightsError: it is damaged, of another format, holds pickled objects, or claims more than
            it holds.

    Example:
        >>> read_state_dict("checkpoint.pth")  # doctest: +SKIP
        {'lin0.model.1.weight': tensor(...), ...}
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise WeightsNotFoundError(f"{path} does not exist or is no file: give a checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        check_records(path)
        # Memory mapping (zip checkpoints only) leaves the classifier, most of the file, unread.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except RecordError as error:
        raise WeightsError(
            f"{path} cannot be read as a checkpoint: {error}. It is damaged or was made to do harm"
        ) from None
    except PermissionError:
        raise WeightsError(f"{path} cannot be read: permission denied") from None
    except Exception as error:  # a damaged file can raise nearly anything
        logger.debug("%s cannot be read", path, exc_info=error)
        raise WeightsError(
            f"{path} cannot be read as a checkpoint: it is damaged or cut short, of another "
            "format, or holds pickled objects, which are never executed"
        ) from None
