"""What a mask costs: forwards and training steps with one, over those without.

    python benchmarks/bench_masks.py     # some minutes; also the table in docs/masks.md

Without a mask, with one of ones for all images, with one of noise for each image, and filled, in
turn in one process; figures are medians of the ratios of neighbouring calls. The column "none,
again" is the call without a mask once more: as far as it is from 1, the others are noise too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import report
import torch
from contenders import build_ours, image_pair
from timing import seconds_of

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))
from generated_text import write_part  # noqa: E402

CPU = torch.device("cpu")
NAMES = {"alex": "AlexNet", "squeeze": "SqueezeNet", "vgg": "VGG16"}
SHAPES = ((16, 64), (1, 256))
WAYS = ("none, again", "ones, for all", "noise, for each", "filled")


def calls(net: str, batch: int, size: int, is_step: bool) -> list[Callable[[], object]]:
    """Without a mask, and in all ways with one."""
    image, target = image_pair(batch, size, size, CPU)
    model = build_ours(net, CPU)
    leaf = image.clone().requires_grad_()
    each = torch.rand(batch, 1, size, size)
    masks = (torch.ones(size, size, dtype=torch.bool), each, each > 0.5)

    def call(**masking: object) -> object:
        if is_step:
            return torch.autograd.grad(model(leaf, target, **masking).sum(), leaf)
        with torch.no_grad():
            return model(image, target, **masking)

    options: list[dict[str, object]] = [
        {},
        {},
        {"mask": masks[0]},
        {"mask": masks[1]},
        {"mask": masks[2], "mask_mode": "fill"},
    ]
    return [lambda masking=masking: call(**masking) for masking in options]


def ratios(net: str, batch: int, size: int, is_step: bool, seconds: float) -> list[float]:
    compared = calls(net, batch, size, is_step)
    for call in compared:
        call()
    found: list[list[float]] = []
    spent = 0.0
    while spent < seconds or len(found) < 7:
        times = [seconds_of(call, CPU) for call in compared]
        found.append([t / times[0] for t in times[1:]])
        spent += sum(times)
    return [median(column) for column in zip(*found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=6, help="for the calls of a row")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "masks.md")
    options = parser.parse_args()
    rows = []
    for net in options.nets:
        for batch, size in SHAPES:
            for is_step in (False, True):
                found = ratios(net, batch, size, is_step, options.seconds)
                what = f"{NAMES[net]}, {batch} of {size}², {'step' if is_step else 'forward'}"
                rows.append([what, *(f"{ratio:.3f}" for ratio in found)])
                print(*rows[-1], flush=True)
    write_part(options.page, "mask cost", report.table(["", *WAYS], rows))


if __name__ == "__main__":
    main()
