"""LPIPS as an ONNX file, checked in ONNX Runtime, and once more with its trunk in 8-bit integers.

    python examples/export_onnx.py [FOLDER]

Needs the extras ``export`` and ``images``. Without ImageNet weights it says so, and shows the way
with a random trunk.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

import lpips_fast
from lpips_fast.export import export_onnx
from lpips_fast.exported import check_exported, load_exported
from lpips_fast.images import read_image
from lpips_fast.quantization import QuantizationWarning, quantize

IMAGES = Path(__file__).resolve().parent / "images"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "export_output")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = lpips_fast.LPIPS(net="alex", verbose=False)
    except lpips_fast.weights.WeightsError as error:
        print(f"{error}\nGoing on with a random trunk: the numbers below are not LPIPS.\n")
        torch.manual_seed(0)
        model = lpips_fast.LPIPS(net="alex", pnet_rand=True, verbose=False)

    path = folder / "lpips_alex.onnx"
    record = export_onnx(model, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB\n{record}")
    print(f"largest error in ONNX Runtime: {check_exported(model, path):.0e}")

    images = {name: read_image(IMAGES / f"ex_{name}.png") for name in ("ref", "p0", "p1")}
    exported = load_exported(path)
    for name in ("p0", "p1"):
        ours, theirs = (f(images["ref"], images[name]).item() for f in (model, exported))
        print(f"ref against {name}: {ours:.6f}, by the file {theirs:.6f}")

    # Calibrate on images like those that will be compared; three and their mirror images are few.
    batch = torch.cat(list(images.values()))
    batch = torch.cat([batch, batch.flip(3), batch.flip(2), batch.transpose(2, 3)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantizationWarning)
        print(f"\n{quantize(model, folder / 'lpips_alex_int8.onnx', batch)}")
    for warning in caught:
        print(f"warning: {warning.message}")


if __name__ == "__main__":
    main()
