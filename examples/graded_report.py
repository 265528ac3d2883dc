"""A report to look at: photographs of scikit-image, distorted by and by, against themselves.

Four photographs, each blurred, with noise, as JPEG, shifted and with less colour, in three
strengths: 60 pairs. They are written into a folder with a list of the pairs, and measured by

    lpips-fast dirs --pairs OUTPUT/pairs.csv -o OUTPUT/scores.csv --report OUTPUT/report.html

It takes about a quarter of a minute on two cores. Open the report in a browser: which distortions
does LPIPS mind that PSNR does not, and where?
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from demo import say_before
from PIL import Image, ImageChops, ImageEnhance, ImageFilter
from skimage import data

from lpips_fast.cli import main as lpips_fast_command

PHOTOGRAPHS = {
    "astronaut": data.astronaut,
    "chelsea": data.chelsea,
    "coffee": data.coffee,
    "rocket": data.rocket,
}
LONGEST_SIDE = 224  # so that the report, which keeps up to 256, stays small


def blur(image: Image.Image, strength: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur((0.7, 1.5, 3.5)[strength]))


def noise(image: Image.Image, strength: int) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    deviation = (6, 15, 40)[strength]
    noisy = pixels + np.random.default_rng(0).normal(0, deviation, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def jpeg(image: Image.Image, strength: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=(60, 25, 7)[strength])
    return Image.open(file).convert("RGB")


def shift(image: Image.Image, strength: int) -> Image.Image:
    """To the right, by whole pixels; what leaves on one side comes in on the other."""
    return ImageChops.offset(image, (1, 3, 8)[strength], 0)


def pale(image: Image.Image, strength: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance((0.75, 0.45, 0.0)[strength])


DISTORTIONS: tuple[Callable[[Image.Image, int], Image.Image], ...] = (
    blur,
    noise,
    jpeg,
    shift,
    pale,
)


def write_images(folder: Path) -> Path:
    """The photographs, their distorted copies, and the list of pairs, whose path it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, photograph in PHOTOGRAPHS.items():
        original = Image.fromarray(photograph()).convert("RGB")
        original.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        original.save(folder / f"{name}.png")
        for distort in DISTORTIONS:
            for strength in range(3):
                file = f"{name}_{distort.__name__}_{strength + 1}.png"
                distort(original, strength).save(folder / file)
                rows.append((f"{name}.png", file, file.removesuffix(".png").replace("_", " ")))
    pairs = folder / "pairs.csv"
    with open(pairs, "w", newline="") as written:
        csv.writer(written).writerows([("a", "b", "name"), *rows])
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("graded"), help="a folder")
    parser.add_argument("--net", default="alex", choices=["alex", "vgg", "squeeze"])
    options = parser.parse_args()
    say_before("60 pairs, measured and drawn: about a quarter of a minute on two cores.")
    pairs = write_images(options.output)
    arguments = ["dirs", "--pairs", str(pairs), "-o", str(options.output / "scores.csv")]
    arguments += ["--report", str(options.output / "report.html"), "--net", options.net]
    return lpips_fast_command([*arguments, "--metrics", "lpips,psnr,ssim"])


if __name__ == "__main__":
    raise SystemExit(main())
