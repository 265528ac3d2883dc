"""Draws the main picture of README and docs from the example images.

    python scripts/draw_overview.py            # writes docs/images/overview.png

Each row is a distorted copy beside the reference: where LPIPS finds it different, and what each
layer of the trunk adds to the distance. The bars of both rows have one scale, each map its own. It
needs AlexNet's ImageNet weights (docs/weights.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import lpips_fast
from lpips_fast.images import read_image
from lpips_fast.images.heatmap import COLOUR_MAP
from lpips_fast.trunk.table import trunk_spec

REPOSITORY = Path(__file__).resolve().parents[1]
COPIES = {"p0": "blurred copy", "p1": "warped copy"}
BAR = "#2f6fa8"
LARGE, SMALL = 13, 12  # points; README shows the picture at some four fifths of its size


def show(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(((image[0].permute(1, 2, 0) + 1) / 2).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=LARGE)
    axes.set_axis_off()


def draw(weights: str | None, path: Path) -> None:
    """One row a copy: reference, copy, map of the distance, and the layers' parts."""
    model = lpips_fast.LPIPS(net="alex", weights=weights, verbose=False)
    folder = REPOSITORY / "examples" / "images"
    images = {name: read_image(folder / f"ex_{name}.png") for name in ("ref", *COPIES)}
    parts, maps = {}, {}
    with torch.no_grad():
        for name in COPIES:
            model.spatial = False
            _, layers = model(images["ref"], images[name], retPerLayer=True)
            parts[name] = [layer.item() for layer in layers]
            model.spatial = True
            maps[name] = model(images["ref"], images[name])[0, 0].numpy()

    figure = Figure(figsize=(10.6, 6.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(COPIES), 4, width_ratios=[1, 1, 1, 1.3])
    longest = max(map(max, parts.values()))
    names_of_layers = tuple(trunk_spec("alex").taps)
    for row, (name, words) in zip(grid, COPIES.items()):
        pixels = (images["ref"] - images[name]).square().mean().sqrt().item()
        show(row[0], images["ref"], "reference")
        show(row[1], images[name], f"{words}\nRMSE {pixels:.6f}")
        drawn = row[2].imshow(maps[name], cmap=COLOUR_MAP, vmin=0)
        row[2].set_title(f"where they differ\nLPIPS {sum(parts[name]):.6f}", fontsize=LARGE)
        row[2].set_axis_off()
        end = float(maps[name].max())
        bar = figure.colorbar(drawn, ax=row[2], location="bottom", shrink=0.9, aspect=14, pad=0.04)
        bar.set_ticks([0, end], labels=["0", f"{end:.6f}"], fontsize=SMALL)
        for axes in row[:3]:
            axes.set_anchor("N")  # one line of pictures, whatever stands below them
        bars = row[3]
        bars.barh(names_of_layers, parts[name], color=BAR)
        for layer, part in enumerate(parts[name]):
            text = f"{part:.6f}"
            bars.text(part + 0.02 * longest, layer, text, va="center", fontsize=SMALL)
        bars.tick_params(axis="y", labelsize=SMALL)
        bars.invert_yaxis()
        bars.set_xlim(0, 1.4 * longest)
        bars.set_xticks([])
        bars.set_title("what each layer adds", fontsize=LARGE)
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a file or folder with AlexNet's weights")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "docs" / "images" / "overview.png"
    )
    options = parser.parse_args()
    draw(options.weights, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
