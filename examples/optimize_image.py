"""Gradient descent on an image towards another, with LPIPS as the loss.

What the original repository's ``lpips_loss.py`` does: Adam on the pixels, with the distance to the
target as the loss. The target is encoded once; each step costs one forward and one backward pass of
the image. Saves one picture: the image along the way, and the distance. The 300 steps take about a
quarter of a minute on two cores.

Optimise with vgg. Its first layers keep the full resolution, and the image becomes the target. The
other two reduce it in their first layer, and the distance falls while noise of single pixels, which
they hardly see, grows: --net alex shows it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo import RANDOM, add_arguments, load_model, say_before
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import trange

import lpips_fast
from lpips_fast.images.reading import ImageError, read_image
from lpips_fast.weights import WeightsError

HERE = Path(__file__).resolve().parent


def optimize(
    model: lpips_fast.LPIPS, start: Tensor, target: Tensor, steps: int, rate: float
) -> tuple[list[float], dict[int, Tensor]]:
    """Adam on the pixels of ``start``, (1, 3, H, W) in [-1, 1].

    Returns:
        The distance before each step and after the last, and the image at some of the steps.
    """
    with torch.no_grad():
        wanted = model.encode(target)
    image = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=rate)
    # Most changes early: the steps shown are ever further apart.
    shown = sorted({round(steps * part) for part in (0, 0.03, 0.1, 0.3, 1)})
    distances: list[float] = []
    frames: dict[int, Tensor] = {}
    for step in trange(steps + 1, unit=" steps", disable=None):
        distance = model(image, wanted).mean()
        distances.append(distance.item())
        if step in shown:
            frames[step] = image.detach().clone()
        if step < steps:
            optimizer.zero_grad()
            distance.backward()
            optimizer.step()
            with torch.no_grad():
                image.clamp_(-1, 1)
    return distances, frames


def draw(
    distances: list[float], frames: dict[int, Tensor], target: Tensor, label: str, path: Path
) -> None:
    figure = Figure(figsize=(2.1 * (len(frames) + 1), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Gradient descent on an image, loss: {label}", fontsize=11)
    strip, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    images = [(f"step {step}\n{distances[step]:.4f}", image) for step, image in frames.items()]
    images.append(("target\n0", target))
    for axes, (title, image) in zip(strip.subplots(1, len(images)), images, strict=True):
        axes.imshow(((image[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    axes = below.subplots()
    axes.plot(distances, color="tab:blue", linewidth=1.5)
    axes.plot(list(frames), [distances[step] for step in frames], "o", color="tab:blue")
    axes.set(xlabel="step", ylabel="distance", yscale="log")
    axes.set_xlim(0, max(1, len(distances) - 1))
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", default=str(HERE / "images" / "ex_p1.png"), help="or 'noise'")
    parser.add_argument("--target", type=Path, default=HERE / "images" / "ex_ref.png")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.02, help="Adam's learning rate")
    add_arguments(parser, net="vgg", output=Path("demo_output/optimize_image.png"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    seconds = max(5, round(options.steps / 300 * 15))
    say_before(f"{options.steps} steps: about {seconds} s on two cores, for images of 64x64.")

    try:
        model, is_real = load_model(options.net, options.weights)
        target = read_image(options.target)
        if options.start == "noise":
            generator = torch.Generator().manual_seed(0)
            start = torch.rand(target.shape, generator=generator) * 2 - 1
        else:
            start = read_image(options.start)
        distances, frames = optimize(model, start, target, options.steps, options.rate)
    except (WeightsError, ImageError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    label = f"LPIPS {options.net}" if is_real else f"RANDOM {options.net} trunk, not LPIPS"
    draw(distances, frames, target, label, options.output)
    print(f"distance {distances[0]:.4f} -> {distances[-1]:.4f} in {options.steps} steps")
    print(options.output)
    if not is_real:
        print(RANDOM)


if __name__ == "__main__":
    main()
