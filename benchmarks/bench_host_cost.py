"""What a forward costs beside its arithmetic: Python, checks and dispatch, which no GPU shortens.

    python benchmarks/bench_host_cost.py

The operators that compute are played: they return what they returned in a call before. What is left
is the time in which the processor prepares a call, while a fast device would wait for it. Half a
minute.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import report
import torch
from contenders import build_ours, image_pair

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results"
COMPUTING = (
    *(
        (torch.ops.lpips_fast, name)
        for name in ("scale_images", "winograd_conv2d", "direct_conv2d")
    ),
    *((torch.ops.lpips_fast, name) for name in ("fire", "max_pool2d", "distance")),
    (torch.ops.mkldnn, "_convolution_pointwise"),
)


class Player:
    """Operators that can be recorded in one call and played in the next."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.position = -1  # recording

    def of(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def played(*arguments: Any, **options: Any) -> Any:
            if self.position < 0:
                self.results.append(operator(*arguments, **options))
                return self.results[-1]
            self.position += 1
            return self.results[self.position - 1]

        return played


@contextmanager
def played_operators() -> Iterator[Player]:
    player, originals = Player(), [getattr(owner, name) for owner, name in COMPUTING]
    try:
        for (owner, name), original in zip(COMPUTING, originals):
            setattr(owner, name, player.of(original))
        yield player
    finally:
        for (owner, name), original in zip(COMPUTING, originals):
            setattr(owner, name, original)


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of many calls, since whatever else runs only adds to it."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


@torch.no_grad()
def of_forward(net: str, repeats: int) -> dict[str, Any]:
    model = build_ours(net, CPU)
    image, target = image_pair(1, 64, 64, CPU)

    def forward() -> None:
        model(image, target)

    for _ in range(3):
        forward()
    whole = least_seconds(forward, repeats // 4)
    with played_operators() as player:
        forward()

        def play() -> None:
            player.position = 0
            forward()

        host = least_seconds(play, repeats)
        assert player.position == len(player.results)
    return {"net": net, "operators": len(player.results), "host": host, "whole": whole}


def of_an_operator(repeats: int) -> dict[str, float]:
    """One call of the distance of a single position: without a graph, and with one."""
    features = [torch.rand(1, 8, 1, 1)]
    weights = [torch.rand(8)]
    distance = torch.ops.lpips_fast.distance

    def plain() -> None:
        distance(features, features, weights, 1e-10)

    def below() -> None:
        with torch._C._AutoDispatchBelowAutograd():
            plain()

    with torch.no_grad():
        found = {"below autograd": least_seconds(below, repeats)}
        found["no_grad"] = least_seconds(plain, repeats)
    features[0].requires_grad_()
    found["with a graph"] = least_seconds(plain, repeats)
    return found


def table(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{report.TRUNKS[row['net']]}, 1 pair of 64²",
            str(row["operators"]),
            f"{row['host'] * 1e6:.0f}",
            f"{row['whole'] * 1e6:.0f}",
        ]
        for row in results["rows"]
    ]
    one = ", ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in results["call"].items())
    lines = [
        *report.head("What a call costs on the host", results, ["torch"]),
        "The least of many forwards: with the operators that compute played, and whole.",
        "",
        report.table(["", "operators", "host, µs", "whole, µs"], rows),
        "",
        f"One operator of ours, on a single position: {one}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.set_num_threads(1)  # the host's part is one thread's
    results: dict[str, Any] = {
        **machine.this_run(),
        "rows": [of_forward(net, options.repeats) for net in report.TRUNKS],
        "call": of_an_operator(options.repeats),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "host_cost.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "host_cost.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
