"""What each normalisation makes of the same graded distortions, and what it costs.

    python benchmarks/bench_normalizations.py

writes ``benchmarks/results/normalizations.md``, ``normalizations.json`` and pictures. The pairs are
the repository's example images against themselves with noise, blur, JPEG and shifts in five
strengths; ``batch`` has all of a side for its batch. ``attention`` is l2 with a mask, the attention
map of the undistorted image. ``learned`` is timed alone: before it has learned, it is l2. Needs
ImageNet weights of the trunk (LPIPS_FAST_WEIGHTS, or a network) and Pillow. Times are medians of
rounds in which all normalisations take turns, and ratios are those of one round.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
import torch
from PIL import Image, ImageFilter
from report import head
from timing import seconds_of
from torch import Tensor

from lpips_fast import LPIPS
from lpips_fast.analysis import attention_map
from lpips_fast.analysis import figures as plots
from lpips_fast.analysis.parts import (
    NormalizationResult,
    NormalizationTable,
    compare_normalizations,
    describe,
    layer_names,
    rank_correlation,
)
from lpips_fast.images.reading import image_to_tensor, read_image_uint8
from lpips_fast.normalization import LEARNED, NORMALIZATIONS
from lpips_fast.weights import WeightsError

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"
KINDS = tuple(NORMALIZATIONS)
ATTENTION = "attention"

#: Strengths of each distortion, weakest first, and the unit that they are in.
LEVELS: dict[str, tuple[tuple[float, ...], str]] = {
    "noise": ((4, 8, 16, 32, 64), "standard deviation, of 255"),
    "blur": ((0.5, 1, 1.5, 2, 3), "standard deviation, pixels"),
    "JPEG": ((90, 70, 50, 30, 10), "quality"),
    "shift": ((1, 2, 3, 4, 6), "pixels"),
}


def distort(pixels: np.ndarray, kind: str, level: float) -> np.ndarray:
    if kind == "noise":
        noise = np.random.default_rng(0).standard_normal(pixels.shape)
        return np.clip(np.rint(pixels + level * noise), 0, 255).astype(np.uint8)
    if kind == "shift":  # what enters repeats the border
        step = int(level)
        return np.pad(pixels, ((0, 0), (step, 0), (0, 0)), mode="edge")[:, : pixels.shape[1]]
    image = Image.fromarray(pixels)
    if kind == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(level)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(level))
    return np.asarray(Image.open(file))


def pairs() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[str, str, float]]]:
    """Images with their distorted copies, and for each its image, distortion and level."""
    images, labels = [], []
    for path in sorted(IMAGES.glob("*.png")):
        pixels = read_image_uint8(path)
        reference = image_to_tensor(pixels)
        for kind, (levels, _) in LEVELS.items():
            for level in levels:
                images.append((reference, image_to_tensor(distort(pixels, kind, level))))
                labels.append((path.name, kind, level))
    return images, labels


def in_order(distances: list[float]) -> float:
    """The part of steps to a stronger distortion that the distance follows upwards."""
    steps = np.diff(np.reshape(distances, (-1, 5)), axis=1)
    return float((steps > 0).mean())


def with_attention(
    model: LPIPS, table: NormalizationTable, references: Tensor, distorted: Tensor
) -> NormalizationTable:
    """A further row, of l2 under a mask of where the trunk answers to the undistorted image."""
    with torch.no_grad():
        mask = attention_map(model, references)
        value, layers = model(references, distorted, retPerLayer=True, mask=mask)
    distances = tuple(value.flatten().tolist())
    row = NormalizationResult(
        ATTENTION,
        distances,
        rank_correlation(distances, table["l2"].distances),
        tuple(layer.mean().item() for layer in layers),
    )
    return replace(table, results=(*table.results, row))


def rows_of(table: NormalizationTable) -> dict[str, NormalizationResult]:
    return {row.name: row for row in table}


def figures_of(table: NormalizationTable, labels: list[tuple[str, str, float]]) -> dict[str, Any]:
    rows = rows_of(table)
    named = replace(table, results=tuple(rows[kind] for kind in KINDS))
    report = named.as_dict()
    alone = replace(table, results=(replace(rows[ATTENTION], name="l2"),))
    report[ATTENTION] = alone.as_dict()["l2"] | {"formula": "l2, positions weighted"}
    for kind in report:
        report[kind]["steps_in_order"] = in_order(list(rows[kind].distances))
        report[kind]["rank_correlation_by_distortion"] = {}
        for distortion in LEVELS:
            of_kind = [k for k, label in enumerate(labels) if label[1] == distortion]
            own, l2 = ([rows[name].distances[k] for k in of_kind] for name in (kind, "l2"))
            correlation = rank_correlation(own, l2)
            report[kind]["rank_correlation_by_distortion"][distortion] = correlation
    return report


def times(net: str, size: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a whole forward pass, of its comparison alone, and of a training step."""
    kinds = (*KINDS, LEARNED, ATTENTION)
    models = {
        kind: LPIPS(net=net, verbose=False, normalization="l2" if kind == ATTENTION else kind)
        for kind in kinds
    }
    generator = torch.Generator().manual_seed(0)
    in0, in1 = torch.rand(2, batch, 3, size, size, generator=generator) * 2 - 1
    image = in0.clone().requires_grad_()
    with torch.no_grad():
        features0, features1 = (models["l2"].encode(x) for x in (in0, in1))

    attention = attention_map(models["l2"], in0)
    masks = {kind: {"mask": attention} if kind == ATTENTION else {} for kind in kinds}

    def forward(kind: str) -> None:
        with torch.no_grad():
            models[kind](in0, in1, **masks[kind])

    def compare(kind: str) -> None:
        with torch.no_grad():
            models[kind].distance(features0, features1, **masks[kind])

    def step(kind: str) -> None:
        loss = models[kind](image, features1, **masks[kind]).sum()
        torch.autograd.grad(loss, image)

    result: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for name, call in (("forward", forward), ("comparison", compare), ("step", step)):
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):
            for kind in kinds:
                taken = seconds_of(lambda call=call, kind=kind: call(kind), CPU)
                if turn:  # the first only warms up
                    seconds[kind].append(taken)
        for kind in kinds:
            result[kind][name] = median(seconds[kind])
            ratios = [own / l2 for own, l2 in zip(seconds[kind], seconds["l2"])]
            result[kind][f"{name}_over_l2"] = median(ratios)
    return result


def draw(
    model: LPIPS,
    table: NormalizationTable,
    images: list[tuple[Tensor, Tensor]],
    folder: Path,
) -> dict[str, str]:
    """Writes the pictures; returns their file names by caption."""
    title = f"{describe(model)}: {len(images)} graded distortions of the example images"
    references = torch.cat([images[k][0] for k in range(0, len(images), 5 * len(LEVELS))])
    features = model.encode(references).detach()
    pictures = {
        "Distances by strength, each over the mean of its normalisation": (
            "curves",
            _curves(table, title),
        ),
        "Spread of the distances, and what the layers add": (
            "spread",
            plots.plot_normalization_table(
                replace(table, results=tuple(table[kind] for kind in KINDS)), title=title
            ),
        ),
        "Features of the example images before and after": (
            "activations",
            plots.plot_normalizations(
                features,
                layers=layer_names(model),
                title=f"Example images, trunk {model.pnet_type}",
            ),
        ),
    }
    files = {}
    for caption, (name, figure) in pictures.items():
        files[caption] = f"normalizations-{name}.png"
        figure.savefig(folder / files[caption], dpi=110, facecolor="white")
    return files


def _curves(table: NormalizationTable, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(LEVELS), sharey=True)
    rows = rows_of(table)
    # Black for LPIPS itself, then Paul Tol's "bright" and "muted" colours.
    colours = ("#000000", "#4477aa", "#ee6677", "#228833", "#ccbb44")
    colours += ("#66ccee", "#aa3377", "#bbbbbb", "#882255")
    for column, (axes, (kind, (levels, unit))) in enumerate(zip(panels, LEVELS.items())):
        for (name, row), colour, marker in zip(rows.items(), colours, "os^Dv<>Pd", strict=True):
            relative = np.array(row.distances) / row.mean
            means = relative.reshape(-1, len(LEVELS), len(levels))[:, column].mean(axis=0)
            axes.plot(range(5), means, color=colour, marker=marker, markersize=4, label=name)
        axes.set_xticks(range(5), [f"{level:g}" for level in levels])
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel(unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("distance / mean of all pairs", fontsize=9)
    panels[0].set_yscale("log")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(rows),
        frameon=False,
        fontsize=9,
    )
    return figure


def markdown(results: dict[str, Any]) -> str:
    timing = results["timing"]
    distances = results["normalizations"]
    lines = [
        *head(
            *("Normalisations compared", results, ["torch"]),
            f"{results['metric']}, ImageNet weights.",
        ),
        f"{results['pairs']} pairs: the {results['images']} example images (64²) against themselves"
        " with noise, blur, JPEG and shifts in five strengths. `batch` has all of a side for its"
        " batch; `attention` is l2 with the reference's attention map as a mask. Distances of two"
        " normalisations share no unit: compare deviation over mean, and order. Rank correlation is"
        " Spearman's with the distances of l2. A step is in order if the stronger distortion is"
        " farther away.",
        "",
        "| normalisation | mean | deviation | dev./mean | range | rank correlation with l2 "
        "| of noise | of blur | of JPEG | of shifts | steps in order |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in distances.items():
        by_kind = row["rank_correlation_by_distortion"]
        cells = [
            *(f"{row[key]:.4g}" for key in ("mean", "deviation")),
            f"{row['variation']:.2f}",
            f"{row['range'][0]:.3g} to {row['range'][1]:.3g}",
            f"{row['rank_correlation_with_l2']:.3f}",
            *(f"{by_kind[distortion]:.3f}" for distortion in LEVELS),
            f"{row['steps_in_order']:.0%}",
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Times over that of l2: {results['net']}, float32, {timing['size']}², batch "
        f"{timing['batch']}, medians of {timing['rounds']} rounds in which all take turns. l2 has a"
        " fused kernel, with `attention` too, whose mask is given; the others are composed of"
        " torch's operators. The comparison is that of features already encoded; a step is forward"
        " and backward to one image, the other's features given.",
        "",
        "| normalisation | forward | comparison alone | step |",
        "|---|---|---|---|",
    ]
    for kind, row in timing["seconds"].items():
        cells = [f"{row[f'{name}_over_l2']:.2f}×" for name in ("forward", "comparison", "step")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    for caption, file in results["pictures"].items():
        lines += ["", f"![{caption}]({file})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=("alex", "vgg", "squeeze"), default="alex")
    parser.add_argument("--size", type=int, default=256, help="of the images that are timed")
    parser.add_argument("--batch", type=int, default=4, help="pairs that are timed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    try:
        model = LPIPS(net=options.net, verbose=False)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    run = machine.this_run()
    images, labels = pairs()
    references, distorted = (torch.cat(side) for side in zip(*images))
    table = compare_normalizations(model, [(references, distorted)])
    table = with_attention(model, table, references, distorted)
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        **run,
        "net": options.net,
        "metric": describe(model),
        "images": len({label[0] for label in labels}),
        "pairs": len(images),
        "labels": labels,
        "normalizations": figures_of(table, labels),
        "timing": {
            "size": options.size,
            "batch": options.batch,
            "rounds": options.rounds,
            "seconds": times(options.net, options.size, options.batch, options.rounds),
        },
        "pictures": draw(model, table, images, options.output),
    }
    (options.output / "normalizations.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "normalizations.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
