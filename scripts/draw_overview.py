"""Draws the main picture of README and docs from the example images.

    python scripts/draw_overview.py            # writes docs/images/overview.png

Each row is a distorted copy beside the reference: where LPIPS finds it different, and what each
layer of the trunk adds to the distance. It needs AlexNet's ImageNet weights (docs/weights.md).
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

REPOSITORY = Path(__file__).resolve().parents[1]
COPIES = {"p0": "blurred copy", "p1": "warped copy"}
# Sequential, light at zero, and told apart by people who are colour-blind (ColorBrewer).
COLOURS = "YlGnBu"
BAR = "#2c7fb8"


def show(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(((image[0].permute(1, 2, 0) + 1) / 2).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
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

    figure = Figure(figsize=(9.6, 4.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(COPIES), 4, width_ratios=[1, 1, 1.2, 1.35])
    longest = max(map(max, parts.values()))
    for row, (name, words) in zip(grid, COPIES.items()):
        pixels = (images["ref"] - images[name]).square().mean().sqrt().item()
        show(row[0], images["ref"], "reference")
        show(row[1], images[name], f"{words}\nRMSE of pixels {pixels:.2f}")
        drawn = row[2].imshow(maps[name], cmap=COLOURS, vmin=0)
        row[2].set_title(f"where they differ\nLPIPS {sum(parts[name]):.3f}", fontsize=10)
        row[2].set_axis_off()
        figure.colorbar(drawn, ax=row[2], shrink=0.9).ax.tick_params(labelsize=8)
        bars = row[3]
        bars.barh(range(len(parts[name])), parts[name], color=BAR)
        for layer, part in enumerate(parts[name]):
            bars.text(part + 0.02 * longest, layer, f"{part:.3f}", va="center", fontsize=8)
        bars.set_yticks(
            range(len(parts[name])), [f"layer {k}" for k in range(len(parts[name]))], fontsize=8
        )
        bars.invert_yaxis()
        bars.set_xlim(0, 1.22 * longest)
        bars.set_xticks([])
        bars.set_title("what each layer adds", fontsize=10)
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
