"""Lighter trunks: what each way of making them saves, and how far it agrees with the whole metric.

    python benchmarks/bench_compression.py                # all trunks, a quarter of an hour
    python benchmarks/bench_compression.py --net alex     # one, beside what is there of the others

Fitted on some of scikit-image's photographs and judged on others, by crops of 64² with distortions
of random kinds and strengths. Agreement is with the whole metric of the same trunk, not with
people. Times are of one pair over the whole metric's, the fastest of calls in turn. Beside what
:mod:`lpips_fast.compression` offers stand fewer layers, and ways that it does not offer for they do
not pay: single weights set to 0, 3x3 convolutions in two parts, and channels chosen by their
weights' size.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from report import TRUNKS, head
from torch import Tensor, nn

from lpips_fast import LPIPS
from lpips_fast.compression import (
    Triplets,
    channel_effects,
    distill,
    distorted_triplets,
    prune,
    pruning,
    time_ratio,
)
from lpips_fast.compression.agreement import agreement_of, size_in_bytes, triplet_distances
from lpips_fast.images.reading import image_to_tensor
from lpips_fast.trunk.fire import FireModule

RESULTS = Path(__file__).resolve().parent / "results"
FILE = "compression"
FITTED_ON = ("astronaut", "coffee", "retina", "stereo_motorcycle", "camera", "brick")
JUDGED_ON = ("chelsea", "rocket", "hubble_deep_field", "coins", "moon", "gravel")
NETS = ("alex", "squeeze", "vgg")
KEEPS = {"alex": (0.75, 0.5), "squeeze": (0.5,), "vgg": (0.5, 0.25)}
STUDENTS = {"vgg": ("alex",)}
STEPS = {"alex": 300, "squeeze": 100, "vgg": 60}
STEPS_OF_STUDENTS = 100


def photographs(names: tuple[str, ...]) -> list[Tensor]:
    import skimage.data

    images = []
    for name in names:
        pixels = getattr(skimage.data, name)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # the left of two
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., :3]
        images.append(image_to_tensor(np.ascontiguousarray(pixels))[0])
    return images


# ------------------------------------------------------------------------- what is not offered


def weights_of(model: LPIPS) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in model.net.named_modules() if isinstance(m, nn.Conv2d)}


def by_magnitude(model: LPIPS) -> dict[str, Tensor]:
    """The sum of the sizes of each filter's weights (Li et al., 2017)."""
    return {n: m.weight.detach().abs().sum(dim=(1, 2, 3)) for n, m in weights_of(model).items()}


@torch.no_grad()
def sparse(full: LPIPS, part: float) -> LPIPS:
    """A mask over single weights: the smallest of every convolution are 0 (Han et al., 2015)."""
    model = copy.deepcopy(full)
    for conv in weights_of(model).values():
        sizes = conv.weight.abs()
        conv.weight.mul_(sizes > sizes.flatten().kthvalue(int(part * sizes.numel())).values)
    return model


def in_two_parts(
    full: LPIPS, make: Callable[[nn.Conv2d, Tensor], nn.Module], images: Tensor
) -> LPIPS:
    """Every 3x3 convolution but the images' own replaced; what is replaced runs as modules."""
    model = copy.deepcopy(full)
    inputs: dict[nn.Module, Tensor] = {}
    found = [m for m in weights_of(model).values() if m.kernel_size == (3, 3) and m.in_channels > 3]
    hooks = [
        m.register_forward_pre_hook(lambda module, x: inputs.__setitem__(module, x[0].detach()))
        for m in found
    ]
    with torch.no_grad():
        model.encode(images)
    for hook in hooks:
        hook.remove()
    for block in model.net.slices():
        for parent in block.modules():
            if isinstance(parent, (nn.Sequential, FireModule)):
                for name, child in list(parent.named_children()):
                    if child in inputs:
                        setattr(parent, name, make(child, inputs[child]))
    return model


@torch.no_grad()
def low_rank(part: float) -> Callable[[nn.Conv2d, Tensor], nn.Module]:
    """To ``part`` of the channels by 3x3, and from these by 1x1 to all: the directions in which the
    responses to given images vary most (Zhang et al., "Accelerating Very Deep …", 2016)."""

    def make(conv: nn.Conv2d, x: Tensor) -> nn.Module:
        assert conv.bias is not None
        rank = max(1, round(part * conv.out_channels))
        y = conv(x).transpose(0, 1).flatten(1)
        mean = y.mean(dim=1, keepdim=True)
        directions = torch.linalg.eigh(((y - mean) @ (y - mean).T).double())[1][:, -rank:].float()
        first = nn.Conv2d(conv.in_channels, rank, 3, conv.stride, conv.padding, bias=False)
        second = nn.Conv2d(rank, conv.out_channels, 1)
        first.weight.copy_((directions.T @ conv.weight.flatten(1)).view_as(first.weight))
        second.weight.copy_(directions[..., None, None])
        left = mean.flatten() - conv.bias
        second.bias.copy_(conv.bias + left - directions @ (directions.T @ left))  # type: ignore[union-attr]
        return nn.Sequential(first, second).requires_grad_(False)

    return torch.no_grad()(make)


def one_by_three(part: float) -> Callable[[nn.Conv2d, Tensor], nn.Module]:
    """3x1 and then 1x3, by the SVD of the weights (Jaderberg et al., 2014)."""

    def make(conv: nn.Conv2d, _: Tensor) -> nn.Module:
        assert conv.bias is not None
        outputs, inputs = conv.weight.shape[:2]
        matrix = conv.weight.permute(1, 2, 0, 3).reshape(inputs * 3, outputs * 3)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rank = max(1, round(part * min(inputs, outputs)))
        root = s[:rank].sqrt()
        first = nn.Conv2d(inputs, rank, (3, 1), padding=(1, 0), bias=False)
        second = nn.Conv2d(rank, outputs, (1, 3), padding=(0, 1))
        first.weight.copy_((u[:, :rank] * root).T.view(rank, inputs, 3, 1))
        second.weight.copy_((v[:rank] * root[:, None]).view(rank, outputs, 1, 3).transpose(0, 1))
        second.bias.copy_(conv.bias)  # type: ignore[union-attr]
        return nn.Sequential(first, second).requires_grad_(False)

    return torch.no_grad()(make)


# ------------------------------------------------------------------------------------ the rows


def models(net: str, full: LPIPS, fitted: Triplets, steps: int) -> Iterator[tuple[str, str, LPIPS]]:
    """(method, strength, model), the cheap ones first."""
    layers = len(full.chns)
    for count in range(1, layers):
        chosen = tuple(range(count))
        yield "fewer layers", f"the first {count}", LPIPS(net=net, layers=chosen, verbose=False)  # type: ignore[arg-type]
    for part in (0.5,):
        yield "single weights set to 0", f"{part:.0%}", sparse(full, part)
    few = fitted[:24]
    images = torch.cat((few.ref, few.p0))
    for part in (0.5,):
        yield "low rank, 3x3 and 1x1", f"{part:.0%}", in_two_parts(full, low_rank(part), images)
    yield "3x1 and 1x3", "100%", in_two_parts(full, one_by_three(1.0), images)
    measured = fitted[:48]
    effects, sizes = channel_effects(full, measured), by_magnitude(full)
    for keep in KEEPS[net]:
        yield "channels by size", f"{keep:.0%} stay", prune(full, measured, keep, effects=sizes)
        narrow = prune(full, measured, keep, effects=effects)
        yield "channels by effect", f"{keep:.0%} stay", narrow
        narrow = copy.deepcopy(narrow)
        distill(narrow, full, fitted, steps=steps)
        yield "prune and distil", f"{keep:.0%} stay, {steps} steps", narrow
    for other in STUDENTS.get(net, ()):
        student = LPIPS(net=other, verbose=False)  # type: ignore[arg-type]
        yield "another trunk", other, student
        distill(student, full, fitted, steps=STEPS_OF_STUDENTS)
        yield "another trunk, distilled", f"{other}, {STEPS_OF_STUDENTS} steps", student


@torch.no_grad()
def norms(full: LPIPS, fitted: Triplets, judged: Triplets) -> dict[str, float]:
    """Mean error where channels of weight 0 leave the norm too, and with the others scaled."""
    taps = [full.encode(x).taps for x in (fitted.ref[:64], fitted.p0[:64])]
    seen = [full.encode(x).taps for x in (judged.ref, judged.p0)]
    weights = [full.layer_weight(k).detach() for k in range(full.L)]
    sums: dict[str, Tensor | float] = {"all": 0.0, "left out": 0.0, "scaled": 0.0}
    for k, weight in enumerate(weights):
        kept = weight > 0
        both = torch.cat([side[k] for side in taps])
        factors = pruning.norm_factors(*pruning.norm_equations(both[:, kept], both)).sqrt().float()
        for name, used, scales in (
            ("all", torch.ones_like(kept), torch.ones_like(weight)),
            ("left out", kept, torch.ones_like(factors)),
            ("scaled", kept, factors),
        ):
            normal = [F.normalize(side[k][:, used] * scales.view(-1, 1, 1), dim=1) for side in seen]
            squares = (normal[0] - normal[1]) ** 2
            scaled = (weight[used] / scales**2).view(-1, 1, 1)
            sums[name] = sums[name] + (scaled * squares).sum(dim=1).mean(dim=(1, 2))
    mean = sums["all"].mean()  # type: ignore[union-attr]
    return {
        "zero_weights": sum(int((w == 0).sum()) for w in weights),
        "channels": sum(len(w) for w in weights),
        **{
            name: ((sums[name] - sums["all"]).abs().mean() / mean).item()  # type: ignore[union-attr,operator]
            for name in ("left out", "scaled")
        },
    }


def measure(net: str, options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    full = LPIPS(net=net, verbose=False)  # type: ignore[arg-type]
    fitted = distorted_triplets(photographs(FITTED_ON), 64, options.fitted, seed=1)
    judged = distorted_triplets(photographs(JUDGED_ON), 64, options.judged, seed=2)
    expected = triplet_distances(full, judged)
    rows: list[dict[str, Any]] = []
    found = {
        "norms": norms(full, fitted, judged),
        "size": size_in_bytes(full),
        "fitted": len(fitted),
        "judged": len(judged),
        "rows": rows,
    }
    start = time.perf_counter()
    for method, strength, model in models(net, full, fitted, options.steps or STEPS[net]):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        of = agreement_of(triplet_distances(model, judged), expected)
        rows.append(
            {
                "method": method,
                "strength": strength,
                "widths": model.net_name,
                "time_64": time_ratio(model, full, 64, calls=options.calls),
                "time_256": time_ratio(model, full, 256, calls=options.calls),
                "size": size_in_bytes(model),
                "spearman": of.spearman,
                "same_nearer": of.same_nearer,
                "error": of.error,
                "seconds_to_make": seconds,
            }
        )
        print(
            net,
            {k: v if isinstance(v, str) else round(v, 4) for k, v in rows[-1].items()},
            flush=True,
        )
        save(found)
        start = time.perf_counter()


# ---------------------------------------------------------------------------------- the report


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    eight_bit = int8_points()
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Agreement with the whole metric against time, one pair of 256²", fontsize=11)
    panels = figure.subplots(1, len(results["nets"]), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(r["method"] for f in results["nets"].values() for r in f["rows"]))
    palette = (
        "#000000",
        "#bbbbbb",
        "#ccbb44",
        "#66ccee",
        "#aa3377",
        "#4477aa",
        "#ee6677",
        "#999933",
        "#228833",
    )
    styles = dict(zip(names, zip(palette, "osD^v<P>X")))
    for axes, (net, found) in zip(panels, results["nets"].items()):
        for method, (colour, marker) in styles.items():
            rows = [r for r in found["rows"] if r["method"] == method]
            if not rows:
                continue
            axes.plot(
                [row["time_256"] for row in rows],
                [1 - row["spearman"] for row in rows],
                linestyle="-" if method == "fewer layers" else ":",
                marker=marker,
                color=colour,
                markersize=7,
                label=method,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )
        for label, ratio, spearman in eight_bit.get(net, ()):
            marker = "*" if "OpenVINO" in label else "p"
            axes.plot(
                [ratio],
                [1 - spearman],
                linestyle="",
                marker=marker,
                color="#882255",
                markersize=11,
                label=label,
            )
        # It agrees wholly, above every scale of logarithms.
        axes.axvline(1, color="#000000", linewidth=0.8, linestyle="--", label="the exact trunk")
        axes.set_title(TRUNKS[net], fontsize=10)
        axes.set_xlabel("time over the exact trunk's", fontsize=9)
        axes.set_yscale("log")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("1 - Spearman (higher up is nearer to the metric)", fontsize=9)
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=110, facecolor="white")


def int8_points() -> dict[str, list[tuple[str, float, float]]]:
    """By trunk, what ``bench_export`` found of 8-bit files: label, time over ours, Spearman."""
    results = json.loads((RESULTS / "export.json").read_text())
    ours = {
        f["net"]: f["eager"]["256"]["lpips_fast"] for f in results["formats"] if f["batch"] == 1
    }
    points: dict[str, list[tuple[str, float, float]]] = {}
    for row in results["int8"]:
        if row["real"] and row["size"] == 256 and row["method"] == "static":
            label = f"8-bit, {row['runtime']} (other pairs)"
            point = (label, row["ms_int8"] / ours[row["net"]], row["rank_correlation"])
            points.setdefault(row["net"], []).append(point)
    return points


def markdown(results: dict[str, Any]) -> str:
    lines = head(
        *("Lighter trunks", results, ["torch"]),
        f"One thread; the machine was shared, so that only ratios are given. {results['words']}",
    )
    for net, found in results["nets"].items():
        lines += [
            "",
            f"## {net}",
            "",
            f"The whole metric: {found['size'] / 1e6:.1f} MB. Fitted on {found['fitted']} triplets,"
            f" judged on {2 * found['judged']} pairs.",
            "",
            "| method | strength | time, 64² | time, 256² | MB | Spearman | same nearer "
            "| mean error |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            cells = [
                row["method"],
                row["strength"],
                *(f"{row[key]:.2f}" for key in ("time_64", "time_256")),
                f"{row['size'] / 1e6:.1f}",
                f"{row['spearman']:.4f}",
                f"{row['same_nearer']:.1%}",
                f"{row['error']:.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Norms",
        "",
        "Mean error of the distance where channels whose linear weight is 0 leave the norm as well,"
        " and where those that stay are scaled such that the norms are kept:",
        "",
        "| trunk | weights of 0 | left out | scaled |",
        "|---|---|---|---|",
    ]
    for net, found in results["nets"].items():
        n = found["norms"]
        lines.append(
            f"| {net} | {n['zero_weights']} of {n['channels']} | {n['left out']:.1%} "
            f"| {n['scaled']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, action="append", help="default: all")
    parser.add_argument("--fitted", type=int, default=600, help="triplets to fit on")
    parser.add_argument("--judged", type=int, default=150, help="triplets to judge by")
    parser.add_argument("--steps", type=int, help="of distillation")
    parser.add_argument("--calls", type=int, default=5, help="that are timed")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    path = RESULTS / f"{FILE}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"nets": {}}
    if not options.draw:
        torch.set_num_threads(1)
        results |= machine.this_run()
        results["words"] = (
            f"Fitted on triplets of 64² from {', '.join(FITTED_ON)}; judged on others from "
            f"{', '.join(JUDGED_ON)}."
        )
        for net in options.net or NETS:

            def save(found: dict[str, Any], net: str = net) -> None:
                results["nets"] = {
                    n: found if n == net else results["nets"][n]
                    for n in NETS
                    if n == net or n in results["nets"]
                }
                path.write_text(json.dumps(results, indent=2) + "\n")

            measure(net, options, save)
    draw(results, RESULTS / f"{FILE}.png")
    (RESULTS / f"{FILE}.md").write_text(
        markdown(results) + f"\n![Agreement against time]({FILE}.png)\n"
    )


if __name__ == "__main__":
    main()
