"""Torch's hub cache, which torchvision and `lpips` fill too, and the stripped copies in it.

LPIPS needs only the convolutions: 56 of VGG16's 528 MiB. A stripped copy of the official ones is
kept beside the checkpoint; every later start reads just that, and it goes on to serve if the
checkpoint is deleted to save space. It is believed for its values alone: their digest must be the
one that :mod:`lpips_fast.weights.sources` holds.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .checkpoints import trunk_features
from .digests import features_digest, file_digest
from .errors import WeightsError
from .files import read_state_dict
from .sources import TrunkSource
from .whole_files import appearing

logger = logging.getLogger(__name__)


def hub_folder() -> Path:
    """Where torch keeps downloaded checkpoints (``TORCH_HOME``)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def checkpoint_path(source: TrunkSource) -> Path:
    return hub_folder() / source.filename


def stripped_path(source: TrunkSource) -> Path:
    return hub_folder() / "lpips_fast" / source.stripped_filename


def load_stripped_copy(source: TrunkSource) -> dict[str, Tensor] | None:
    """The stripped copy, if there is a whole, official one and the checkpoint is not newer.

    Warns:
        UserWarning: there is one that is damaged or foreign.
    """
    path = stripped_path(source)
    if not os.path.isfile(path):
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stamp = file.metadata() or {}
        features = trunk_features(read_state_dict(path), source.net, str(path))
    except (OSError, safetensors.SafetensorError, WeightsError):
        stamp, features = {}, {}
    if features_digest(features) != source.features_sha256:
        warnings.warn(
            f"{path} is damaged, or is no copy of the official {source.filename}: it is not used, "
            "and is replaced when the official weights are read next",
            UserWarning,
            stacklevel=4,
        )
        return None
    if not _was_made_of(stamp, checkpoint_path(source)):
        return None
    return features


def load_checkpoint(source: TrunkSource, path: Path, keep: bool = True) -> dict[str, Tensor]:
    """Read a checkpoint from the cache, say so if it is not the official one, keep a stripped copy.

    Warns:
        UserWarning: it bears the official name and holds other weights.
    """
    # Taken before reading: if the file is replaced meanwhile, the copy looks stale and is made
    # anew, and never looks valid when it is not.
    stamp = _stamp(path)
    try:
        features = trunk_features(read_state_dict(path), source.net, str(path))
    except WeightsError as error:
        raise WeightsError(f"{error}. Delete the file to download the official one") from None
    digest = features_digest(features)
    if digest == source.features_sha256:
        if keep:
            _keep_stripped_copy(stripped_path(source), features, stamp)
    elif not _is_official_file(source, path):
        warnings.warn(
            f"{path} bears the name of the official weights and holds others: the SHA-256 of its "
            f"convolutions begins with {digest[:8]}, expected {source.features_sha256[:8]}. "
            "Distances computed with it are not the published LPIPS. Delete it to get the official "
            "weights",
            UserWarning,
            stacklevel=4,
        )
    return features


def _is_official_file(source: TrunkSource, path: Path) -> bool:
    return os.path.getsize(path) == source.size and file_digest(path) == source.sha256


def _stamp(path: Path) -> dict[str, str]:
    status = path.stat()
    return {"source_size": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}


def _was_made_of(stamp: dict[str, str], checkpoint: Path) -> bool:
    """Whether a copy was made from the checkpoint as it is now, or the checkpoint is gone."""
    try:
        now = _stamp(checkpoint)
    except OSError:
        return True
    return all(stamp.get(key) == value for key, value in now.items())


def _keep_stripped_copy(path: Path, features: dict[str, Tensor], stamp: dict[str, str]) -> None:
    try:
        with appearing(path) as file:
            file.write(safetensors.torch.save(features, {"format": "pt", **stamp}))
    except OSError as error:
        # A shared cache is often read-only. The copy only saves time, so this is no warning.
        logger.info("no stripped copy of the trunk's weights was kept at %s: %s", path, error)
