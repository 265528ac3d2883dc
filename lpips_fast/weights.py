"""Where weights come from: the linear weights in the package, the trunks' weights from outside.

The linear weights (a few kilobytes, BSD-2-Clause) ship with the package. The ImageNet-trained
trunks do not; `load_trunk_weights` looks for them in this order:

1. its argument `weights`: a state dict, a file, or a folder;
2. the folder named by the environment variable ``LPIPS_FAST_WEIGHTS``;
3. torch's hub cache (``TORCH_HOME``), which torchvision and the original `lpips` fill too;
4. a download from the official address, with its hash checked, into torch's hub cache.

LPIPS needs only the convolutional features: 9 of AlexNet's 233 MiB, 56 of VGG16's 528. A stripped
copy of them is kept beside the checkpoint. Every later start reads just that, and it goes on to
serve if the checkpoint is deleted to save space.

Two more environment variables: ``LPIPS_FAST_MIRROR`` replaces the official base address, and
``LPIPS_FAST_OFFLINE=1`` forbids downloads. Nothing here ever unpickles a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import sys
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

__all__ = [
    "LIN_VERSIONS",
    "TRUNK_SOURCES",
    "TrunkLocation",
    "TrunkSource",
    "WeightsError",
    "WeightsNotFoundError",
    "load_lin_weights",
    "load_trunk_weights",
    "locate_trunk_weights",
    "read_state_dict",
]

WEIGHTS_VARIABLE = "LPIPS_FAST_WEIGHTS"
MIRROR_VARIABLE = "LPIPS_FAST_MIRROR"
OFFLINE_VARIABLE = "LPIPS_FAST_OFFLINE"

OFFICIAL_ADDRESS = "https://download.pytorch.org/models"
LIN_VERSIONS = ("0.0", "0.1")

# Part of a stripped copy's metadata: raise it when the copy's layout changes, and old copies are
# made anew.
STRIPPED_LAYOUT = "1"

WeightsLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]

logger = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """Weights were found, but they cannot be used: damaged, foreign, or of the wrong shape."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """No weights were found where they were asked for, nor could they be downloaded."""


@dataclass(frozen=True)
class TrunkSource:
    """The official checkpoint of one trunk.

    Attributes:
        net: the trunk's name in LPIPS: 'alex', 'vgg' or 'squeeze'.
        filename: the name under which torchvision publishes and caches it.
        hash_prefix: the first digits of the file's SHA-256.
        download_mib: size of the whole file, in MiB.
        features_mib: size of the part that LPIPS uses, in MiB.
    """

    net: str
    filename: str
    hash_prefix: str
    download_mib: float
    features_mib: float

    @property
    def url(self) -> str:
        """The official address of the file."""
        return f"{OFFICIAL_ADDRESS}/{self.filename}"

    @property
    def stripped_filename(self) -> str:
        """The name of the copy that holds only the convolutional features."""
        return f"{Path(self.filename).stem}.features.safetensors"


TRUNK_SOURCES: dict[str, TrunkSource] = {
    source.net: source
    for source in (
        TrunkSource("alex", "alexnet-owt-7be5be79.pth", "7be5be79", 233.1, 9.4),
        TrunkSource("vgg", "vgg16-397923af.pth", "397923af", 527.8, 56.1),
        TrunkSource("squeeze", "squeezenet1_1-b8a52dc0.pth", "b8a52dc0", 4.7, 2.8),
    )
}


@dataclass(frozen=True)
class TrunkLocation:
    """Where a trunk's weights would be read from.

    Attributes:
        kind: 'env' (the folder ``LPIPS_FAST_WEIGHTS``), 'stripped-cache' (the small copy in
            torch's hub cache) or 'hub' (the official checkpoint in torch's hub cache).
        path: the file.
    """

    kind: Literal["env", "stripped-cache", "hub"]
    path: Path


def load_lin_weights(net: str, version: str) -> dict[str, Tensor]:
    """Load the linear weights that ship with the package.

    Args:
        net: 'alex', 'vgg' or 'squeeze'.
        version: '0.1' (the published metric) or '0.0'.

    Returns:
        ``lin0.model.1.weight`` and so on, one per tap, each of shape (1, C, 1, 1), float32, on
        the CPU; bit for bit those of `lpips` 0.1.4.

    Raises:
        ValueError: there is no such net or version.

    Source: Zhang et al. 2018, https://github.com/richzhang/PerceptualSimilarity (BSD-2-Clause).

    Example:
        >>> weights = load_lin_weights("alex", "0.1")
        >>> weights["lin1.model.1.weight"].shape
        torch.Size([1, 192, 1, 1])
    """
    _source(net)
    if version not in LIN_VERSIONS:
        raise ValueError(f"version={version!r} is unknown: use one of {_listed(LIN_VERSIONS)}")
    file = resources.files("lpips_fast") / "weights" / f"v{version}" / f"{net}.safetensors"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"{file} cannot be read ({error}): the installation is incomplete, "
            "install lpips-fast again"
        ) from error
    weights = safetensors.torch.load(content)
    return {key: weights[key].clone() for key in sorted(weights)}


def load_trunk_weights(
    net: str, weights: WeightsLike | None = None, *, progress: bool = True
) -> dict[str, Tensor]:
    """Load the ImageNet-trained convolutional features of one trunk.

    Args:
        net: 'alex', 'vgg' or 'squeeze'.
        weights: where to take them from, instead of the search described at the top of this
            module. A state dict; a file (`.pth`, `.pt`, `.safetensors`); or a folder that holds
            one under its official name, `<net>.features.pth`, `<net>.pth`, `<net>.safetensors`,
            `<net>.features.safetensors` or the name of the stripped copy. Whole torchvision
            checkpoints, bare `features.*`, LPIPS checkpoints (`net.sliceK.N.*`), a `state_dict`
            entry around them and a `module.` prefix are all understood.
        progress: show a bar on standard error if something has to be downloaded.

    Returns:
        ``features.N.weight`` and ``features.N.bias`` with torchvision's names: fresh float32
        tensors on the CPU, which share no memory with a file or with `weights`.

    Raises:
        ValueError: there is no such net.
        TypeError: `weights` is neither a mapping nor a path.
        WeightsNotFoundError: nothing was found, and nothing could be downloaded.
        WeightsError: what was found is damaged or belongs to another network.

    Warns:
        UserWarning: a file in torch's hub cache bears the official name but is another file;
            or a downloaded file cannot be kept, because the cache cannot be written to.

    Source: torchvision's ImageNet checkpoints, https://download.pytorch.org/models.

    Example:
        >>> weights = load_trunk_weights("alex")  # doctest: +SKIP
        >>> weights["features.0.weight"].shape  # doctest: +SKIP
        torch.Size([64, 3, 11, 11])
    """
    source = _source(net)
    if weights is not None:
        return _load_explicit(source, weights)

    location = locate_trunk_weights(net)
    if location is None:
        return _load_download(source, progress)
    if location.kind == "env":
        return _read_features(location.path, net)
    if location.kind == "stripped-cache":
        return _load_stripped_copy(source, location.path)
    return _load_checkpoint(source, location.path)


def locate_trunk_weights(net: str) -> TrunkLocation | None:
    """Say where the weights of a trunk would come from; read and download nothing.

    Returns:
        The place, or None if they would have to be downloaded.

    Raises:
        ValueError: there is no such net.
        WeightsError: ``LPIPS_FAST_WEIGHTS`` does not name a folder.
    """
    source = _source(net)
    named_folder = os.environ.get(WEIGHTS_VARIABLE)
    if named_folder:
        folder = Path(named_folder).expanduser()
        if not folder.is_dir():
            raise WeightsError(
                f"{WEIGHTS_VARIABLE}={named_folder!r} is not a folder: set it to the folder that "
                f"holds {source.filename}, or unset it"
            )
        file = _find_in_folder(source, folder)
        if file is not None:
            return TrunkLocation("env", file)

    checkpoint = _hub_folder() / source.filename
    stripped = _stripped_path(source)
    if _stripped_copy_is_valid(stripped, checkpoint):
        return TrunkLocation("stripped-cache", stripped)
    if checkpoint.is_file():
        return TrunkLocation("hub", checkpoint)
    return None


# ---------------------------------------------------------------------------------------------
# Explicit weights
# ---------------------------------------------------------------------------------------------


def _source(net: str) -> TrunkSource:
    try:
        return TRUNK_SOURCES[net]
    except (KeyError, TypeError):
        raise ValueError(f"net={net!r} is unknown: use one of {_listed(TRUNK_SOURCES)}") from None


def _load_explicit(source: TrunkSource, weights: WeightsLike) -> dict[str, Tensor]:
    if isinstance(weights, Mapping):
        return _select_features(weights, source.net, "the given state dict")
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights is a {type(weights).__name__}: give a state dict, or the path of a file "
            "or folder"
        )
    path = Path(weights).expanduser()
    if path.is_dir():
        file = _find_in_folder(source, path)
        if file is None:
            raise WeightsNotFoundError(
                f"the folder {path} holds no weights for the {source.net!r} trunk: "
                f"expected one of {_listed(_accepted_names(source))}"
            )
        return _read_features(file, source.net)
    if not path.exists():
        raise WeightsNotFoundError(
            f"weights={str(path)!r} does not exist: give a file with the weights of the "
            f"{source.net!r} trunk, or a folder that holds {source.filename}"
        )
    return _read_features(path, source.net)


def _accepted_names(source: TrunkSource) -> tuple[str, ...]:
    net = source.net
    return (
        source.filename,
        f"{net}.features.pth",
        f"{net}.pth",
        f"{net}.safetensors",
        f"{net}.features.safetensors",
        source.stripped_filename,
    )


def _find_in_folder(source: TrunkSource, folder: Path) -> Path | None:
    candidates = (folder / name for name in _accepted_names(source))
    return next((path for path in candidates if path.is_file()), None)


# ---------------------------------------------------------------------------------------------
# Torch's hub cache and the stripped copy in it
# ---------------------------------------------------------------------------------------------


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _stripped_path(source: TrunkSource) -> Path:
    return _hub_folder() / "lpips_fast" / source.stripped_filename


def _load_checkpoint(source: TrunkSource, path: Path, keep: bool = True) -> dict[str, Tensor]:
    """Read an official checkpoint, say so if it is not the official one, keep a stripped copy."""
    # Taken before reading: if the file is replaced meanwhile, the copy looks stale and is made
    # anew, and never looks valid when it is not.
    stamp = _stamp(path)
    try:
        features = _read_features(path, source.net)
        digest = _sha256(path)
    except WeightsError as error:
        raise WeightsError(f"{error}. Delete the file to download the official one") from error
    _warn_unless_official(source, path, digest)
    if keep:
        _keep_stripped_copy(_stripped_path(source), features, {**stamp, "source_sha256": digest})
    return features


def _load_stripped_copy(source: TrunkSource, path: Path) -> dict[str, Tensor]:
    features = _read_features(path, source.net)
    _warn_unless_official(source, path, _stripped_metadata(path)["source_sha256"])
    return features


def _stripped_copy_is_valid(stripped: Path, checkpoint: Path) -> bool:
    """Whether the copy was made from the checkpoint as it is now, or the checkpoint is gone."""
    metadata = _stripped_metadata(stripped)
    if metadata.get("layout") != STRIPPED_LAYOUT:
        return False
    try:
        stamp = _stamp(checkpoint)
    except FileNotFoundError:
        return True
    return all(metadata.get(key) == value for key, value in stamp.items())


def _stripped_metadata(path: Path) -> dict[str, str]:
    """Return the copy's metadata; empty if there is no copy, or only a damaged one."""
    if not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def _stamp(path: Path) -> dict[str, str]:
    status = path.stat()
    return {"source_size": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}


def _keep_stripped_copy(path: Path, features: dict[str, Tensor], origin: dict[str, str]) -> None:
    metadata = {"format": "pt", "layout": STRIPPED_LAYOUT, **origin}
    partial = _unique_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(safetensors.torch.save(features, metadata))
        partial.replace(path)
    except OSError as error:
        # A shared cache is often read-only. The copy only saves time, so this is no warning.
        logger.info("no stripped copy of the trunk's weights was kept at %s: %s", path, error)
    finally:
        _remove(partial)


def _warn_unless_official(source: TrunkSource, path: Path, digest: str) -> None:
    if digest.startswith(source.hash_prefix):
        return
    warnings.warn(
        f"{path} does not come from the official {source.filename}: its SHA-256 begins with "
        f"{digest[: max(8, len(source.hash_prefix))]}, expected {source.hash_prefix}. Distances "
        "computed with it are not the published LPIPS. To get the official weights, delete "
        f"{_hub_folder() / source.filename} and {_stripped_path(source)}",
        UserWarning,
        stacklevel=4,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unique_sibling(path: Path) -> Path:
    """A temporary name in the same folder: no two processes share it, and a rename is atomic."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it was moved to its final name, or never came to be
        path.unlink()


# ---------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------


def _load_download(source: TrunkSource, progress: bool) -> dict[str, Tensor]:
    if os.environ.get(OFFLINE_VARIABLE, "").lower() not in ("", "0", "false", "no"):
        raise _not_found(source, f"{OFFLINE_VARIABLE} is set, so nothing is downloaded")

    hub = _hub_folder()
    if _can_write(hub):
        _download(source, hub / source.filename, progress)
        return _load_checkpoint(source, hub / source.filename)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.filename
        _download(source, path, progress)
        features = _load_checkpoint(source, path, keep=False)
    warnings.warn(
        f"{source.filename} was downloaded but cannot be kept, because {hub} cannot be written "
        "to: it will be downloaded again at the next start. Set TORCH_HOME to a folder that can",
        UserWarning,
        stacklevel=3,
    )
    return features


def _download(source: TrunkSource, path: Path, progress: bool) -> None:
    """Download the official checkpoint to `path`, which appears there whole or not at all."""
    base = os.environ.get(MIRROR_VARIABLE) or OFFICIAL_ADDRESS
    url = f"{base.rstrip('/')}/{source.filename}"
    partial = _unique_sibling(path)
    if progress:
        size = f"{source.download_mib:.0f} MiB"
        print(f"Downloading {url} ({size}) to {path}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(partial), source.hash_prefix, progress)
        partial.replace(path)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
        reason = f"the download from {url} failed: {error}"
        if "hash value" in str(error):
            reason += ". The server sent another file, or only a part of this one"
        raise _not_found(source, reason) from error
    finally:
        _remove(partial)


def _can_write(folder: Path) -> bool:
    # Tried out, since permission bits say little about read-only mounts, quotas and root.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _not_found(source: TrunkSource, reason: str) -> WeightsNotFoundError:
    return WeightsNotFoundError(
        f"the weights of the {source.net!r} trunk, {source.filename}, were not found, and "
        f"{reason}.\n"
        f"Fetch {source.url} ({source.download_mib:.0f} MiB) where there is a network, then do "
        "one of these:\n"
        f"  - pass its path: weights='/path/to/{source.filename}'\n"
        f"  - set {WEIGHTS_VARIABLE} to the folder that holds it\n"
        f"  - put it in torch's hub cache: {_hub_folder() / source.filename}"
    )


# ---------------------------------------------------------------------------------------------
# Reading and checking
# ---------------------------------------------------------------------------------------------

# torchvision's `features.N.*`, or the `net.sliceK.N.*` of an LPIPS checkpoint, whose N is the
# same; either below the prefixes that DataParallel and torch.compile put in front.
_FEATURE_KEY = re.compile(
    r"(?:(?:module|_orig_mod)\.)*(?:features|(?:net\.)?slice\d+)\.(?P<layer>\d+\..+)"
)


def read_state_dict(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint file (`.safetensors`, or torch's `.pth`) without unpickling objects.

    Returns:
        What the file holds, its tensors on the CPU and possibly mapped from the file: mostly a
        state dict, but that is for the caller to check.

    Raises:
        WeightsNotFoundError: there is no such file.
        WeightsError: it is damaged, of another format, or holds pickled objects.

    Example:
        >>> read_state_dict("checkpoint.pth")  # doctest: +SKIP
        {'lin0.model.1.weight': tensor(...), ...}
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsNotFoundError(f"{path} does not exist or is no file: give a checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Memory mapping (zip checkpoints only) leaves the classifier, most of the file, unread.
        mmap = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise WeightsError(f"{path} cannot be read: permission denied") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise WeightsError(
            f"{path} cannot be read as a checkpoint: it is damaged or cut short, of another "
            "format, or holds pickled objects, which are never executed"
        ) from error


def _read_features(path: Path, net: str) -> dict[str, Tensor]:
    return _select_features(read_state_dict(path), net, str(path))


def _select_features(state: object, net: str, origin: str) -> dict[str, Tensor]:
    """Return the convolutional features in `state` under torchvision's names, all checked."""
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"{origin} is no state dict for the {net!r} trunk: it holds a {type(state).__name__}"
        )
    features: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _FEATURE_KEY.fullmatch(key) if isinstance(key, str) else None
        if match:
            name = f"features.{match['layer']}"
            if name in features:
                raise WeightsError(f"{origin} holds {name!r} twice, the second time as {key!r}")
            features[name] = tensor

    expected = _expected_shapes(net)
    problem = _first_problem(features, expected)
    if problem is not None:
        raise WeightsError(
            f"{origin} does not hold the weights of the {net!r} trunk: {problem}"
            f"{_guess(state, features)}"
        )
    # Copied, so that neither a mapped file nor the caller's tensors stay behind these.
    return {
        name: features[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in expected
    }


def _expected_shapes(net: str) -> dict[str, tuple[int, ...]]:
    from .trunk.table import feature_shapes  # here: the download and the command line need no trunk

    return feature_shapes(net)


def _first_problem(
    features: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    for name, shape in expected.items():
        tensor = features.get(name)
        if tensor is None:
            return f"{name!r} is missing"
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            return f"{name!r} is {found}, expected a floating-point tensor"
        if tuple(tensor.shape) != shape:
            return f"{name!r} has shape {tuple(tensor.shape)}, expected {shape}"
    surplus = next((name for name in features if name not in expected), None)
    return None if surplus is None else f"{surplus!r} is not part of it"


def _guess(state: Mapping[str, object], features: Mapping[str, Tensor]) -> str:
    """What the foreign state dict seems to be, to end the error message with."""
    for net in TRUNK_SOURCES:
        if _first_problem(features, _expected_shapes(net)) is None:
            return f" (it holds those of {net!r})"
    if not features and any(str(key).startswith("lin") for key in state):
        return " (it holds LPIPS's linear weights, which ship with this package)"
    first = next(iter(state), None)
    return " (it is empty)" if first is None else f" (its first key is {first!r})"


def _listed(names: Mapping[str, object] | tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
