"""Draws the pictures of docs/masks.md and measures its table, from the example images.

    python scripts/draw_masks.py    # masks.png and mask-leak.png in docs/images, and the table

It takes some minutes.

The first picture shows both meanings of a mask. The second, and the table, say how much the
weighted distance depends on what lies outside the mask: in one of two images all pixels further
than d from the mask are replaced by noise, and so much of the distance changes. It needs ImageNet
weights of all three trunks (docs/weights.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from generated_text import write_part
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import lpips_fast
from lpips_fast import functional
from lpips_fast.comparison.masks import Mask, MaskMode
from lpips_fast.images import read_image
from lpips_fast.lpips import Net

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples" / "images"
PAGE = REPOSITORY / "docs" / "masks.md"
NETS: dict[Net, str] = {"alex": "AlexNet", "squeeze": "SqueezeNet", "vgg": "VGG16"}
COLOURS = {"alex": "#1b9e77", "squeeze": "#d95f02", "vgg": "#7570b3"}  # ColorBrewer, Dark2
DISTANCES = (0, 4, 8, 16, 32, 48, 64, 96, 128)  # pixels
ROUNDING = 1e-6  # of convolutions whose images differ elsewhere
SIDE, REGION = 448, 64  # of the image, and of the mask in its middle


def examples() -> dict[str, Tensor]:
    return {name: read_image(EXAMPLES / f"ex_{name}.png") for name in ("ref", "p0")}


# ---------------------------------------------------------------------------- the two meanings


def show(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(((image[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def show_map(axes: Axes, numbers: Tensor, title: str, colours: str) -> None:
    axes.imshow(numbers.numpy(), cmap=colours, vmin=0, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_meanings(path: Path) -> None:
    """A row for each meaning: what the network sees, and what counts of the layers' maps."""
    images = examples()
    size = (images["ref"].shape[2], images["ref"].shape[3])
    y, x = torch.meshgrid(*(torch.arange(n) - n / 2 + 0.5 for n in size), indexing="ij")
    mask = (y.square() + x.square()).sqrt() < 0.3 * size[0]
    model = lpips_fast.LPIPS(net="alex", verbose=False)
    shapes = [tap.shape[2:] for tap in model.encode(images["ref"]).taps]
    weights = Mask(mask[None, None]).weights([(s[0], s[1]) for s in shapes], torch.float32)
    pair = (images["ref"], images["p0"])
    figure = Figure(figsize=(9.6, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, 5)
    with torch.no_grad():
        plain = model(*pair).item()
        modes: tuple[MaskMode, ...] = ("weighted", "fill")
        for row, mode in zip(rows, modes):
            model.spatial = False
            value = model(*pair, mask=mask, mask_mode=mode).item()
            model.spatial = True
            where = model(*pair, mask=mask, mask_mode=mode)[0, 0]
            filled = [torch.where(mask, image, 0) if mode == "fill" else image for image in pair]
            show(row[0], filled[0], f'mask_mode="{mode}"\nthe network sees')
            show(row[1], filled[1], "and")
            if mode == "weighted":
                show_map(row[2], weights[0][0, 0], "weights of layer 1", "Greys_r")
                show_map(row[3], weights[-1][0, 0], "of layers 3 to 5", "Greys_r")
            else:
                for axes, (h, w) in zip(row[2:4], (shapes[0], shapes[-1])):
                    axes.imshow(torch.ones(h, w).numpy(), cmap="Greys_r", vmin=0, vmax=1.2)
                    axes.set_title("all positions count", fontsize=9)
                    axes.set_axis_off()
            show_map(row[4], where, f"the map\nLPIPS {value:.3f}", "YlGnBu")
    figure.suptitle(f"Without a mask LPIPS is {plain:.3f}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------- the leak


def mosaic(image: Tensor) -> Tensor:
    """SIDE x SIDE pixels of mirrored copies, so that there are no edges between them."""
    both = torch.cat([image, image.flip(3)], dim=3)
    both = torch.cat([both, both.flip(2)], dim=2)
    times = -(-SIDE // both.shape[2])
    return both.repeat(1, 1, times, times)[:, :, :SIDE, :SIDE]


def from_mask() -> Tensor:
    """How far a pixel lies from the mask, along rows or columns, whichever is more; 0 within."""
    middle = (SIDE - REGION) // 2
    along = torch.arange(SIDE)
    away = torch.maximum(middle - along, along - (middle + REGION - 1)).clamp(min=0)
    return torch.maximum(away[:, None], away[None])


def leak(net: Net) -> list[float]:
    """What all positions change by, over the distance, for all DISTANCES.

    Without signs, so that changes do not cancel: the distance changes by no more than that.
    """
    model = lpips_fast.LPIPS(net=net, verbose=False, check_inputs=False)
    reference, copy = (mosaic(image) for image in examples().values())
    noise = torch.rand(copy.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    away = from_mask()
    mask = away == 0
    changes = []
    with torch.no_grad():
        target = model.encode(reference)
        before = maps(model, target, copy)
        grids = [(m.shape[2], m.shape[3]) for m in before]
        weights = Mask(mask[None, None]).weights(grids, torch.float32)
        distance_before = model(reference, copy, mask=mask).item()
        for border in DISTANCES:
            changed = torch.where(away > border, noise, copy)
            assert model(reference, changed, mask=mask, mask_mode="fill").equal(
                model(reference, copy, mask=mask, mask_mode="fill")
            )
            parts = zip(maps(model, target, changed), before, weights)
            change = sum((w * (after - m).abs()).mean().item() for after, m, w in parts)
            distance = model(reference, changed, mask=mask).item()
            assert abs(distance - distance_before) <= change + 1e-6
            changes.append(change / distance_before)
    return changes


def maps(model: lpips_fast.LPIPS, target: lpips_fast.Features, image: Tensor) -> list[Tensor]:
    """Of every layer, at its own resolution."""
    weights = [model.layer_weight(k) for k in model.layers]
    return functional.distance_map(target.taps, model.encode(image).taps, weights)


def draw_leak(changes: dict[Net, list[float]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for net, values in changes.items():
        found = [(d, 100 * v) for d, v in zip(DISTANCES, values) if v > ROUNDING]
        axes.plot(*zip(*found), marker="o", color=COLOURS[net], label=NETS[net])
    axes.set_yscale("log")
    axes.set_xlabel("pixels between the mask and what changes")
    axes.set_ylabel("% of the distance that change")
    axes.set_title('What leaks into mask_mode="weighted"', fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def table(changes: dict[Net, list[float]]) -> str:
    lines = [
        "| Pixels that change | " + " | ".join(NETS[net] for net in changes) + " |",
        "|---|" + "---:|" * len(changes),
    ]
    for k, distance in enumerate(DISTANCES):
        what = "all outside" if distance == 0 else f"further than {distance}"
        cells = [_percent(values[k]) for values in changes.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(change: float) -> str:
    return "0" if change < ROUNDING else f"{100 * change:.2g}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.manual_seed(0)
    draw_meanings(options.images / "masks.png")
    changes = {net: leak(net) for net in NETS}
    draw_leak(changes, options.images / "mask-leak.png")
    write_part(options.page, "mask leak", table(changes))
    print(table(changes))


if __name__ == "__main__":
    main()
