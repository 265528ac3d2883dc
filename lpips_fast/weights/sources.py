"""The official checkpoints: their names, sizes and digests. Everything that is trusted is here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OFFICIAL_ADDRESS = "https://download.pytorch.org/models"


@dataclass(frozen=True)
class TrunkSource:
    """The official checkpoint of one trunk.

    Attributes:
        net: the trunk's name in LPIPS: 'alex', 'vgg' or 'squeeze'.
        filename: the name under which torchvision publishes and caches it.
        sha256: of the whole file; torchvision's name holds its first eight digits.
        size: of the whole file, in bytes.
        features_sha256: of the convolutions alone, see
            :func:`lpips_fast.weights.features_digest`. No file can have it but a copy of the
            official weights, whatever its format.
        features_mib: size of the convolutions, in MiB.
    """

    net: str
    filename: str
    sha256: str
    size: int
    features_sha256: str
    features_mib: float

    @property
    def url(self) -> str:
        """The official address of the file."""
        return f"{OFFICIAL_ADDRESS}/{self.filename}"

    @property
    def hash_prefix(self) -> str:
        """The digits of the SHA-256 that the official name holds."""
        return self.sha256[:8]

    @property
    def download_mib(self) -> float:
        """Size of the whole file, in MiB."""
        return self.size / 2**20

    @property
    def stripped_filename(self) -> str:
        """The name of a copy that holds only the convolutions."""
        return f"{Path(self.filename).stem}.features.safetensors"

    @property
    def accepted_names(self) -> tuple[str, ...]:
        """The names under which a folder may hold the weights, the first that exists counts."""
        return (
            self.filename,
            f"{self.net}.features.pth",
            f"{self.net}.pth",
            f"{self.net}.safetensors",
            f"{self.net}.features.safetensors",
            self.stripped_filename,
        )


TRUNK_SOURCES: dict[str, TrunkSource] = {
    source.net: source
    for source in (
        TrunkSource(
            net="alex",
            filename="alexnet-owt-7be5be79.pth",
            sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            size=244_408_911,
            features_sha256="195266a4c8e96483085621ac3389a6c24f1dd0963c9ac0e001705d24ece83273",
            features_mib=9.4,
        ),
        TrunkSource(
            net="vgg",
            filename="vgg16-397923af.pth",
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            size=553_433_881,
            features_sha256="e7a5a0521f65f1615c3aab84437b37f969539737cec5eb492c06e0321f4bdbc4",
            features_mib=56.1,
        ),
        TrunkSource(
            net="squeeze",
            filename="squeezenet1_1-b8a52dc0.pth",
            sha256="b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
            size=4_958_839,
            features_sha256="e93098750a62e61ef70cc50f01c17f7eccd8b4c075997affea326c113b362a6e",
            features_mib=2.8,
        ),
    )
}


def trunk_source(net: str) -> TrunkSource:
    """The table's entry; a ValueError names the entries there are."""
    try:
        return TRUNK_SOURCES[net]
    except (KeyError, TypeError):
        raise ValueError(f"net={net!r} is unknown: use one of {listed(TRUNK_SOURCES)}") from None


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
