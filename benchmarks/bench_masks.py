"""What a mask costs a forward, by its parts.

    python benchmarks/bench_masks.py     # two minutes; also the table in docs/masks.md

A mask adds little to a call that takes milliseconds, less than what whole calls vary by on a
machine that others use. So the parts are measured by themselves: making the weights and looking at
them, and the masked distance of all layers less the plain one; and whole calls without a mask, of
which they are a part. Processor time of one thread, the least of many calls in turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report
import torch
from contenders import build_ours, image_pair

from lpips_fast import functional
from lpips_fast.comparison.masked_layers import as_position_weights

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))
from generated_text import write_part  # noqa: E402

CPU = torch.device("cpu")
SHAPES = ((16, 64), (1, 256))


def least(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, in turn."""
    for call in calls:
        call()
    times = []
    for _ in range(rounds):
        row = []
        for call in calls:
            start = time.process_time()
            call()
            row.append(time.process_time() - start)
        times.append(row)
    return [min(column) for column in zip(*times)]


def measure(net: str, batch: int, size: int) -> list[str]:
    """A row of the table."""
    model = build_ours(net, CPU)
    pair = image_pair(batch, size, size, CPU)
    feats0, feats1 = (model.encode(x).taps for x in pair)
    channels = [model.layer_weight(k) for k in model.layers]
    masks = (
        torch.ones(size, size, dtype=torch.bool),
        torch.ones(batch, 1, size, size),
        torch.rand(batch, 1, size, size) * 0.9,
    )
    (forward,) = least([lambda: model(*pair)], 5 if net == "vgg" else 15)
    cells = []
    for mask in masks:
        grids = [(f.shape[2], f.shape[3]) for f in feats0]
        weights = as_position_weights(model, mask, pair).weights(grids, torch.float32)
        plain, masked, made = least(
            [
                lambda: functional.distance(feats0, feats1, channels),
                lambda weights=weights: functional.distance(
                    feats0, feats1, channels, position_weights=weights
                ),
                lambda mask=mask: as_position_weights(model, mask, pair),
            ],
            40,
        )
        cells.append(f"{100 * (made + masked - plain) / forward:.2f}%")
    return [f"{report.TRUNKS[net]}, {batch} of {size}²", report.milliseconds(forward), *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(report.TRUNKS))
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "masks.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for net in options.nets:
            for batch, size in SHAPES:
                rows.append(measure(net, batch, size))
                print(*rows[-1], flush=True)
    heads = ["", "ms without", "ones, bool, for all", "ones, one each", "noise, one each"]
    write_part(options.page, "mask cost", report.table(heads, rows))


if __name__ == "__main__":
    main()
