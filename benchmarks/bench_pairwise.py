"""All pairs of images: one trunk pass an image, against the original's two a pair.

    python benchmarks/bench_pairwise.py

The original's way is that of its script ``lpips_1dir_allpairs.py``: the module is called on one
pair after the other. A sample of the pairs is measured and scaled to all of them; reading images
is left out, and no graph is kept, both in the original's favour. Samples and whole runs of ours
take turns, and a ratio is that of one turn. Other work on the machine slows most what waits for its
threads often, and that is the original. So where there is such work, more turns are taken than are
wanted, and those in which it took the least are kept; the table has their medians, and how much it
was. The sampled distances of both are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from contenders import build_other, build_ours
from report import head
from timing import seconds_of

from lpips_fast.choice.peak_memory import added_at_peak
from lpips_fast.pairs.all_pairs import pairwise, plan

CPU = torch.device("cpu")
GIB = 2**30
RESULTS = Path(__file__).resolve().parent / "results"

# Share of all cores that other processes may take in a turn that is as good as undisturbed.
QUIET = 0.05


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    results: list[Any] = []
    return seconds_of(lambda: results.append(work()), CPU), results[0]


@dataclass
class Meter:
    """Share of all cores that other processes take, from one moment to another (Linux)."""

    start: tuple[float, float, float] = field(default_factory=lambda: Meter._now())

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = sum(os.times()[:2])
        clocks = Path("/proc/stat")
        if not clocks.exists():
            return time.perf_counter(), own, own
        user, nice, system, _, _, irq, softirq, steal = map(
            float, clocks.read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), own, busy

    def share(self) -> float:
        wall, own, busy = (now - then for now, then in zip(self._now(), self.start))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def some_images(count: int, size: int) -> torch.Tensor:
    """Blurred noise, as smooth as photographs, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return (smooth * 2 - 1).clamp(-1, 1)


def measure(
    net: str, count: int, size: int, sample: int, rounds: int, attempts: int
) -> dict[str, Any]:
    ours, theirs = build_ours(net, CPU), build_other("lpips", net, CPU)
    images = some_images(count, size)
    pairs = list(itertools.combinations(range(count), 2))
    generator = torch.Generator().manual_seed(1)

    def one_by_one(some: list[tuple[int, int]]) -> list[float]:
        return [theirs(images[i : i + 1], images[j : j + 1]).item() for i, j in some]

    def take_turn() -> dict[str, float]:
        chosen = torch.randint(len(pairs), (sample,), generator=generator).tolist()
        some = [pairs[k] for k in chosen]
        meter = Meter()
        theirs_took, expected = timed(lambda: one_by_one(some))
        ours_took, matrix = timed(lambda: pairwise(ours, images))
        original = theirs_took / sample * len(pairs)
        return {
            "others": meter.share(),
            "original": original,
            "ours": ours_took,
            "ratio": original / ours_took,
            "difference": max(
                abs(matrix[i, j].item() / value - 1) for (i, j), value in zip(some, expected)
            ),
        }

    turns: list[dict[str, float]] = []
    with torch.no_grad():
        one_by_one(pairs[:2])
        pairwise(ours, images[:16])
        while len(turns) < attempts and sum(t["others"] < QUIET for t in turns) < rounds:
            turns.append(take_turn())
    kept = sorted(turns, key=lambda t: t["others"])[:rounds]

    def middle(key: str) -> float:
        return median(t[key] for t in kept)

    return {
        "net": net,
        "images": count,
        "size": size,
        "pairs": len(pairs),
        "sampled_pairs_per_turn": sample,
        "turns": len(turns),
        "turns_kept": len(kept),
        "others_share": middle("others"),
        "original_seconds_scaled": middle("original"),
        "ours_seconds": middle("ours"),
        "ratio": middle("ratio"),
        "ratio_lowest": min(t["ratio"] for t in kept),
        "ratio_highest": max(t["ratio"] for t in kept),
        "largest_relative_difference": max(t["difference"] for t in turns),
        "kept": kept,
    }


class Drawn(Sequence[torch.Tensor]):
    """Images that exist only while they are looked at."""

    def __init__(self, count: int, size: int) -> None:
        self.length, self.size = count, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: Any) -> Any:
        generator = torch.Generator().manual_seed(position)
        coarse = torch.rand(1, 3, self.size // 8, self.size // 8, generator=generator)
        shape = (self.size, self.size)
        return torch.nn.functional.interpolate(coarse, size=shape, mode="bilinear")[0] * 2 - 1


def measure_large(net: str, count: int, size: int, limit: int) -> dict[str, Any]:
    model, images = build_ours(net, CPU), Drawn(count, size)
    pairwise(model, [images[0], images[1]])
    scheme = plan(model, count, (size, size), memory_limit=limit)
    runs: list[tuple[float, Any]] = []
    measured = added_at_peak(
        lambda: runs.append(timed(lambda: pairwise(model, images, memory_limit=limit))), CPU
    )
    ((took, matrix),) = runs
    assert bool((matrix == matrix.T).all())
    return {
        "net": net,
        "images": count,
        "size": size,
        "memory_limit": limit,
        "planned_bytes": scheme.peak_bytes,
        "measured_bytes": measured,
        "trunk_passes": scheme.trunk_passes,
        "seconds": took,
        "plan": str(scheme),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        *head("All pairs", results, ["torch", "lpips"]),
        "Original: `lpips` 0.1.4 called pair by pair, as its `lpips_1dir_allpairs.py` does, without"
        " reading files and without a graph; a sample of the pairs, measured in turn with ours and"
        " scaled to all. Medians over the turns in which other processes took the least of the"
        ' cores ("other work"); in brackets the lowest and the highest ratio.',
        "",
        "| net | images | pairs | original, scaled | `pairwise` | faster | other work "
        "| largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["pairs"]:
        size = row["size"]
        lines.append(
            f"| {row['net']} | {row['images']} of {size}² | {row['pairs']:,} "
            f"({row['sampled_pairs_per_turn']} a turn, {row['turns_kept']} of {row['turns']}) "
            f"| {row['original_seconds_scaled']:.1f} s | {row['ours_seconds']:.2f} s "
            f"| {row['ratio']:.0f}x ({row['ratio_lowest']:.0f} to {row['ratio_highest']:.0f}) "
            f"| {row['others_share']:.0%} | {row['largest_relative_difference']:.0e} |"
        )
    if results["large"]:
        lines += [
            "",
            "| net | images | memory allowed | planned | measured | trunk passes | time |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in results["large"]:
        allowed, planned, measured = (
            f"{row[key] / GIB:.2f} GiB"
            for key in ("memory_limit", "planned_bytes", "measured_bytes")
        )
        lines.append(
            f"| {row['net']} | {row['images']:,} of {row['size']}² | {allowed} | {planned} "
            f"| {measured} | {row['trunk_passes']:,} | {row['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["alex", "vgg"])
    parser.add_argument("--images", nargs="+", type=int, default=[16, 64], help="numbers of images")
    parser.add_argument("--size", type=int, default=256, help="height and width")
    parser.add_argument("--rounds", type=int, default=5, help="turns to keep")
    parser.add_argument("--attempts", type=int, default=25, help="turns to take at most")
    parser.add_argument("--sample", type=int, default=8, help="pairs of the original in a turn")
    parser.add_argument(
        "--large", nargs="*", default=[], metavar="NET:IMAGES:GIB", help="runs of ours to measure"
    )
    parser.add_argument("--threads", type=int, help="threads of both; default: torch's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    results: dict[str, Any] = {
        **machine.this_run(),
        "pairs": [],
        "large": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (options.output / "pairwise.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.output / "pairwise.md").write_text(table(results))

    # First, while the process holds no memory that a run could take without its being seen.
    for large in options.large:
        net, count, limit = large.split(":")
        row = measure_large(net, int(count), options.size, int(float(limit) * GIB))
        results["large"].append(row)
        print(json.dumps(row), flush=True)
        save()
    for net in options.nets:
        for count in options.images:
            row = measure(
                *(net, count, options.size),
                *(options.sample, options.rounds, options.attempts),
            )
            results["pairs"].append(row)
            print(json.dumps(row), flush=True)
            save()
    print(table(results))


if __name__ == "__main__":
    main()
