"""How far lpips_fast is from the unmodified ``lpips`` 0.1.4, with one state dict in both.

``python tests/parity.py`` prints the tables of ``docs/parity.md``, and ``--write`` puts them there:
some minutes on two cores. ``test_parity.py`` holds the figures to bounds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import lpips_fast
from lpips_fast.images import read_image

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
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in lpips_fast.trunk.feature_shapes(net).items():
        if name.endswith("bias"):
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            fan_in = shape[1] * shape[2] * shape[3]
            weights[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return weights


def models(
    reference: ModuleType, net: str, version: str, dtype: torch.dtype, **options
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the original, with the same weights: ours are loaded into the original, strictly."""
    common = {"net": net, "version": version, "verbose": False, **options}
    ours = lpips_fast.LPIPS(**common, weights=trunk_weights(net))
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


def table_of_examples(reference: ModuleType) -> str:
    """The example images with ImageNet weights, where these are found: both distances."""
    folder = REPOSITORY / "examples" / "images"
    images = {path.stem.removeprefix("ex_"): read_image(path) for path in folder.glob("ex_*.png")}
    lines = [
        "| net | version | images | `lpips` | `lpips_fast` | relative difference |",
        "|---|---|---|---|---|---|",
    ]
    for net, version in itertools.product(NETS, VERSIONS):
        ours = lpips_fast.LPIPS(net=net, version=version, verbose=False)
        theirs = reference.LPIPS(net=net, version=version, verbose=False, pnet_rand=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        for pair in (("ref", "p0"), ("ref", "p1"), ("p0", "p1")):
            with torch.no_grad():
                expected, result = (m(*(images[x] for x in pair)).item() for m in (theirs, ours))
            lines.append(
                f"| {net} | {version} | {', '.join(pair)} | {expected:.6f} | {result:.6f} "
                f"| {abs(result - expected) / expected:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/parity.md")
    options = parser.parse_args()

    from conftest import declare_torchvision_operators

    declare_torchvision_operators()
    import lpips

    parts = {"examples": table_of_examples(lpips), "parity": table(lpips)}
    if not options.write:
        print("\n\n".join(parts.values()))
        return
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from generated_text import write_part

    page = REPOSITORY / "docs" / "parity.md"
    for name, text in parts.items():
        write_part(page, name, text)
    print(f"written: {page}")


if __name__ == "__main__":
    main()
