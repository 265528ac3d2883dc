"""How far lpips_fast is from the unmodified ``lpips`` 0.1.4, with one state dict in both.

``python tests/parity.py --page docs/parity.md`` writes the tables; ``test_parity.py`` holds them
to bounds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import lpips_fast

REPOSITORY = Path(__file__).resolve().parents[1]
NETS = ("alex", "vgg", "squeeze")
VERSIONS = ("0.1", "0.0")
MODES = {
    "distance": {},
    "baseline": {"lpips": False},
    "spatial": {"spatial": True},
    "spatial baseline": {"lpips": False, "spatial": True},
}
#: A loss, as most use it: a frozen trunk, a fixed target, and an image so large that every layer
#: goes its usual way, as arguments of :func:`compare`.
AS_A_LOSS = {"batch": 1, "size": (163, 147), "frozen": True}
LOSS_MODES = ("distance", "spatial")


class Errors(NamedTuple):
    """Largest relative errors: of values elementwise, of gradients by norm."""

    values: float
    image_gradients: float
    weight_gradients: float  # of the linear layers, and of the trunk where it learns


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def trunk_weights(net: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that keep activations in range (He et al. 2015), the same for both."""
    return dict(_drawn_weights(net, seed))


@functools.cache
def _drawn_weights(net: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in lpips_fast.trunk.feature_shapes(net).items():
        if name.endswith("bias"):
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            fan_in = shape[1] * shape[2] * shape[3]
            weights[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return weights


@contextmanager
def without_initialization() -> Iterator[None]:
    """Modules made within hold whatever is in memory, until all of it is loaded.

    Else torchvision draws the 124 million numbers of VGG16's classifier, which nobody looks at.
    """

    def left(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    with ExitStack() as patches:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "constant_"):
            patches.enter_context(mock.patch.object(torch.nn.init, name, left))
        yield


def models(
    reference: ModuleType, net: str, version: str, dtype: torch.dtype, **options
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the original, with the same weights: ours are loaded into the original, strictly."""
    common = {"net": net, "version": version, "verbose": False, **options}
    ours = lpips_fast.LPIPS(**common, weights=trunk_weights(net))
    with without_initialization():
        theirs = reference.LPIPS(**common, pnet_rand=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def image_pair(
    batch: int, height: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """An image of blurred noise and a distorted copy of it, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    image = (smooth * 2 - 1).clamp(-1, 1)
    noise = 0.2 * torch.randn(image.shape, generator=generator)
    return image.to(dtype), (image + noise).clamp(-1, 1).to(dtype)


def compare(
    reference: ModuleType,
    net: str,
    version: str,
    mode: str,
    dtype: torch.dtype,
    batch: int = 2,
    size: tuple[int, int] = (67, 83),
    seed: int = 0,
    frozen: bool = False,
) -> Errors:
    """Errors of one configuration: the value, every layer's part, and all gradients.

    Args:
        frozen: the trunk does not learn and the second image needs no gradient: a loss, as most
            use it, which goes another way through our code than a trunk that learns.
    """
    in0, in1 = image_pair(batch, *size, dtype, seed)
    outcomes = []
    for model in models(reference, net, version, dtype, pnet_tune=not frozen, **MODES[mode]):
        images = [in0.clone().requires_grad_(), in1.clone().requires_grad_(not frozen)]
        value, layers = model(*images, retPerLayer=True)
        learning = {k: p for k, p in model.named_parameters() if p.requires_grad}
        loss = (value * torch.linspace(0.5, 1.5, value.numel()).view_as(value).to(dtype)).sum()
        asked = [x for x in images if x.requires_grad]
        grads = torch.autograd.grad(loss, [*asked, *learning.values()])
        outcomes.append(
            ([value, *layers], grads[: len(asked)], dict(zip(learning, grads[len(asked) :])))
        )
    (values, images, weights), (ref_values, ref_images, ref_weights) = outcomes
    assert [v.shape for v in values] == [v.shape for v in ref_values]
    assert weights.keys() == ref_weights.keys()
    spatial = "spatial" in mode
    return Errors(
        max(
            relative(v, r) if spatial else ((v - r) / r).abs().max().item()
            for v, r in zip(values, ref_values)
        ),
        max(map(relative, images, ref_images)),
        max((relative(weights[k], ref_weights[k]) for k in weights), default=0.0),
    )


# ---------------------------------------------------------------------------------------------
# The real trunks on photographs
# ---------------------------------------------------------------------------------------------

#: Those that scikit-image ships, all in colour and none of them drawn.
PHOTOGRAPHS = (
    *("astronaut", "chelsea", "coffee", "rocket"),
    *("hubble_deep_field", "immunohistochemistry", "retina", "stereo_motorcycle"),
)
QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "largest": 1.0}


class CropErrors(NamedTuple):
    """Relative errors, one number a crop: of the distance, of its layers, of the image gradient."""

    value: Tensor
    layer: Tensor  # the largest of the layers
    gradient: Tensor  # by norm


class PhotographErrors(NamedTuple):
    from_lpips: CropErrors  # ours, in float32, against lpips in float32
    ours: CropErrors  # against lpips in float64
    lpips: CropErrors  # against itself in float64


def photograph_crops(count: int, size: int, seed: int = 0) -> Tensor:
    """Square pieces of scikit-image's photographs: (count, 3, size, size) in [-1, 1]."""
    from skimage import data

    generator = torch.Generator().manual_seed(seed)
    photographs = []
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        pixels = torch.from_numpy(image[0] if isinstance(image, tuple) else image)
        photographs.append(pixels[..., :3].permute(2, 0, 1).float() / 127.5 - 1)
    crops = []
    for index in range(count):
        image = photographs[index % len(photographs)]
        top, left = (
            int(torch.randint(length - size + 1, (), generator=generator))
            for length in image.shape[1:]
        )
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)


def distorted(crops: Tensor, seed: int = 1) -> Tensor:
    """Copies with noise, blurred, darkened or moved by a pixel, in turn."""
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for index, crop in enumerate(crops):
        image = crop[None]
        if index % 4 == 0:
            image = image + 0.1 * torch.randn(image.shape, generator=generator)
        elif index % 4 == 1:
            image = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1)
        elif index % 4 == 2:
            image = 0.8 * image - 0.1
        else:
            image = image.roll(1, dims=-1)
        copies.append(image[0].clamp(-1, 1))
    return torch.stack(copies)


def real_models(
    reference: ModuleType, net: str, version: str, weights: Path | None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the original with ImageNet's weights, the trunk frozen."""
    ours = lpips_fast.LPIPS(net=net, version=version, weights=weights, verbose=False)
    with without_initialization():
        theirs = reference.LPIPS(net=net, version=version, pnet_rand=True, verbose=False)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.requires_grad_(False)


def compare_on_photographs(
    reference: ModuleType,
    net: str,
    version: str,
    crops: Tensor,
    weights: Path | None = None,
    batch: int = 8,
) -> PhotographErrors:
    """Errors of a real trunk's distances and image gradients, crop by crop."""
    ours, theirs = real_models(reference, net, version, weights)
    copies = distorted(crops)
    outcomes = []
    for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        model = model.to(dtype)
        rows = []
        for first in range(0, len(crops), batch):
            image = crops[first : first + batch].to(dtype).requires_grad_()
            target = copies[first : first + batch].to(dtype)
            value, layers = model(image, target, retPerLayer=True)
            (gradient,) = torch.autograd.grad(value.sum(), image)
            rows.append([value.detach(), *(layer.detach() for layer in layers), gradient])
        outcomes.append([torch.cat(column).double().flatten(1) for column in zip(*rows)])
    found, original, exact = outcomes
    return PhotographErrors(
        _crop_errors(found, original), _crop_errors(found, exact), _crop_errors(original, exact)
    )


def _crop_errors(result: Sequence[Tensor], expected: Sequence[Tensor]) -> CropErrors:
    relative_by_norm = [
        (r - e).norm(dim=1) / e.norm(dim=1).clamp(min=1e-300) for r, e in zip(result, expected)
    ]
    value, *layers, gradient = relative_by_norm
    return CropErrors(value, torch.stack(layers).amax(0), gradient)


def quantiles(errors: Tensor) -> list[str]:
    return [f"{errors.quantile(q).item():.1e}" for q in QUANTILES.values()]


def photograph_tables(
    reference: ModuleType, crops: Tensor, weights: Path | None
) -> tuple[str, str]:
    """A table of values and one of gradients, each net and version in a row."""
    head = ["net", "version", *QUANTILES]
    values = [_row([*head, "any layer, largest"]), "|---" * (len(head) + 1) + "|"]
    labels = [f"{who}: {q}" for who in ("from `lpips`", "ours", "`lpips`") for q in QUANTILES]
    gradients = [_row(["net", "version", *labels]), "|---" * (2 + len(labels)) + "|"]
    for net, version in itertools.product(NETS, VERSIONS):
        try:
            errors = compare_on_photographs(reference, net, version, crops, weights)
        except lpips_fast.weights.WeightsNotFoundError:
            values.append(_row([net, version, "no weights were to be had"]))
            continue
        layer = f"{errors.from_lpips.layer.max().item():.1e}"
        values.append(_row([net, version, *quantiles(errors.from_lpips.value), layer]))
        cells = [cell for part in errors for cell in quantiles(part.gradient)]
        gradients.append(_row([net, version, *cells]))
    return "\n".join(values), "\n".join(gradients)


def published_table(weights: Path | None) -> str:
    """Distances of the original repository's example images, the layers' parts after them."""
    folder = REPOSITORY / "examples" / "images"
    images = {
        name: lpips_fast.im2tensor(lpips_fast.load_image(str(folder / f"ex_{name}.png")))
        for name in ("ref", "p0", "p1")
    }
    lines = [
        _row(["net", "version", "images", "distance", "published", "its layers"]),
        "|---|---|---|---|---|---|",
    ]
    for net, version in itertools.product(NETS, VERSIONS):
        try:
            model = lpips_fast.LPIPS(net=net, version=version, weights=weights, verbose=False)
        except lpips_fast.weights.WeightsNotFoundError:
            lines.append(_row([net, version, "no weights were to be had", "", "", ""]))
            continue
        for pair in (("ref", "p0"), ("ref", "p1"), ("p0", "p1")):
            with torch.no_grad():
                value, layers = model(*(images[name] for name in pair), retPerLayer=True)
            published = PUBLISHED.get((net, pair), "") if version == "0.1" else ""
            parts = ", ".join(f"{layer.item():.6f}" for layer in layers)
            lines.append(
                _row([net, version, " to ".join(pair), f"{value.item():.6f}", published, parts])
            )
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


#: richzhang/PerceptualSimilarity, issues 95 and 120; VGG16: moono/lpips-tf2.x.
PUBLISHED = {
    ("alex", ("ref", "p0")): "0.721881",
    ("alex", ("ref", "p1")): "0.138",
    ("alex", ("p0", "p1")): "0.719658",
    ("vgg", ("ref", "p0")): "0.569",
    ("vgg", ("ref", "p1")): "0.422",
}


def table(reference: ModuleType) -> str:
    lines = [
        "| net | version | mode | float32: value | image gradients | weight gradients "
        "| float64: value | image gradients | weight gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for net, version, mode in itertools.product(NETS, VERSIONS, MODES):
        cells = []
        for dtype in (torch.float32, torch.float64):
            cells += [f"{x:.1e}" for x in compare(reference, net, version, mode, dtype)]
        lines.append(f"| {net} | {version} | {mode} | {' | '.join(cells)} |")
    for net, mode in itertools.product(NETS, LOSS_MODES):
        cells = []
        for dtype in (torch.float32, torch.float64):
            # A gradient near a kink differs by much more than others: its least and its most.
            images = (
                compare(reference, net, "0.1", mode, dtype, seed=seed, **AS_A_LOSS)
                for seed in range(3)
            )
            values, gradients, weights = zip(*images)
            least, most = (f"{x(gradients):.1e}" for x in (min, max))
            cells += [f"{max(values):.1e}", f"{least} to {most}", f"{max(weights):.1e}"]
        lines.append(f"| {net}, frozen | 0.1 | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a folder with the networks' weights")
    parser.add_argument("--crops", type=int, default=120, help="of photographs (default: 120)")
    parser.add_argument("--size", type=int, default=64, help="of a crop (default: 64)")
    parser.add_argument("--page", type=Path, help="write the tables into it (default: print them)")
    options = parser.parse_args()

    from conftest import declare_torchvision_operators

    declare_torchvision_operators()
    import lpips

    values, gradients = photograph_tables(
        lpips, photograph_crops(options.crops, options.size), options.weights
    )
    tables = {
        "machine": f"Torch {torch.__version__} on {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}; {options.crops} pieces of "
        f"{options.size}×{options.size} pixels.",
        "examples": published_table(options.weights),
        "values": values,
        "gradients": gradients,
        "modes": table(lpips),
    }
    if options.page is None:
        print("\n\n".join(tables.values()))
        return
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from generated_text import write_part

    for name, text in tables.items():
        write_part(options.page, name, text)


if __name__ == "__main__":
    main()
