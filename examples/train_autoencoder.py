"""A small autoencoder trained with L1 and LPIPS, in plain PyTorch and compiled.

Crops of photographs, scikit-image's or those in a folder, go through an encoder and a decoder under
bfloat16 autocast; the loss is L1 + LPIPS, the latter by ``LPIPS(frozen=True)`` inside the module
that is trained. The same training runs twice, from the same weights over the same crops: as it is,
and with ``torch.compile`` around module and loss. Prints the time of a step of both and draws their
curves. The default, 100 steps each, takes about three minutes on two
cores without instructions for bfloat16, where --float32 takes a quarter of a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from demo import RANDOM, add_arguments, find_trunk, say_before
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import trange

import lpips_fast
from lpips_fast.images.reading import ImageError, image_to_tensor, read_image
from lpips_fast.weights import WeightsError

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


class Autoencoder(nn.Module):
    """Images to a quarter of their height and width and 16 channels, and back; with its loss."""

    def __init__(self, loss: lpips_fast.LPIPS, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 2, 1), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU()),
            nn.Conv2d(2 * width, 16, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            *(nn.Conv2d(16, 2 * width, 3, padding=1), nn.SiLU()),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU()),
            *(nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh()),
        )
        self.lpips = loss

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))

    def forward(self, images: Tensor) -> Tensor:
        """The loss of a batch (N, 3, H, W) in [-1, 1]."""
        made = self.reconstruct(images)
        return (made - images).abs().mean() + self.lpips(made, images)


def photographs(folder: Path | None) -> list[Tensor]:
    """(3, H, W) each, in [-1, 1]."""
    if folder is not None:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        return [read_image(path)[0] for path in paths]
    import skimage.data

    return [image_to_tensor(getattr(skimage.data, name)())[0] for name in PHOTOGRAPHS]


def crops(images: list[Tensor], batch: int, size: int) -> Iterator[Tensor]:
    """Batches (N, 3, size, size) without end, always the same."""
    generator = torch.Generator().manual_seed(0)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    while True:
        chosen = []
        for _ in range(batch):
            image = images[number(len(images))]
            top, left = (number(side - size + 1) for side in image.shape[1:])
            chosen.append(image[:, top : top + size, left : left + size])
        yield torch.stack(chosen)


def train(
    model: Autoencoder,
    loss_of: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    steps: int,
    autocast: contextlib.AbstractContextManager[object],
    label: str,
) -> tuple[list[float], list[float]]:
    """The loss of every step, and its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses, seconds = [], []
    for _ in trange(steps, desc=label, unit=" steps", disable=None):
        images = next(batches)
        start = time.perf_counter()
        with autocast:
            loss = loss_of(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def draw(curves: dict[str, list[float]], shown: Tensor, made: Tensor, path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    axes = left.subplots()
    for (label, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(losses, style, label=label, linewidth=1.5)
    axes.set(xlabel="step", ylabel="L1 + LPIPS", xlim=(0, max(1, len(losses) - 1)))
    axes.grid(alpha=0.3)
    axes.legend()
    cells = right.subplots(2, 2)
    for row, title, images in zip(cells.T, ("photograph", "reconstruction"), (shown, made)):
        row[0].set_title(title, fontsize=10)
        for cell, image in zip(row, images):
            cell.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
            cell.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width of a crop")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    add_arguments(parser, output=Path("demo_output/autoencoder.png"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    say_before(f"{options.steps} steps, plain and compiled: 0.1 to 2 s each on two cores.")
    try:
        is_real = find_trunk(options.net, options.weights)
        images = photographs(options.images)
    except (WeightsError, ImageError, OSError) as error:
        parser.exit(1, f"{error}\n")
    small = [image for image in images if min(image.shape[1:]) < options.size]
    if not images or small:
        sizes = [tuple(image.shape[1:]) for image in small] or "no image"
        parser.exit(1, f"photographs of at least {options.size}² are wanted, got {sizes}\n")

    torch.manual_seed(0)
    loss = lpips_fast.LPIPS(
        net=options.net,
        weights=options.weights,
        pnet_rand=not is_real,
        reduction="mean",
        frozen=True,
        verbose=False,
    )
    plain = Autoencoder(loss)
    compiled = copy.deepcopy(plain)
    ways = {"plain": (plain, plain), "compiled": (compiled, torch.compile(compiled))}
    curves, took = {}, {}
    for label, (model, loss_of) in ways.items():
        batches = crops(images, options.batch, options.size)
        autocast = (
            contextlib.nullcontext()
            if options.float32
            else torch.autocast("cpu", dtype=torch.bfloat16)
        )
        curves[label], seconds = train(model, loss_of, batches, options.steps, autocast, label)
        took[label] = median(seconds[len(seconds) // 2 :])
    print(f"L1 + LPIPS {options.net}, {options.batch} crops of {options.size}x{options.size}")
    for label, losses in curves.items():
        print(
            f"{label:9} {took[label] * 1e3:7.1f} ms a step   "
            f"loss {losses[0]:.4f} -> {sum(losses[-10:]) / len(losses[-10:]):.4f}"
        )
    shown = next(crops(images, 2, options.size))
    with torch.no_grad():
        made = plain.reconstruct(shown)
    draw(curves, shown, made, options.output)
    print(options.output)
    if not is_real:
        print(RANDOM)


if __name__ == "__main__":
    main()
