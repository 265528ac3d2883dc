"""Where a trunk's weights come from: the order of the search, and what it ends with."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor

from . import cache
from .checkpoints import trunk_and_linear_weights, trunk_features
from .digests import features_digest
from .download import DownloadError, address, download
from .errors import WeightsError, WeightsNotFoundError
from .files import read_state_dict
from .linear import PACKAGED
from .sources import TrunkSource, listed, trunk_source

WEIGHTS_VARIABLE = "LPIPS_FAST_WEIGHTS"
OFFLINE_VARIABLE = "LPIPS_FAST_OFFLINE"

WeightsLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class TrunkLocation:
    """Where a trunk's weights would be read from.

    Attributes:
        kind: 'env' (the folder ``LPIPS_FAST_WEIGHTS``), 'package' (this package, AlexNet only),
            'stripped-cache' (the small copy in torch's hub cache) or 'hub' (the checkpoint in
            torch's hub cache).
        path: the file.
    """

    kind: Literal["env", "package", "stripped-cache", "hub"]
    path: Path


def load_trunk_weights(
    net: str, weights: WeightsLike | None = None, *, progress: bool = True
) -> dict[str, Tensor]:
    """Load the ImageNet-trained convolutional features of one trunk.

    Args:
        net: 'alex', 'vgg' or 'squeeze'.
        weights: where to take them from, instead of the search described at the top of this
            package. A state dict; a file (`.pth`, `.pt`, `.safetensors`); or a folder that holds
            one under its official name, `<net>.features.pth`, `<net>.pth`, `<net>.safetensors`,
            `<net>.features.safetensors` or the name of the stripped copy. Whole torchvision
            checkpoints, bare `features.*`, LPIPS checkpoints (`net.sliceK.N.*`) and those of
            models that hold an LPIPS are all understood, whatever dictionaries (`state_dict`,
            `model`) and prefixes (`module.`, `loss.perceptual.`) are around them.
        progress: show a bar on standard error if something has to be downloaded.

    Returns:
        ``features.N.weight`` and ``features.N.bias`` with torchvision's names: fresh float32
        tensors on the CPU, which share no memory with a file or with `weights`.

    Raises:
        ValueError: there is no such net.
        TypeError: `weights` is neither a mapping nor a path.
        WeightsNotFoundError: nothing was found, and nothing could be downloaded.
        WeightsError: what was found is damaged, holds NaN or infinity, or belongs to another
            network.

    Warns:
        UserWarning: a file in torch's hub cache bears the official name but holds other weights;
            a stripped copy is damaged; or a downloaded file cannot be kept, because the cache
            cannot be written to.

    Source: torchvision's ImageNet checkpoints, https://download.pytorch.org/models.

    Example:
        >>> weights = load_trunk_weights("alex")
        >>> weights["features.0.weight"].shape
        torch.Size([64, 3, 11, 11])
    """
    return load_trunk_and_linear_weights(net, weights, progress=progress)[0]


def load_trunk_and_linear_weights(
    net: str, weights: WeightsLike | None = None, *, progress: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """:func:`load_trunk_weights`, and the linear weights that were learned with that trunk.

    Returns:
        The trunk's weights; and where they were given (as `weights`, or in the folder of
        ``LPIPS_FAST_WEIGHTS``) in a checkpoint that holds linear weights too, these, named as by
        :func:`load_lin_weights`, else ``None``.

    Example:
        >>> trunk, linear = load_trunk_and_linear_weights("alex")
        >>> linear is None  # those that ship with the package belong to it
        True
    """
    source = trunk_source(net)
    if weights is not None:
        return _load_given(source, weights)

    given = _in_environment_folder(source)
    if given is not None:
        return trunk_and_linear_weights(read_state_dict(given), net, str(given))
    features = (
        _load_packaged(source)
        or cache.load_stripped_copy(source)
        or _load_cached(source)
        or _load_download(source, progress)
    )
    return features, None


def locate_trunk_weights(net: str) -> TrunkLocation | None:
    """Say where the weights of a trunk would come from; download nothing and write nothing.

    Returns:
        The place, or None if they would have to be downloaded.

    Raises:
        ValueError: there is no such net.
        WeightsError: ``LPIPS_FAST_WEIGHTS`` does not name a folder.

    Warns:
        UserWarning: a stripped copy in torch's hub cache is damaged or foreign.
    """
    source = trunk_source(net)
    given = _in_environment_folder(source)
    if given is not None:
        return TrunkLocation("env", given)
    if os.path.isfile(_packaged_path(source)):
        return TrunkLocation("package", _packaged_path(source))
    if cache.load_stripped_copy(source) is not None:
        return TrunkLocation("stripped-cache", cache.stripped_path(source))
    if os.path.isfile(cache.checkpoint_path(source)):
        return TrunkLocation("hub", cache.checkpoint_path(source))
    return None


def find_in_folder(source: TrunkSource, folder: Path) -> Path | None:
    """The file of a folder that holds a trunk's weights, going by its name."""
    candidates = (folder / name for name in source.accepted_names)
    return next((path for path in candidates if os.path.isfile(path)), None)


# ---------------------------------------------------------------------------------------------
# Each place
# ---------------------------------------------------------------------------------------------


def _load_given(
    source: TrunkSource, weights: WeightsLike
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    if isinstance(weights, Mapping):
        return trunk_and_linear_weights(weights, source.net, "the given state dict")
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights is a {type(weights).__name__}: give a state dict, or the path of a file "
            "or folder"
        )
    path = Path(weights).expanduser()
    if os.path.isdir(path):
        file = find_in_folder(source, path)
        if file is None:
            raise WeightsNotFoundError(
                f"the folder {path} holds no weights for the {source.net!r} trunk: "
                f"expected one of {listed(source.accepted_names)}"
            )
        path = file
    elif not os.path.exists(path):
        what = (
            f"does not exist: give a file with the weights of the {source.net!r} trunk, or a "
            f"folder that holds {source.filename}"
        )
        raise WeightsNotFoundError(f"weights={str(path)!r} {what}", f"--weights {path} {what}")
    return trunk_and_linear_weights(read_state_dict(path), source.net, str(path))


def _in_environment_folder(source: TrunkSource) -> Path | None:
    named = os.environ.get(WEIGHTS_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not os.path.isdir(folder):
        raise WeightsError(
            f"{WEIGHTS_VARIABLE}={named!r} is not a folder: set it to the folder that "
            f"holds {source.filename}, or unset it"
        )
    return find_in_folder(source, folder)


def _packaged_path(source: TrunkSource) -> Path:
    return PACKAGED / "imagenet" / f"{source.net}.safetensors"


def _load_packaged(source: TrunkSource) -> dict[str, Tensor] | None:
    path = _packaged_path(source)
    if not os.path.isfile(path):
        return None
    try:
        features = trunk_features(read_state_dict(path), source.net, str(path))
    except WeightsError:
        features = {}
    if features_digest(features) != source.features_sha256:
        raise WeightsError(
            f"{path} is damaged or was changed: install lpips-fast again, or remove the file to "
            "have the weights downloaded"
        )
    return features


def _load_cached(source: TrunkSource) -> dict[str, Tensor] | None:
    path = cache.checkpoint_path(source)
    return cache.load_checkpoint(source, path) if os.path.isfile(path) else None


def _load_download(source: TrunkSource, progress: bool) -> dict[str, Tensor]:
    if os.environ.get(OFFLINE_VARIABLE, "").lower() not in ("", "0", "false", "no"):
        raise _not_found(source, f"{OFFLINE_VARIABLE} is set, so nothing is downloaded")
    try:
        if _can_write(cache.hub_folder()):
            path = cache.checkpoint_path(source)
            download(source, path, progress)
            return cache.load_checkpoint(source, path)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / source.filename
            download(source, path, progress)
            features = cache.load_checkpoint(source, path, keep=False)
    except (DownloadError, OSError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = f"the download from {address(source)} failed: {error}"
        raise _not_found(source, reason) from None
    warnings.warn(
        f"{source.filename} was downloaded but cannot be kept, because {cache.hub_folder()} cannot "
        "be written to: it will be downloaded again at the next start. Set TORCH_HOME to a folder "
        "that can",
        UserWarning,
        stacklevel=3,
    )
    return features


def _can_write(folder: Path) -> bool:
    # Tried out, since permission bits say little about read-only mounts, quotas and root.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _not_found(source: TrunkSource, reason: str) -> WeightsNotFoundError:
    def message(by_path: str) -> str:
        return (
            f"the weights of the {source.net!r} trunk, {source.filename}, were not found, and "
            f"{reason}.\n"
            f"Fetch {source.url} ({source.download_mib:.0f} MiB) where there is a network, or run "
            f"'lpips-fast weights pack -o FOLDER --net {source.net}' there, then do one of these:\n"
            f"  - pass its path: {by_path}\n"
            f"  - set {WEIGHTS_VARIABLE} to the folder that holds it\n"
            f"  - put it in torch's hub cache: {cache.checkpoint_path(source)}"
        )

    return WeightsNotFoundError(
        message(f"weights='/path/to/{source.filename}'"),
        message(f"--weights /path/to/{source.filename}"),
    )
