"""SHA-256 of files, and of the convolutions whatever file they lie in."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping

from torch import Tensor


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def features_digest(features: Mapping[str, Tensor]) -> str:
    """SHA-256 of the values of float32 tensors in the order of their names.

    Each tensor counts as its name, its shape and its values, little-endian and contiguous: the
    digest of the same weights is the same in a checkpoint, a stripped copy and on any machine.

    >>> import torch
    >>> features_digest({"features.0.bias": torch.zeros(2)})[:16]
    'ea1fa59fd08017bf'
    """
    digest = hashlib.sha256()
    for name in sorted(features):
        values = features[name].detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update((values if sys.byteorder == "little" else values.byteswap()).data)
    return digest.hexdigest()
