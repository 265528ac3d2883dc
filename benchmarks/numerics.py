"""How far from exact arithmetic: ties, photographs, tiny differences, half precision, outliers.

``python benchmarks/numerics.py`` writes the tables of docs/numerics.md, of the real trunks, beside
the unmodified ``lpips`` 0.1.4 with the same weights. ``--only ties`` and the like measure and write
one of them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpips_fast
from lpips_fast.kernels.max_pool import receivers
from lpips_fast.trunk.legality import FastSlice
from lpips_fast.trunk.receptive_fields import receptive_fields
from lpips_fast.trunk.slice_node import slice_tap

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import contenders  # noqa: E402
import parity  # noqa: E402
from exact_ties import exact, flat_images, image_gradient, windows  # noqa: E402
from report import TRUNKS  # noqa: E402

PAGE = REPOSITORY / "docs" / "numerics.md"
NETS = ("alex", "squeeze", "vgg")
CROP, CROPS = 64, 102


def ours(net: str, **options) -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(net=net, verbose=False, **options).requires_grad_(False)


def theirs(net: str, **options: bool) -> nn.Module:
    spatial = options.get("spatial", False)
    reference = contenders.build_other("lpips", net, torch.device("cpu"), spatial)
    reference.load_state_dict(ours(net).state_dict())
    return reference.requires_grad_(False)


def target_image(size: int) -> Tensor:
    return parity.image_pair(1, size, size, torch.float32, 7)[1]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------------------------- ties


def ties() -> str:
    head = ["image"] + [f"{TRUNKS[n]}, {w}" for n in NETS for w in ("ours", "`lpips`")]
    rows = {name: [name] for name in flat_images()}
    near: list[str] = []
    for net in NETS:
        model, reference = ours(net), theirs(net)
        truth_of, in_float64 = exact(reference), copy.deepcopy(reference).double()
        for name, image in flat_images().items():
            target = target_image(image.shape[-1])
            truth = image_gradient(truth_of, image.double(), target.double())
            errors = [
                parity.relative(image_gradient(one, image, target).double(), truth)
                for one in (model, reference)
            ]
            rows[name] += [f"{error:.1e}" for error in errors]
            if errors[0] > max(3 * errors[1], 1e-4):
                lost = lost_ulp(model, in_float64, image)
                near.append(f"{TRUNKS[net]}, {name}: {lost:.2g} ulp")
            print(net, *rows[name], near[-1:], file=sys.stderr, flush=True)
    told = "Above 1e-4 and three times `lpips`, by near ties that are none. What the choices lose: "
    return table(head, list(rows.values())) + (f"\n\n{told}{'; '.join(near)}." if near else "")


# ------------------------------------------------------------------------------ photographs


def crops() -> Iterator[tuple[str, Tensor]]:
    """Crops of scikit-image's photographs, places drawn by a fixed seed, in [-1, 1]."""
    import skimage.data

    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
    generator = torch.Generator().manual_seed(1)
    for _, name in zip(range(CROPS), itertools.cycle(names)):
        pixels = torch.from_numpy(getattr(skimage.data, name)())
        pixels = pixels[..., None].expand(-1, -1, 3) if pixels.dim() == 2 else pixels
        image = pixels.permute(2, 0, 1)[None] / 127.5 - 1
        top, left = (
            int(torch.randint(size - CROP, (), generator=generator)) for size in image.shape[2:]
        )
        yield name, image[..., top : top + CROP, left : left + CROP].contiguous()


def pooled_features(model: nn.Module, image: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """What max-poolings are given, slice by slice, and the keys of it, of ours or the original."""
    x = model.scaling_layer(image)
    if not isinstance(model, lpips_fast.LPIPS):
        for block in model.net.children():
            yield x, []
            x = block(x)
        return
    slices = model.net.fast_slices(x.device, x.dtype)
    for fast, keys in zip(slices, receptive_fields(slices, x)):
        yield x, keys
        assert isinstance(fast, FastSlice)
        x = slice_tap(fast, x)


@torch.no_grad()
def lost_ulp(model: nn.Module, in_float64: nn.Module, image: Tensor) -> float:
    """The most that an index chosen by max-pooling loses, in ulp of its window's maximum.

    In float64: of the features that exact arithmetic has, chosen by a model, in all windows.
    """
    exact_x, most = in_float64.scaling_layer(image.double()), 0.0
    for block, (x, keys) in zip(in_float64.net.children(), pooled_features(model, image)):
        pool = next(block.children())
        if isinstance(pool, nn.MaxPool2d):
            y = F.max_pool2d(x, pool.kernel_size, pool.stride, ceil_mode=pool.ceil_mode)
            index = receivers(x, y, pool.kernel_size, pool.stride, keys[0] if keys else None)
            _, pooled = windows(exact_x, pool)
            chosen = exact_x.flatten(2).gather(2, index.flatten(2)).view_as(pooled)
            is_live = pooled > 0
            ulp = torch.exp2(pooled[is_live].log2().floor()) * 2.0**-23
            if is_live.any():
                most = max(most, ((pooled - chosen)[is_live] / ulp).max().item())
        exact_x = block(exact_x)
    return most


def photographs() -> str:
    head = ["trunk", "", "median", "90 %", "99 %", "worst", "above 1e-4", "these lose at most"]
    rows = []
    for net in NETS:
        models = {"ours": ours(net), "`lpips`": theirs(net)}
        truth_of = exact(models["`lpips`"])
        in_float64 = copy.deepcopy(models["`lpips`"]).double()
        target = target_image(CROP)
        errors: dict[str, list[float]] = {who: [] for who in models}
        lost: dict[str, list[float]] = {who: [] for who in models}
        for name, image in crops():
            truth = image_gradient(truth_of, image.double(), target.double())
            for who, model in models.items():
                gradient = image_gradient(model, image, target).double()
                errors[who].append(parity.relative(gradient, truth))
                if errors[who][-1] > 1e-4:
                    lost[who].append(lost_ulp(model, in_float64, image))
                    print(net, name, who, errors[who][-1], lost[who][-1], file=sys.stderr)
        for who, found in errors.items():
            quantiles = (torch.tensor(found).quantile(q).item() for q in (0.5, 0.9, 0.99, 1))
            cells = [f"{q:.1e}" for q in quantiles]
            ulp = f"{max(lost[who]):.0f} ulp" if lost[who] else "-"
            rows.append([TRUNKS[net], who, *cells, f"{len(lost[who])} of {CROPS}", ulp])
    return table(head, rows)


# ----------------------------------------------------------------------------- tiny differences


def tiny() -> str:
    sizes = (1e-3, 3e-4, 1e-4, 3e-5)
    head = ["trunk", "images", ""] + [f"{s:g}: mean, rms" for s in sizes]
    rows = []
    for net, smooth in itertools.product(NETS, (False, True)):
        model, reference = ours(net), theirs(net)
        in_float64 = copy.deepcopy(reference).double()
        cells: dict[str, list[str]] = {"ours": [], "`lpips`": []}
        for size in sizes:
            errors: dict[str, list[Tensor]] = {who: [] for who in cells}
            for seed in range(16):
                generator = torch.Generator().manual_seed(seed)
                coarse = torch.rand(8, 3, *((4, 4) if smooth else (8, 8)), generator=generator)
                x = F.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1) * 1.8 - 0.9
                if not smooth:
                    noise = torch.randn(x.shape, generator=generator)
                    x = (x + 0.1 * noise).clamp(-0.9, 0.9)
                y = x + size * torch.randn(x.shape, generator=generator)
                with torch.no_grad():
                    truth = in_float64(x.double(), y.double())
                    for who, one in zip(errors, (model, reference)):
                        errors[who].append((one(x, y) / truth - 1).flatten())
            for who, found in errors.items():
                e = torch.cat(found)
                cells[who].append(f"{e.mean().abs():.1e}, {e.square().mean().sqrt():.1e}")
        for who, row in cells.items():
            rows.append([TRUNKS[net], "smooth" if smooth else "noisy", who, *row])
            print(*rows[-1], file=sys.stderr, flush=True)
    return table(head, rows)


# ------------------------------------------------------------------------------- half precision


def half() -> str:
    weights = (1e-4, 1e-2, 1.0, 1e2, 1e4)
    head = ["trunk", "dtype"] + [f"loss weight {w:g}" for w in weights] + ["length at 1e-4"]
    rows = []
    x, y = (t.repeat(2, 1, 1, 1) for t in parity.image_pair(1, 128, 128, torch.float32, 3))
    x[1] = x[0].flip(-1)
    for net in NETS:
        truth = image_gradient(ours(net), x, y).flatten()
        for dtype in (torch.float16, torch.bfloat16):
            model, cells, lengths = ours(net, dtype=dtype), [], []
            for weight in weights:
                leaf = x.clone().requires_grad_()
                (weight * model(leaf, y).sum()).backward()
                got = leaf.grad.flatten()
                cells.append(f"{F.cosine_similarity(got, truth, 0).item():.4f}")
                lengths.append((got.norm() / truth.norm()).item() / weight)
            rows.append([TRUNKS[net], str(dtype)[6:], *cells, f"{lengths[0]:.3f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    return table(head, rows)


# ------------------------------------------------------------------------------------- outliers


def outliers() -> str:
    head = ["trunk", "value", "map, ours beside `lpips`", "beyond its reach in `lpips`"]
    rows = []
    for net, value in itertools.product(NETS, (1e3, 1e6, 1e9)):
        model, reference = ours(net, spatial=True), theirs(net, spatial=True)
        x, y = parity.image_pair(1, 128, 128, torch.float32, 3)
        spoiled = x.clone()
        spoiled[0, 1, 31, 42] = value
        with torch.no_grad():
            got, expected, without = model(spoiled, y), reference(spoiled, y), reference(x, y)
        difference = (got - expected).abs()
        untouched = (expected - without).abs() < 1e-6 * without.abs().max()
        beyond = difference[untouched].max().item() if untouched.any() else 0.0
        rows.append([TRUNKS[net], f"{value:g}", f"{difference.max().item():.1e}", f"{beyond:.1e}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "ties": ties,
    "photographs": photographs,
    "tiny": tiny,
    "half": half,
    "outliers": outliers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--page", type=Path, default=PAGE, help="whose tables are replaced")
    arguments = parser.parse_args()
    for name in arguments.only:
        found = TABLES[name]()
        print(found)
        page = arguments.page.read_text()
        start, end = f"<!-- generated by benchmarks/numerics.py: {name} -->", "<!-- end -->"
        before, after = page.split(start)
        after = after[after.index(end) :]
        arguments.page.write_text(f"{before}{start}\n\n{found}\n\n{after}")


if __name__ == "__main__":
    main()
