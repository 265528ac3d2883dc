"""Fewer layers: what stopping early saves, and how far it agrees with the whole metric.

    python benchmarks/bench_layers.py

Time is that of ``LPIPS(layers=…)`` over that of all layers, the medians of calls in turn. Agreement
is with the whole metric, not with people: distances of graded distortions (noise, blur, JPEG,
shift, colour) to the example images that they were made of, by the trained trunks of AlexNet and
SqueezeNet. ``same nearer`` is how often both call the same one of two distortions of an image the
nearer: of all pairs, and of pairs of different kinds. VGG16's trunk is random, for time alone.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import machine
import numpy as np
import torch
from contenders import image_pair, trunk_weights
from report import head
from timing import seconds_of
from torch import Tensor

import lpips_fast
from lpips_fast.images.reading import image_to_tensor, read_image

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"
LEVELS = 10

# Beside all that begin with the first layer: one shallow and one deep layer, and two of them apart.
SUBSETS = {
    "alex": [(1,), (2,), (4,), (0, 2), (1, 3)],
    "squeeze": [(1,), (3,), (6,), (0, 3), (1, 3, 5)],
    "vgg": [(1,), (2,), (4,), (0, 2), (1, 3)],
}


def choices(net: str) -> list[tuple[int, ...]]:
    count = len(lpips_fast.trunk.TRUNKS[net].taps)
    prefixes = [tuple(range(k)) for k in range(1, count + 1)]
    return [*prefixes, *SUBSETS[net]]


# ------------------------------------------------------------------------------ distortions


class Distorted(NamedTuple):
    reference: int
    kind: str
    level: int
    image: Tensor  # (3, H, W) in [-1, 1]


def _noise(image: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return image + 0.04 * level * torch.randn(image.shape, generator=generator)


def _blur(image: Tensor, level: int, _: Any) -> Tensor:
    radius, sigma = 10, 0.3 * level
    positions = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-(positions**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = torch.nn.functional.pad(image[None], [radius] * 4, mode="reflect")
    lines = torch.nn.functional.conv2d(padded, kernel[:, :, None], groups=3)
    return torch.nn.functional.conv2d(lines, kernel[..., None], groups=3)[0]


def _jpeg(image: Tensor, level: int, _: Any) -> Tensor:
    from PIL import Image

    pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=95 - 9 * level)
    return image_to_tensor(np.array(Image.open(file)))[0]


def _shift(image: Tensor, level: int, _: Any) -> Tensor:
    return image.roll((level, level), dims=(1, 2))


def _colour(image: Tensor, level: int, _: Any) -> Tensor:
    gain = torch.tensor([1 + 0.05 * level, 1.0, 1 - 0.05 * level]).view(3, 1, 1)
    return (image + 1) * gain - 1


KINDS: dict[str, Callable[[Tensor, int, Any], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "JPEG": _jpeg,
    "shift": _shift,
    "colour": _colour,
}


def distortions(references: list[Tensor]) -> Iterator[Distorted]:
    generator = torch.Generator().manual_seed(0)
    for number, image in enumerate(references):
        for kind, distort in KINDS.items():
            for level in range(1, LEVELS + 1):
                made = distort(image, level, generator).clamp(-1, 1)
                yield Distorted(number, kind, level, made)


# ------------------------------------------------------------------------------ agreement


def pearson(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item()


def spearman(a: Tensor, b: Tensor) -> float:
    return pearson(*(x.argsort().argsort().double() for x in (a, b)))


def same_nearer(a: Tensor, b: Tensor, made: list[Distorted]) -> tuple[float, float]:
    """Part of the pairs of one image's distortions that two metrics put in the same order."""
    same: list[bool] = []
    same_of_kinds: list[bool] = []
    for i, j in itertools.combinations(range(len(made)), 2):
        if made[i].reference != made[j].reference:
            continue
        agree = bool((a[i] < a[j]) == (b[i] < b[j]))
        same.append(agree)
        if made[i].kind != made[j].kind:
            same_of_kinds.append(agree)
    return sum(same) / len(same), sum(same_of_kinds) / len(same_of_kinds)


@torch.no_grad()
def agreement(net: str) -> dict[tuple[int, ...], dict[str, float]]:
    """Of every choice of layers with all of them, by trained weights."""
    model = lpips_fast.LPIPS(net=net, verbose=False)
    references = [read_image(path)[0] for path in sorted(IMAGES.glob("*.png"))]
    made = list(distortions(references))
    originals = torch.stack([references[d.reference] for d in made])
    images = torch.stack([d.image for d in made])
    layers = torch.stack([x.flatten() for x in model(originals, images, retPerLayer=True)[1]])
    whole = layers.sum(0).double()
    result = {}
    for chosen in choices(net):
        part = layers[list(chosen)].sum(0).double()
        both, of_kinds = same_nearer(part, whole, made)
        result[chosen] = {
            "pairs": len(made),
            "spearman": spearman(part, whole),
            "pearson": pearson(part, whole),
            "same_nearer": both,
            "same_nearer_of_different_kinds": of_kinds,
        }
    return result


# ------------------------------------------------------------------------------ time


def times(net: str, size: int, rounds: int) -> dict[tuple[int, ...], dict[str, float]]:
    """Seconds of a forward and of a training step, medians of calls in turn."""
    image, target = image_pair(1, size, size, CPU)
    leaf = image.clone().requires_grad_()
    calls: dict[tuple[tuple[int, ...], str], Callable[[], Any]] = {}
    for chosen in choices(net):
        options: dict[str, Any] = {"net": net, "weights": trunk_weights(net), "verbose": False}
        model = lpips_fast.LPIPS(**options, layers=chosen).requires_grad_(False)

        def forward(model: Any = model) -> None:
            with torch.inference_mode():
                model(image, target)

        def step(model: Any = model) -> None:
            torch.autograd.grad(model(leaf, target).sum(), leaf)

        calls[chosen, "forward"] = forward
        calls[chosen, "step"] = step
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[key].append(seconds_of(call, CPU))
    return {
        chosen: {mode: median(seconds[chosen, mode]) for mode in ("forward", "step")}
        for chosen in choices(net)
    }


def measure(net: str, size: int, rounds: int, trained: bool) -> list[dict[str, Any]]:
    took = times(net, size, rounds)
    agrees = agreement(net) if trained else {}
    whole = took[tuple(range(len(lpips_fast.trunk.TRUNKS[net].taps)))]
    return [
        {
            "net": net,
            "layers": list(chosen),
            "minimum_size": lpips_fast.trunk.minimum_size(net, chosen),
            "seconds": took[chosen],
            "part_of_the_whole": {m: took[chosen][m] / whole[m] for m in whole},
            "agreement": agrees.get(chosen),
        }
        for chosen in choices(net)
    ]


def table(results: dict[str, Any]) -> str:
    size = results["size"]
    lines = [
        *head("Fewer layers", results, ["torch"]),
        f"Time: one pair of {size}², float32, medians of {results['rounds']} calls in turn; in "
        "brackets the part of all layers' time. Agreement: with all layers (not with people), on "
        f"{LEVELS} grades each of {', '.join(KINDS)} of the three example images of 64².",
    ]
    for net, rows in itertools.groupby(results["rows"], key=lambda row: row["net"]):
        random = net not in results["trained"]
        lines += [
            "",
            f"## {net}" + (" (random trunk: time only)" if random else ""),
            "",
            "| layers | from size | forward, ms | step, ms | Spearman | Pearson "
            "| same nearer | of different kinds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            times_told = " | ".join(
                f"{row['seconds'][m] * 1e3:.1f} ({row['part_of_the_whole'][m]:.0%})"
                for m in ("forward", "step")
            )
            found = row["agreement"]
            told = (
                "- | - | - | -"
                if found is None
                else f"{found['spearman']:.3f} | {found['pearson']:.3f} "
                f"| {found['same_nearer']:.1%} | {found['same_nearer_of_different_kinds']:.1%}"
            )
            layers = ", ".join(map(str, row["layers"]))
            lines.append(f"| {layers} | {row['minimum_size']} | {times_told} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["alex", "squeeze", "vgg"])
    parser.add_argument("--trained", nargs="*", default=["alex", "squeeze"])
    parser.add_argument("--size", type=int, default=256, help="height and width, for time")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    results: dict[str, Any] = {
        **machine.this_run(),
        "size": options.size,
        "rounds": options.rounds,
        "trained": options.trained,
        "rows": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for net in options.nets:
        results["rows"] += measure(net, options.size, options.rounds, net in options.trained)
        (options.output / "layers.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.output / "layers.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
