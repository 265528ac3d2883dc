"""How long an epoch of training takes: the original, ours with the trunk, ours from the cache.

    python benchmarks/bench_training.py

writes ``benchmarks/results/training.md`` and ``training.json``. Needs the unmodified ``lpips``. All
ways train linear weights on the same random triplets, batch 50, dropout one half, with the same
trunk. Images are in memory: reading them would be added to the epochs with a trunk and to none of
the others. Epochs of the ways alternate, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from contenders import build_other, trunk_weights
from timing import seconds_of

from lpips_fast.judgements.datasets import load_batches
from lpips_fast.judgements.training import Trainer, TrainingOptions, new_model

RESULTS = Path(__file__).resolve().parent / "results"
PAPER_EPOCHS = 10


def triplets(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(count):
        coarse = torch.rand(3, 3, 17, 17, generator=generator)
        noise = 0.1 * torch.randn(3, 3, 64, 64, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse[:1], size=(64, 64), mode="bicubic")
        ref, p0, p1 = (smooth * 2 - 1 + noise).clamp(-1, 1)
        judge = torch.rand((), generator=generator)
        items.append({"ref": ref, "p0": p0, "p1": p1, "judge": judge})
    return items


def our_trainer(net: str, items: list[Any], device: torch.device, **options: Any) -> Trainer:
    model = new_model(net, weights=trunk_weights(net)).to(device)
    return Trainer(model, items, TrainingOptions(epochs=10**6, **options), progress=False)


def original_epoch(
    net: str, items: list[Any], device: torch.device, trunk: Any
) -> Callable[[], None]:
    """One epoch of ``lpips.Trainer``, driven as the original's training script drives it."""
    build_other("lpips", net, device)  # says so if it is not installed; makes its import work
    import lpips

    trainer = lpips.Trainer()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.initialize(net=net, is_train=True, pnet_rand=True, use_gpu=False, lr=1e-4)
    trainer.net.load_state_dict(trunk)
    trainer.net.to(device)
    trainer.rankLoss.to(device)

    def epoch() -> None:
        order = torch.randperm(len(items)).tolist()
        for batch in load_batches(items, 50, order=order, device=device):
            trainer.set_input(batch)
            trainer.optimize_parameters()

    return epoch


def measure(net: str, count: int, repeats: int, device: torch.device) -> dict[str, Any]:
    items = triplets(count)
    plain = our_trainer(net, items, device, cache=False)
    cached = our_trainer(net, items, device)
    undropped = our_trainer(net, items, device, dropout=0.0)
    original = original_epoch(net, items, device, plain.model.state_dict())

    def fill() -> None:
        cached._cached = None
        cached._fill_cache()

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        # The quick ways run several epochs at a time, or the clock would be what is measured.
        "original": (original, 1),
        "plain": (plain.train_epoch, 1),
        "filling": (fill, 1),
        "cached": (cached.train_epoch, 5),
        "cached_without_dropout": (undropped.train_epoch, 5),
    }
    for function, _ in ways.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (function, epochs) in ways.items():
            for _ in range(epochs):
                seconds[name].append(seconds_of(function, device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "net": net,
        "triplets": count,
        "seconds": medians,
        "best_seconds": {name: min(times) for name, times in seconds.items()},
        "cached_over_original": medians["original"] / medians["cached"],
        "cached_over_plain": medians["plain"] / medians["cached"],
        "run_over_original": PAPER_EPOCHS
        * medians["original"]
        / (medians["filling"] + PAPER_EPOCHS * medians["cached"]),
    }


def table(report: dict[str, Any]) -> str:
    load = ""
    if report["load"] is not None:
        load = f"; {report['load']:.1f} processes wanted a core in the minute before"
    lines = [
        "# An epoch of training",
        "",
        "Milliseconds for 1000 triplets of 64x64 pixels (batch 50, dropout 0.5, float32, images "
        f"in memory); median of {report['repeats']} epochs or more of {report['triplets']} "
        f"triplets. {report['device']}, torch {report['torch']}{load}.",
        "",
        "| trunk | original lpips 0.1.4 | ours, trunk in each epoch | ours, cached | cached, no "
        "dropout | cached against original | cached against ours | filling the cache, once | "
        f"{PAPER_EPOCHS} epochs, filling included, against original |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        times = {name: 1e6 * value / row["triplets"] for name, value in row["seconds"].items()}
        cells = [
            *(f"{times[name]:.0f}" for name in ("original", "plain")),
            *(f"{times[name]:.1f}" for name in ("cached", "cached_without_dropout")),
            f"{row['cached_over_original']:.0f}×",
            f"{row['cached_over_plain']:.0f}×",
            f"{times['filling']:.0f}",
            f"{row['run_over_original']:.1f}×",
        ]
        lines.append(f"| {row['net']} | {' | '.join(cells)} |")
    lines += ["", f"Made by `{report['command']}`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["alex", "squeeze", "vgg"])
    parser.add_argument("--triplets", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/bench_training.py", *sys.argv[1:]]),
        "triplets": options.triplets,
        "repeats": options.repeats,
        "device": machine.name(options.device),
        "torch": torch.__version__,
        "load": machine.load(),
        "results": [],
    }
    for net in options.nets:
        row = measure(net, options.triplets, options.repeats, options.device)
        report["results"].append(row)
        print(json.dumps(row), file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    name = "training" if options.device.type == "cpu" else f"training_{options.device.type}"
    (options.output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / f"{name}.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
