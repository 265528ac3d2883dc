"""Exported files: size, time and error of every format, and what 8-bit integers cost.

    python benchmarks/bench_export.py

Every file is run in its own runtime on the CPU, with as many threads as torch, in blocks of
calls between those of the unmodified `lpips` 0.1.4 and of this package's own module; times are
medians. The error is
that of `check_exported`: on fresh images of every size the file takes. The errors of 8-bit integers
are of graded distortions (noise, blur, shift, contrast) of example images that were not calibrated
on. VGG16's weights are random where there are no others, which changes no time; its errors are then
not those of LPIPS.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from contenders import build_other, image_pair, trunk_weights
from report import head
from timing import seconds_of

import lpips_fast
from lpips_fast.export.exported import check_exported, load_exported
from lpips_fast.export.exporters import FORMATS, export_model, export_torch
from lpips_fast.export.quantization import quantize
from lpips_fast.images.reading import read_image
from lpips_fast.weights import WeightsNotFoundError

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "coreml": "coremltools"}
# A runtime's threads spin for a while after a call, and would take the cores of the next one's.

INT8 = (("static", ".onnx"), ("static", ".xml"), ("dynamic", ".onnx"))


# Calls are timed in so many blocks of each runtime, after a pause in seconds and some calls.
BLOCKS, PAUSE, WARM_UP = 3, 0.3, 3


def build(net: str) -> tuple[lpips_fast.LPIPS, bool]:
    """The model with ImageNet weights, or with random ones, and which of the two."""
    os.environ.setdefault("LPIPS_FAST_OFFLINE", "1")
    try:
        model, real = lpips_fast.LPIPS(net=net, verbose=False), True
    except WeightsNotFoundError:
        model, real = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False), False
    return model.requires_grad_(False), real


def bytes_of(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in blocks: a runtime's threads go on spinning after a call.

    Calls in turn would be measured beside the spinning threads of the one before.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(BLOCKS):
        for name, call in calls.items():
            time.sleep(PAUSE)
            for turn in range(WARM_UP + rounds // BLOCKS):
                milliseconds = 1e3 * seconds_of(call, CPU)
                if turn >= WARM_UP:
                    took[name].append(milliseconds)
    return {name: median(times) for name, times in took.items()}


def measure_formats(
    net: str, sizes: list[int], batch: int, rounds: int, folder: Path
) -> dict[str, Any]:
    model, real = build(net)
    rows: dict[str, dict[str, Any]] = {}
    files = {}
    for name, kind in FORMATS.items():
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            rows[name] = {"missing": package}
            continue
        path = folder / f"{net}{kind.suffix}"
        start = time.perf_counter()
        export_model(model, path, name)
        rows[name] = {
            "bytes": bytes_of(path),
            "export_seconds": time.perf_counter() - start,
            "error": None,
        }
        if name != "coreml":
            rows[name]["error"] = check_exported(model, path, seed=0)
            files[name] = load_exported(path)
    fused = folder / f"{net}_fused.pt2"
    start = time.perf_counter()
    export_torch(model, fused, fused=True)
    rows["torch-export, fused"] = {
        "bytes": bytes_of(fused),
        "export_seconds": time.perf_counter() - start,
        "error": check_exported(model, fused, seed=0),
    }
    files["torch-export, fused"] = load_exported(fused)
    lpips = build_other("lpips", net, CPU)
    result: dict[str, Any] = {"net": net, "real": real, "batch": batch, "rows": rows, "eager": {}}
    for size in sizes:
        pair = image_pair(batch, size, size, CPU)
        calls: dict[str, Callable[[], Any]] = {
            name: lambda file=file, pair=pair: file(*pair) for name, file in files.items()
        }
        calls |= {"lpips": lambda pair=pair: lpips(*pair), "lpips_fast": lambda p=pair: model(*p)}
        with torch.no_grad():
            times = medians(calls, rounds)
        for name in files:
            rows[name].setdefault("ms", {})[size] = times[name] / batch
        result["eager"][size] = {k: times[k] / batch for k in ("lpips", "lpips_fast")}
    return result


def calibration_images(size: int) -> torch.Tensor:
    """The example images and their mirror images; every fourth is held out of calibration."""
    images = torch.cat([read_image(IMAGES / f"ex_{name}.png") for name in ("ref", "p0", "p1")])
    if size != images.shape[-1]:
        images = torch.nn.functional.interpolate(
            images, size=(size, size), mode="bicubic", antialias=True
        ).clamp(-1, 1)
    return torch.cat([images, images.flip(3), images.flip(2), images.flip(2, 3)])


def measure_int8(net: str, size: int, folder: Path) -> list[dict[str, Any]]:
    model, real = build(net)
    rows = []
    for method, suffix in INT8:
        if suffix == ".xml" and importlib.util.find_spec("openvino") is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says it
            report = quantize(
                model, folder / f"{net}_int8{suffix}", calibration_images(size), method=method
            )
        rows.append(
            {
                "net": net,
                "real": real,
                "size": size,
                "method": method,
                "runtime": "OpenVINO" if suffix == ".xml" else "ONNX Runtime",
                **{
                    key: getattr(report, key)
                    for key in (
                        *("pairs", "calibrated_on", "bytes_float32", "bytes_int8"),
                        *("ms_float32", "ms_int8", "rank_correlation"),
                        *("largest_error", "mean_error", "mean_distance", "is_near"),
                    )
                },
            }
        )
    return rows


def table(results: dict[str, Any]) -> str:
    lines = [
        *head("Exported files", results, ["torch", "lpips", *results["packages"]]),
        "Times are milliseconds a pair, medians of calls in blocks, one runtime after another; in "
        "brackets how many times as fast as the unmodified `lpips` in torch. The largest error is "
        "absolute, or relative to a distance above 1, against `lpips_fast.LPIPS`. Batch, height "
        "and width of every file are "
        "dynamic.",
    ]
    for found in results["formats"]:
        sizes = list(found["eager"])
        weights = "" if found["real"] else " (random weights)"
        lines += [
            "",
            f"## {found['net']}{weights}, batch {found['batch']}",
            "",
            "| format | file, MB | written in, s | "
            + " | ".join(f"{size}², ms a pair" for size in sizes)
            + " | largest error |",
            "|---|---|---|" + "---|" * (len(sizes) + 1),
        ]
        for name in ("lpips", "lpips_fast"):
            cells = [_time(found["eager"][s][name], found["eager"][s]["lpips"]) for s in sizes]
            told = "`lpips`, in torch" if name == "lpips" else "`lpips_fast`, in torch"
            lines.append(f"| {told} | | | {' | '.join(cells)} | |")
        for name, row in found["rows"].items():
            if "missing" in row:
                lines.append(f"| {name} | {row['missing']} is not installed |")
                continue
            cells = [
                _time(row["ms"][s], found["eager"][s]["lpips"]) if "ms" in row else "not run"
                for s in sizes
            ]
            error = "not run" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(
                f"| {name} | {row['bytes'] / 1e6:.2f} | {row['export_seconds']:.1f} "
                f"| {' | '.join(cells)} | {error} |"
            )
    if results["int8"]:
        first = results["int8"][0]
        lines += [
            "",
            "## 8-bit integers",
            "",
            f"Calibrated on {first['calibrated_on']} images (the example images and their mirror "
            f"images; dynamic: on none), measured on {first['pairs']} pairs of others, graded "
            "distortions of mirror images that were held out: the same three pictures, so that "
            "errors on other photographs may be larger. Float32 is the same graph in the same "
            "runtime, one pair at a time.",
            "",
            "| net | method | runtime | size | MB, float32 | MB, int8 | ms, float32 | ms, int8 "
            "| Spearman | mean error | largest error | mean distance |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for row in results["int8"]:
        net = row["net"] if row["real"] else f"{row['net']} (random)"
        lines.append(
            f"| {net} | {row['method']} | {row['runtime']} | {row['size']}² "
            f"| {row['bytes_float32'] / 1e6:.2f} | {row['bytes_int8'] / 1e6:.2f} "
            f"| {row['ms_float32']:.2f} | {row['ms_int8']:.2f} | {row['rank_correlation']:.4f} "
            f"| {row['mean_error']:.4f} | {row['largest_error']:.4f} | {row['mean_distance']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _time(took: float, lpips: float) -> str:
    return f"{took:.2f} ({lpips / took:.1f}×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["alex", "squeeze", "vgg"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--int8-sizes", nargs="*", type=int, default=[64, 256])
    parser.add_argument("--batch", type=int, default=1, help="pairs a call")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each")
    parser.add_argument("--threads", type=int, help="threads of all; default: torch's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    packages = ("onnx", "onnxruntime", "openvino", "coremltools")
    results: dict[str, Any] = {
        **machine.this_run(),
        "packages": {
            name: importlib.metadata.version(name)
            for name in packages
            if importlib.util.find_spec(name) is not None
        },
        "formats": [],
        "int8": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (options.output / "export.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.output / "export.md").write_text(table(results))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for net in options.nets:
            results["formats"].append(
                measure_formats(net, options.sizes, options.batch, options.rounds, folder)
            )
            print(json.dumps(results["formats"][-1]), flush=True)
            save()
            for size in options.int8_sizes:
                results["int8"] += measure_int8(net, size, folder)
                save()
    print(table(results))


if __name__ == "__main__":
    main()
