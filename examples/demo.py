"""The main job on three example images: distances, and distance maps as pictures.

The reference is compared with a blurred copy (p0) and a warped copy (p1). Pixel by pixel the blur
is nearer; people, and LPIPS, find the warp nearer. The maps show where.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import lpips_fast
from lpips_fast.images.heatmap import save_heatmap, save_map_numbers
from lpips_fast.images.reading import read_image
from lpips_fast.weights import WeightsError, WeightsNotFoundError

HERE = Path(__file__).resolve().parent
RANDOM = "The trunk is random: no ImageNet weights could be had. These figures are NOT LPIPS."


def say_before(what: str) -> None:
    """What the program is about to do, and how long it takes; results are on standard output."""
    print(what, file=sys.stderr, flush=True)


def add_arguments(
    parser: argparse.ArgumentParser, net: str = "alex", output: Path = Path("demo_output")
) -> None:
    """The arguments that the examples have in common, with the defaults of one."""
    parser.add_argument("--net", default=net, choices=["alex", "vgg", "squeeze"])
    parser.add_argument("--weights", type=Path, help="a file or folder with the trunk's weights")
    parser.add_argument("-o", "--output", type=Path, default=output, help=f"default: {output}")


def find_trunk(net: str, weights: Path | None) -> bool:
    """Whether real trunk weights can be had, AlexNet's always; where they cannot, it is told."""
    try:
        lpips_fast.weights.load_trunk_weights(net, weights)
    except WeightsNotFoundError as error:
        if weights is not None:
            raise
        print(f"{RANDOM}\n({error})\n")
        return False
    return True


def load_model(net: str, weights: Path | None) -> tuple[lpips_fast.LPIPS, bool]:
    """LPIPS with real trunk weights wherever they can be had; else a random trunk, and False."""
    is_real = find_trunk(net, weights)
    torch.manual_seed(0)
    model = lpips_fast.LPIPS(net=net, weights=weights, pnet_rand=not is_real, verbose=False)
    return model, is_real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    say_before("Two distances and their maps: some seconds.")

    try:
        model, is_real = load_model(options.net, options.weights)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    images = {name: read_image(HERE / "images" / f"ex_{name}.png") for name in ("ref", "p0", "p1")}
    distortions = {"p0": "blurred", "p1": "warped"}
    options.output.mkdir(parents=True, exist_ok=True)

    distances, maps = {}, {}
    with torch.no_grad():
        for name in distortions:
            model.spatial = False
            distances[name] = model(images["ref"], images[name]).item()
            model.spatial = True
            maps[name] = model(images["ref"], images[name])

    brightest = max(m.max().item() for m in maps.values())
    print(f"{'reference against':<20}{'RMSE of pixels':>16}{'LPIPS ' + options.net:>16}   map")
    for name, distortion in distortions.items():
        pixels = (images["ref"] - images[name]).square().mean().sqrt().item()
        picture = save_heatmap(
            maps[name],
            options.output / f"ref_{name}.png",
            title=f"Where {name}, the {distortion} copy, differs from the reference",
            quantity="LPIPS distance" if is_real else "random-trunk distance",
            label=f"{options.net}, version 0.1" if is_real else "RANDOM trunk, not LPIPS",
            distance=distances[name],
            image0=images["ref"],
            image1=images[name],
            names=("reference", f"{name} ({distortion})"),
            vmax=brightest,
        )
        save_map_numbers(maps[name], picture.with_suffix(".npy"))
        row = f"{name} ({distortion})"
        print(f"{row:<20}{pixels:>16.4f}{distances[name]:>16.6f}   {picture}")
    if not is_real:
        print(f"\n{RANDOM}")


if __name__ == "__main__":
    main()
