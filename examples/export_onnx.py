"""LPIPS as an ONNX file, in 32-bit floats and in 8-bit integers, run by ONNX Runtime.

Writes both files, holds the first against the model, and prints the distances of the example images
by all three. It takes about half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo import RANDOM, add_arguments, load_model, say_before

from lpips_fast.export.exported import check_exported, load_exported
from lpips_fast.export.exporters import export_onnx
from lpips_fast.export.quantization import quantize
from lpips_fast.images.reading import read_image
from lpips_fast.weights import WeightsError

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    say_before("Two ONNX files, written and run: about half a minute on two cores.")

    try:
        model, is_real = load_model(options.net, options.weights)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    full, small = (options.output / f"lpips_{options.net}{kind}.onnx" for kind in ("", "_int8"))

    print(f"{full}: {export_onnx(model, full)}")
    print(f"  at most {check_exported(model, full):.1e} from the model")
    images = {name: read_image(HERE / "images" / f"ex_{name}.png") for name in ("ref", "p0", "p1")}
    # Three images are few to calibrate on: take some hundred that are like yours.
    print(f"{small}: {quantize(model, small, torch.cat(list(images.values())))}")

    print("\nreference against    model      ONNX       int8")
    files = [load_exported(path) for path in (full, small)]
    for name in ("p0", "p1", "ref"):
        pair = images["ref"], images[name]
        with torch.no_grad():
            distances = [model(*pair).item(), *(file(*pair).item() for file in files)]
        print(f"{name:<17}" + "".join(f"{d:11.6f}" for d in distances))
    if not is_real:
        print(f"\n{RANDOM}")


if __name__ == "__main__":
    main()
