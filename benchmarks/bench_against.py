"""This checkout and another, built, timed in turn: what a change cost.

    python benchmarks/bench_against.py ../before                  # three minutes
    python benchmarks/bench_against.py ../before --net squeeze --seconds 20

Each runs in a process of its own, call by call after the other, since a machine's speed changes
from minute to minute. Ratios above 1: this one is faster. Processes differ by several percent
from each other, so run it more than once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = {"alex": ((1, 64), (4, 256)), "squeeze": ((1, 64), (4, 256)), "vgg": ((1, 64), (1, 256))}
MODES = ("forward", "step", "encoded")


def call_of(net: str, batch: int, size: int, mode: str) -> Callable[[], Any]:
    import torch

    import lpips_fast

    model = lpips_fast.LPIPS(net=net, verbose=False).requires_grad_(False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, batch, 3, size, size, generator=generator) * 2 - 1
    leaf = image.clone().requires_grad_()
    with torch.no_grad():
        features = model.encode(target)

    def forward() -> None:
        with torch.no_grad():
            model(image, target)

    def step() -> None:
        torch.autograd.grad(model(leaf, target).sum(), leaf)

    def encoded() -> None:
        torch.autograd.grad(model(leaf, features).sum(), leaf)

    return {"forward": forward, "step": step, "encoded": encoded}[mode]


def serve(threads: int) -> None:
    """Times a call of the case on every line of the input."""
    import torch

    import lpips_fast

    # Not another that is installed.
    assert Path(lpips_fast.__file__).is_relative_to(Path.cwd()), lpips_fast.__file__
    torch.set_num_threads(threads)
    held: tuple[list[Any], Callable[[], Any]] | None = None
    for line in sys.stdin:
        case = json.loads(line)
        if held is None or held[0] != case:
            held = case, call_of(*case)
            held[1]()
            held[1]()
        start = time.perf_counter()
        held[1]()
        print(time.perf_counter() - start, flush=True)


def server(root: Path, threads: int) -> subprocess.Popen[str]:
    # By the path: the package of an editable install would be found first.
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(REPOSITORY / 'benchmarks')!r}]"
    code += f"; import bench_against; bench_against.serve({threads})"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True
    )


def seconds_of(process: subprocess.Popen[str], case: list[Any]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("other", type=Path, help="the root of a checkout that is built")
    parser.add_argument("--net", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=10, help="for the calls of a row")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    roots = [options.other.resolve(), REPOSITORY]
    both = [server(root, options.threads) for root in roots]
    for net in options.net or SHAPES:
        for batch, size in SHAPES[net]:
            for mode in MODES:
                case = [net, batch, size, mode]
                times: list[list[float]] = [[], []]
                spent = 0.0
                while spent < options.seconds or len(times[0]) < 7:
                    order = (0, 1) if len(times[0]) % 2 else (1, 0)
                    for k in order:
                        times[k].append(seconds_of(both[k], case))
                        spent += times[k][-1]
                other, this = (median(of_one) for of_one in times)
                print(
                    f"{net} {batch} of {size}² {mode}: {other * 1e3:.1f} ms, {this * 1e3:.1f} ms, "
                    f"{other / this:.2f} times as fast",
                    flush=True,
                )
    for process in both:
        process.communicate()


if __name__ == "__main__":
    main()
