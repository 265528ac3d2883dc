"""How much memory one call adds at its peak: ours beside the original.

Each figure comes from a process of its own, which calls once on small images, so that libraries and
prepared weights are in place, and then as :mod:`lpips_fast.choice.peak_memory` says.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from contenders import UnavailableError, build_other, build_ours, image_pair

from lpips_fast.choice.peak_memory import ENVIRONMENT, added_at_peak

PACKAGES = ("lpips_fast", "lpips")
MODES = ("forward", "step")
SMALL = 160  # every convolution already goes the way that it goes at larger sizes
MIB = 2**20


def settings(device_type: str, quick: bool) -> list[tuple[str, int, int, int]]:
    """Trunk, height, width and batch."""
    if quick:
        return [("alex", 256, 256, 4)]
    if device_type == "cuda":
        nets = ("alex", "squeeze", "vgg")
        return [(net, *size) for net in nets for size in ((256, 256, 32), (1080, 1920, 1))]
    return [
        ("alex", 256, 256, 4),
        ("alex", 1080, 1920, 1),
        ("squeeze", 256, 256, 4),
        ("vgg", 256, 256, 1),
    ]


def measure(package: str, net: str, height: int, width: int, batch: int, mode: str) -> int:
    """Bytes that one call adds at its peak, beyond its images. Call it in a fresh process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (
        build_ours(net, device) if package == "lpips_fast" else build_other(package, net, device)
    )

    def prepare(height: int, width: int, batch: int) -> Callable[[], Any]:
        image, target = image_pair(batch, height, width, device)
        if mode == "forward":
            return torch.no_grad()(lambda: model(image, target))
        image.requires_grad_()
        return lambda: torch.autograd.grad(model(image, target).mean(), image)

    # Weights are packed once for small and once for large images.
    prepare(SMALL, SMALL, 1)()
    prepare(min(height, SMALL), min(width, SMALL), 1)()
    call = prepare(height, width, batch)
    if device.type == "cpu":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, to be counted anew
    return added_at_peak(call, device)


def in_a_process(package: str, net: str, height: int, width: int, batch: int, mode: str) -> int:
    arguments = [package, net, str(height), str(width), str(batch), mode]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def measure_all(device_type: str, quick: bool = False) -> list[dict[str, Any]]:
    """One entry a setting and mode, with ``bytes`` by package, or ``error`` and no bytes."""
    entries: list[dict[str, Any]] = [
        {"net": net, "height": height, "width": width, "batch": batch, "mode": mode}
        for net, height, width, batch in settings(device_type, quick)
        for mode in MODES
    ]

    def fill(entry: dict[str, Any]) -> None:
        arguments = [entry[k] for k in ("net", "height", "width", "batch", "mode")]
        try:
            entry["bytes"] = {p: in_a_process(p, *arguments) for p in PACKAGES}
        except RuntimeError as error:
            entry["error"] = str(error)

    # Two at a time: the processes mostly start up, and memory use does not depend on speed.
    with concurrent.futures.ThreadPoolExecutor(1 if device_type == "cuda" else 2) as pool:
        list(pool.map(fill, entries))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--one",
        nargs=6,
        metavar=("PACKAGE", "NET", "HEIGHT", "WIDTH", "BATCH", "MODE"),
        help="measure in this very process, and print bytes",
    )
    options = parser.parse_args()
    if options.one:
        package, net, height, width, batch, mode = options.one
        try:
            print(measure(package, net, int(height), int(width), int(batch), mode))
        except (UnavailableError, OSError) as error:
            parser.exit(1, f"{error}\n")
        return
    for entry in measure_all("cuda" if torch.cuda.is_available() else "cpu", options.quick):
        case = "{net} {height}x{width} batch {batch} {mode}".format(**entry)
        figures = entry.get("bytes", {})
        print(case, entry.get("error") or {k: f"{v / MIB:.0f} MiB" for k, v in figures.items()})


if __name__ == "__main__":
    main()
