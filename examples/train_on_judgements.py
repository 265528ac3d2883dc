"""Learning a metric from judgements, from a folder of images to a learning curve.

Makes a small data set in the layout of BAPPS: patches, each distorted in two ways, and judgements
of which is nearer. The people who judge are simulated: they see with LPIPS's published weights and
are less sure of small differences. Training starts from random weights, sees only what they chose,
and should come near to what one more of them would reach. With your own images and judgements,
only the function ``make_data`` goes. It takes about half a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo import RANDOM, add_arguments, find_trunk, say_before
from torch import Tensor
from tqdm import trange

import lpips_fast
from lpips_fast.judgements.datasets import TwoAFCDataset
from lpips_fast.judgements.scoring import evaluate_2afc, triplet_distances
from lpips_fast.judgements.training import Trainer, TrainingOptions, new_model
from lpips_fast.weights import WeightsError


def texture(generator: torch.Generator) -> Tensor:
    """A patch (3, 64, 64) in [-1, 1]: blobs of several sizes, in colours of its own."""
    patch = torch.zeros(1, 3, 64, 64)
    for cells in (2, 5, 11, 23, 47):
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        strength = torch.rand(1, 3, 1, 1, generator=generator)
        patch += strength * F.interpolate(coarse, (64, 64), mode="bicubic")
    return torch.tanh(0.7 * patch)[0]


def distort(patch: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    """A copy with one distortion, of strength 0 to 1."""
    if kind == "noise":
        return patch + 0.3 * strength * torch.randn(patch.shape, generator=generator)
    if kind == "blur":
        side = 2 * int(1 + 3 * strength) + 1
        return F.avg_pool2d(patch[None], side, 1, side // 2, count_include_pad=False)[0]
    if kind == "shift":
        return patch.roll((int(1 + 4 * strength), -int(1 + 2 * strength)), dims=(1, 2))
    if kind == "colour":
        return patch + 0.8 * strength * (torch.rand(3, 1, 1, generator=generator) - 0.5)
    if kind == "blocks":
        side = 2 ** int(1 + 2.9 * strength)
        return F.interpolate(F.avg_pool2d(patch[None], side), scale_factor=side)[0]
    raise ValueError(f"unknown distortion {kind!r}")


KINDS = ("noise", "blur", "shift", "colour", "blocks")


def make_data(folder: Path, count: int, observer: lpips_fast.LPIPS, seed: int) -> None:
    """Write ``count`` triplets that five simulated people have judged, unless they are there."""
    if (folder / "judge").is_dir() and len(list((folder / "judge").iterdir())) == count:
        return
    generator = torch.Generator().manual_seed(seed)
    refs, first, second = [], [], []
    for _ in trange(count, desc=f"making {folder.name}", unit=" triplets", disable=None):
        ref = texture(generator)
        refs.append(ref)
        for side in (first, second):
            kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
            strength = float(torch.rand((), generator=generator))
            side.append(distort(ref, kind, strength, generator).clamp(-1, 1))
    with torch.no_grad():
        d0, d1 = triplet_distances(observer, *map(torch.stack, (refs, first, second)))
    chance_of_p1 = torch.sigmoid(3 * (d0 - d1) / (d0 - d1).abs().median())
    votes = torch.rand(5, count, generator=generator) < chance_of_p1
    judge = votes.float().mean(dim=0)
    for k in range(count):
        TwoAFCDataset.write(
            folder,
            f"{k:06d}",
            judge[k].item(),
            ref=to_8_bit(refs[k]),
            p0=to_8_bit(first[k]),
            p1=to_8_bit(second[k]),
        )


def to_8_bit(patch: Tensor) -> np.ndarray:
    return ((patch + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triplets", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=40)
    add_arguments(parser, output=Path("demo_output") / "training")
    options = parser.parse_args()
    say_before(
        f"{options.triplets} judgements, {options.epochs} epochs: about half a minute on two cores "
        "for 1000 and 40."
    )

    try:
        is_real = find_trunk(options.net, options.weights)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    common = {
        "net": options.net,
        "weights": options.weights,
        "random_trunk": not is_real,
        "seed": 0,
    }
    observer = new_model(**common, initialization="pretrained").eval()
    data = options.output / "data"
    make_data(data / "train", options.triplets, observer, seed=1)
    make_data(data / "val", max(1, options.triplets // 4), observer, seed=2)

    model = new_model(**common, initialization="random").eval()
    validation = TwoAFCDataset(data / "val")
    before = evaluate_2afc(model, validation)
    trainer = Trainer(
        model,
        TwoAFCDataset(data / "train"),
        TrainingOptions(
            epochs=options.epochs // 2,
            decay_epochs=options.epochs - options.epochs // 2,
            learning_rate=3e-3,
        ),
        validation={"val": validation},
    )
    run = options.output / "run"
    for file in run.glob("*"):  # a run of its own each time; --resume is the command line's
        file.unlink()
    trainer.run(run)

    learned = lpips_fast.LPIPS(
        net=options.net, model_path=run / "model.pth", pnet_rand=True, verbose=False
    )
    after = evaluate_2afc(learned, validation)
    hidden = evaluate_2afc(observer, validation)
    seconds = json.loads((run / "training.json").read_text())["history"]
    print(f"{len(seconds)} epochs in {sum(record['seconds'] for record in seconds):.1f} s")
    print("2AFC score on held-out triplets, in %")
    print(f"  random weights, before training   {100 * before.score:.1f}")
    print(f"  learned weights                   {100 * after.score:.1f}")
    print(f"  the weights that the people have  {100 * hidden.score:.1f}")
    print(f"  one more person                   {100 * after.people:.1f}")
    print(f"{run / 'learning_curve.png'}, {run / 'log.csv'}, {run / 'model.pth'}")
    if not is_real:
        print(f"\n{RANDOM}")


if __name__ == "__main__":
    main()
