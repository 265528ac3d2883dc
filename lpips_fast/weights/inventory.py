"""What weights are here, whether they are the official ones, and a folder of them to take along."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from .checkpoints import trunk_features
from .digests import features_digest
from .errors import WeightsError, WeightsNotFoundError
from .files import read_state_dict
from .search import TrunkLocation, find_in_folder, load_trunk_weights, locate_trunk_weights
from .sources import TRUNK_SOURCES, trunk_source
from .whole_files import appearing


@dataclass(frozen=True)
class TrunkState:
    """What is known of one trunk's weights in one file, after reading all of them.

    Attributes:
        net: 'alex', 'vgg' or 'squeeze'.
        path: the file.
        features_sha256: of the convolutions (:func:`lpips_fast.weights.features_digest`); ``None``
            if they cannot be used.
        problem: then, why not.
    """

    net: str
    path: Path
    features_sha256: str | None
    problem: str | None = None

    @property
    def usable(self) -> bool:
        return self.features_sha256 is not None

    @property
    def official(self) -> bool:
        """Whether these are torchvision's weights, with which LPIPS was published, to the bit."""
        return self.features_sha256 == trunk_source(self.net).features_sha256


def inspect(net: str, path: Path) -> TrunkState:
    """Read one trunk's weights from a file and say what they are."""
    try:
        features = trunk_features(read_state_dict(path), net, str(path))
    except WeightsError as error:
        return TrunkState(net, path, None, str(error))
    return TrunkState(net, path, features_digest(features))


def inspect_located(net: str) -> tuple[TrunkLocation, TrunkState] | None:
    """Where the search finds a trunk's weights and what they are; ``None`` if nowhere."""
    location = locate_trunk_weights(net)
    return None if location is None else (location, inspect(net, location.path))


def inspect_path(path: str | os.PathLike[str]) -> list[TrunkState]:
    """All trunks' weights that a file or folder holds.

    Raises:
        WeightsNotFoundError: there is no such file, or no weights in the folder.
        WeightsError: the file is of no trunk.
    """
    path = Path(path).expanduser()
    if os.path.isdir(path):
        files = {net: find_in_folder(source, path) for net, source in TRUNK_SOURCES.items()}
        states = [inspect(net, file) for net, file in files.items() if file is not None]
        if not states:
            raise WeightsNotFoundError(f"the folder {path} holds no weights of any trunk")
        return states
    checkpoint = read_state_dict(path)
    problems = []
    for net in TRUNK_SOURCES:
        try:
            return [
                TrunkState(net, path, features_digest(trunk_features(checkpoint, net, str(path))))
            ]
        except WeightsError as error:
            problems.append((net, error))
    # Of the three errors, that of the trunk which the file's name speaks of says most.
    name = path.name.lower()
    raise next((error for net, error in problems if net in name), problems[0][1])


def pack(
    folder: str | os.PathLike[str], nets: Iterable[str], *, progress: bool = True
) -> list[TrunkState]:
    """Write trunks' weights into a folder for machines without a network.

    Each is found as ever, and downloaded where it is not here; only its convolutions are written.
    ``LPIPS_FAST_WEIGHTS`` set to the folder, or ``LPIPS(weights=folder)``, uses them.

    Args:
        folder: made if need be. Files of other names in it are left alone.
        nets: of 'alex', 'vgg' and 'squeeze'.
        progress: show a bar on standard error if something has to be downloaded.

    Returns:
        What was written. Weights of your own are written as they are, and not official.

    Raises:
        WeightsNotFoundError: weights are not here and cannot be downloaded.
        WeightsError: the folder cannot be written to, or holds another file that would be used
            instead.
    """
    folder = Path(folder).expanduser()
    states = []
    for net in nets:
        source = trunk_source(net)
        features = load_trunk_weights(net, progress=progress)
        digest = features_digest(features)
        official = digest == source.features_sha256
        path = folder / (source.stripped_filename if official else f"{net}.safetensors")
        try:
            with appearing(path) as file:
                file.write(safetensors.torch.save(features, {"format": "pt", "net": net}))
        except OSError as error:
            raise WeightsError(f"{path} cannot be written: {error.strerror or error}") from None
        used = find_in_folder(source, folder)
        if used != path and used is not None and inspect(net, used).features_sha256 != digest:
            raise WeightsError(
                f"{path} was written, but {used} holds other weights and would be used instead: "
                "remove it, or choose an empty folder"
            )
        states.append(TrunkState(net, path, digest))
    return states
