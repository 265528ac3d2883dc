"""Exported files against the model they came from: size, time of a pair, largest error; and int8.

    python benchmarks/bench_export.py

Every file takes any batch, height and width. Times are medians, one pair a call, one runtime after
the other, all with the same number of threads. Errors are those of
:func:`lpips_fast.exported.check_exported`, on fresh noise, near pairs and flat images. For int8,
ranges are calibrated on the example images and their mirror images, of which every fourth is held
out; graded distortions of the held-out ones are the pairs that errors are of. VGG16's trunk is
random unless ``--trained`` names it: its times hold, its errors are not those of LPIPS.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from contenders import image_pair, trunk_weights
from timing import seconds_of
from torch import Tensor

import lpips_fast
from lpips_fast.export import export_model
from lpips_fast.exported import check_exported, load_exported
from lpips_fast.images import read_image
from lpips_fast.quantization import QuantizationWarning, quantize

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"
FORMATS = {
    "onnx": ("ONNX Runtime", "lpips.onnx"),
    "torch-export": ("torch.export", "lpips.pt2"),
    "torchscript": ("TorchScript", "lpips.ts"),
    "openvino": ("OpenVINO", "lpips.xml"),
}
INT8 = [("lpips_int8.onnx", "static"), ("lpips_int8_dynamic.onnx", "dynamic")]
INT8 += [("lpips_int8.xml", "static")]


def model_of(net: str, trained: bool) -> lpips_fast.LPIPS:
    weights = None if trained else trunk_weights(net)
    return lpips_fast.LPIPS(net=net, weights=weights, verbose=False)


def calibration_images() -> Tensor:
    """(12, 3, 64, 64): the example images and their mirror images."""
    batch = torch.cat([read_image(path) for path in sorted(IMAGES.glob("*.png"))])
    return torch.cat([batch, batch.flip(3), batch.flip(2), batch.transpose(2, 3)])


def file_size(path: Path) -> int:
    weights = path.with_suffix(".bin")
    beside = weights.stat().st_size if path.suffix == ".xml" and weights.exists() else 0
    return path.stat().st_size + beside


def measure_formats(
    net: str, trained: bool, folder: Path, sizes: list[int], rounds: int
) -> list[dict[str, Any]]:
    model = model_of(net, trained)
    pairs = {size: image_pair(1, size, size, CPU) for size in sizes}

    def times(call: Callable[[Tensor, Tensor], Any]) -> dict[str, float]:
        with torch.inference_mode():
            seconds = {
                size: [seconds_of(lambda p=pair: call(*p), CPU) for _ in range(rounds + 2)]
                for size, pair in pairs.items()
            }
        return {str(size): median(found[2:]) for size, found in seconds.items()}

    rows = [{"net": net, "trained": trained, "format": "eager", "seconds": times(model)}]
    for name, (_, file) in FORMATS.items():
        path = folder / f"{net}_{file}"
        export_model(model, path, format=name)
        row = {"net": net, "trained": trained, "format": name, "bytes": file_size(path)}
        row["largest_error"] = check_exported(model, path)
        # One runtime at a time, and none beside it: their threads wait for work by spinning.
        exported = load_exported(path)
        row["seconds"] = times(exported)
        del exported
        gc.collect()
        rows.append(row)
    return rows


def measure_int8(net: str, trained: bool, folder: Path) -> list[dict[str, Any]]:
    model = model_of(net, trained)
    rows = []
    for file, method in INT8:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", QuantizationWarning)
            report = quantize(model, folder / f"{net}_{file}", calibration_images(), method=method)
        names = ["pairs", "bytes_float32", "bytes_int8", "ms_float32", "ms_int8"]
        names += ["rank_correlation", "mean_error", "largest_error", "mean_distance"]
        numbers = {name: getattr(report, name) for name in names}
        warned = any(issubclass(w.category, QuantizationWarning) for w in caught)
        runtime = "OpenVINO" if file.endswith(".xml") else "ONNX Runtime"
        rows.append(
            {"net": net, "trained": trained, "runtime": runtime, "method": method, "warned": warned}
            | numbers
        )
    return rows


def page(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    lines = [
        "# Exported files",
        "",
        f"`{report['command']}`",
        "",
        f"{report['device']}; torch {report['torch']}, {report['packages']}; load in the minute "
        f"before {report['load']:.1f}. One pair a call, float32, files of any batch, height and "
        "width; medians, one runtime after the other. Core ML's and TensorRT's files were not run.",
        "",
        "| net | runtime | file, MB | "
        + " | ".join(f"{size}², ms (against lpips_fast)" for size in sizes)
        + " | largest error |",
        "|---|---|---|" + "---|" * len(sizes) + "---|",
    ]
    eager: dict[str, Any] = {}
    for row in report["formats"]:
        if row["format"] == "eager":
            eager = row["seconds"]
        cells = [
            f"{row['seconds'][str(s)] * 1e3:.1f} ({row['seconds'][str(s)] / eager[str(s)]:.2f}×)"
            for s in sizes
        ]
        name = "lpips_fast" if row["format"] == "eager" else FORMATS[row["format"]][0]
        net = row["net"] + ("" if row["trained"] else " (random)")
        size = "" if row["format"] == "eager" else f"{row['bytes'] / 1e6:.1f}"
        error = "" if row["format"] == "eager" else f"{row['largest_error']:.0e}"
        lines.append(f"| {net} | {name} | {size} | {' | '.join(cells)} | {error} |")
    lines += [
        "",
        "## 8-bit integers in the trunk",
        "",
        "64², one pair; errors of the distance against the float32 file.",
        "",
        "| net | runtime | method | file, MB (float32) | ms (float32) | rank correlation | mean "
        "error | largest error | mean distance | warns |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["int8"]:
        net = row["net"] + ("" if row["trained"] else " (random)")
        lines.append(
            f"| {net} | {row['runtime']} | {row['method']} | {row['bytes_int8'] / 1e6:.1f} "
            f"({row['bytes_float32'] / 1e6:.1f}) | {row['ms_int8']:.1f} ({row['ms_float32']:.1f}) "
            f"| {row['rank_correlation']:.4f} | {row['mean_error']:.4f} | "
            f"{row['largest_error']:.4f} | {row['mean_distance']:.3f} | "
            f"{'yes' if row['warned'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def packages() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "openvino"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["alex", "squeeze", "vgg"])
    parser.add_argument("--trained", nargs="*", default=["alex", "squeeze"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256], help="height and width")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/bench_export.py", *sys.argv[1:]]),
        "device": machine.name(CPU),
        "torch": torch.__version__,
        "packages": packages(),
        "load": machine.load() or 0.0,
        "sizes": options.sizes,
        "formats": [],
        "int8": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for net in options.nets:
            case = (net, net in options.trained, Path(folder))
            report["formats"] += measure_formats(*case, options.sizes, options.rounds)
            report["int8"] += measure_int8(*case)
            print(f"{net} measured", file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "export.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "export.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
