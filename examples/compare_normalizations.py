"""What the channel-L2 normalisation of LPIPS is worth: the same distortions with all five.

The reference is compared with graded distortions of itself: noise, and shifts by whole pixels. The
table says how each normalisation's distances spread, and whether they put the pairs in the order
that l2, which is LPIPS, puts them in. Two pictures show the features before and after each, and
what the layers add to the distance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo import RANDOM, add_arguments, load_model, say_before

from lpips_fast.analysis.figures import plot_normalization_table, plot_normalizations
from lpips_fast.analysis.parts import compare_normalizations, describe, layer_names
from lpips_fast.images.reading import read_image
from lpips_fast.weights import WeightsError

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    say_before("Seven distorted images, five normalisations, two pictures: some seconds.")

    try:
        model, is_real = load_model(options.net, options.weights)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    reference = read_image(HERE / "images" / "ex_ref.png")
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    distorted = {
        **{f"noise {s}": (reference + s * noise).clamp(-1, 1) for s in (0.05, 0.1, 0.2, 0.4)},
        **{f"shift {n} px": reference.roll(n, dims=3) for n in (1, 2, 4)},
    }
    table = compare_normalizations(model, [(reference, torch.cat(list(distorted.values())))])
    print(table)

    options.output.mkdir(parents=True, exist_ok=True)
    features = model.encode(reference).detach()
    figures = {
        "normalizations.png": plot_normalization_table(table, names=list(distorted)),
        "activations.png": plot_normalizations(
            features, layers=layer_names(model), title=describe(model)
        ),
    }
    for name, figure in figures.items():
        figure.savefig(options.output / name, dpi=150)
        print(options.output / name)
    if not is_real:
        print(f"\n{RANDOM}")


if __name__ == "__main__":
    main()
