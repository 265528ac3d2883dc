"""Measures the CUDA kernels, against memory bandwidth and against torch's own operators.

The distance layer by layer; the trunk's kernels on one size each.

``python benchmarks/bench_cuda_kernels.py`` takes some minutes on one GPU, ``--quick`` less than
one. It writes ``benchmarks/results/<gpu>-kernels.md`` and ``.json`` after every layer. With
``--budget SECONDS`` it ends with exit code 75 when these are over, and goes on when run again.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_report
import machine
import torch
import torch.nn.functional as F
from timing import seconds_of
from torch import Tensor

from lpips_fast import functional  # noqa: F401  (loads the operators)
from lpips_fast.lpips import ScalingLayer
from lpips_fast.trunk import Trunk, cuda_convolution
from lpips_fast.trunk.convolution import Convolution

HERE = Path(__file__).resolve().parent
PIXELS, BATCHES = (64, 256, 512), (1, 8, 32)
EPS = 1e-10
COPY_BYTES = 1 << 30
L2_MULTIPLE = 3  # the inputs of all sets together, over the L2 cache

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One tap of a trunk for a size and number of images."""

    net: str
    pixels: int
    batch: int
    tap: str
    shape: tuple[int, ...]

    def bytes_moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must move: two features read; and two gradients written, backward."""
        features = 2 * math.prod(self.shape) * dtype.itemsize
        return features if direction == "forward" else 2 * features


def trunk_layers(net: str, pixels: int, batch: int) -> list[Layer]:
    """The taps of a trunk, from a run of it without memory or arithmetic."""
    with torch.device("meta"):
        taps = Trunk(net)(torch.empty(batch, 3, pixels, pixels))
    return [
        Layer(net, pixels, batch, name, tuple(tap.shape)) for name, tap in taps._asdict().items()
    ]


def all_layers(quick: bool) -> Iterator[Layer]:
    """Every distinct shape once, under the first trunk that has it; VGG, which is judged, first."""
    seen = set()
    settings = itertools.product(["vgg", "alex", "squeeze"], PIXELS, BATCHES)
    if quick:
        settings = itertools.product(["vgg", "alex"], [256], [8])
    for net, pixels, batch in settings:
        for layer in trunk_layers(net, pixels, batch):
            if layer.shape not in seen:
                seen.add(layer.shape)
                yield layer


# --------------------------------------------------------------------------------- what is timed


def original_formula(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """One layer's averaged distance as lpips 0.1.4 computes it."""
    norm_a = torch.sqrt(torch.sum(a**2, dim=1, keepdim=True))
    norm_b = torch.sqrt(torch.sum(b**2, dim=1, keepdim=True))
    difference = (a / (norm_a + EPS) - b / (norm_b + EPS)) ** 2
    return F.conv2d(difference, weight.to(a.dtype).view(1, -1, 1, 1)).mean([2, 3], keepdim=True)


def make_sets(layer: Layer, dtype: torch.dtype, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Independent inputs, channels-last, as a trunk's ReLU would leave them."""
    sets = []
    for _ in range(count):
        a = torch.randn(layer.shape, device="cuda").relu_()
        b = (a + 0.3 * torch.randn_like(a)).relu_()
        a, b = (x.to(dtype, memory_format=torch.channels_last) for x in (a, b))
        sets.append((a, b, torch.rand(layer.shape[1], device="cuda")))
    return sets


def our_call(direction: str, a: Tensor, b: Tensor, weight: Tensor) -> Call:
    if direction == "forward":
        return lambda: torch.ops.lpips_fast.distance([a], [b], [weight], EPS)
    grad = torch.ones(a.shape[0], 1, device=a.device)
    needs = (True, True, False)
    return lambda: torch.ops.lpips_fast.distance_backward(grad, [a], [b], [weight], EPS, *needs)


def formula_call(
    direction: str, formula: Callable[..., Tensor], a: Tensor, b: Tensor, weight: Tensor
) -> Call:
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return formula(a, b, weight)

        return forward
    leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
    # A backward runs on the stream of its forward, and so must be captured there.
    with torch.cuda.stream(capture_stream()):
        output = formula(*leaves, weight)
        grad = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


# ------------------------------------------------------------------------------------------ time


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def device_seconds(calls: Sequence[Call], repeats: int) -> float:
    """Seconds of one call on the device: the median over replays of a graph that makes them all."""
    torch.cuda.synchronize()
    with torch.cuda.stream(capture_stream()):
        for call in calls:
            call()
    torch.cuda.synchronize()
    rounds = max(1, 8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture_stream()):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    device = torch.device("cuda")
    times = [seconds_of(graph.replay, device) for _ in range(repeats)]
    return statistics.median(times) / (rounds * len(calls))


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / device_seconds([lambda: target.copy_(source)], repeats=11)


def measure(
    layer: Layer, direction: str, dtype: torch.dtype, bandwidth: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One line of the results. A formula that fails, out of memory mostly, is left out."""
    size = layer.bytes_moved("forward", dtype)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = make_sets(layer, dtype, min(64, max(1, math.ceil(L2_MULTIPLE * l2 / size))))
    moved = layer.bytes_moved(direction, dtype)
    seconds = device_seconds([our_call(direction, *s) for s in sets], options.repeats)
    case: dict[str, Any] = {
        "net": layer.net,
        "pixels": layer.pixels,
        "batch": layer.batch,
        "layer": layer.tap,
        "shape": list(layer.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "bytes": moved,
        "seconds": seconds,
        "share_of_copy": moved / seconds / bandwidth,
        "times_eager": None,
        "times_compiled": None,
    }
    formulas = {"times_eager": original_formula}
    # Compiling takes seconds a shape, so that only what is judged by it is compiled.
    if kernel_report.is_goal_case(case) and direction == "forward" and not options.no_compile:
        torch._dynamo.reset()
        formulas["times_compiled"] = torch.compile(original_formula, dynamic=False)
    for key, formula in formulas.items():
        try:
            calls = [formula_call(direction, formula, *s) for s in sets]
            case[key] = device_seconds(calls, options.repeats) / seconds
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            print(f"    not measured: {key}, {layer}: {reason}", file=sys.stderr)
        calls = []
        gc.collect()
        torch.cuda.empty_cache()
    return case


def measure_whole(repeats: int) -> dict[str, Any]:
    """AlexNet's five layers at 64 pixels, batch 1, in one call: time and launches."""
    layers = [make_sets(layer, torch.float32, 1)[0] for layer in trunk_layers("alex", 64, 1)]
    feats0, feats1, weights = (list(group) for group in zip(*layers))

    def call() -> Tensor:
        return torch.ops.lpips_fast.distance(feats0, feats1, weights, EPS)

    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    launches = sum(event.device_type == on_device for event in profile.events())
    return {"seconds": device_seconds([call], repeats), "launches": launches or None}


# ------------------------------------------------------------------------------------- the trunk


def trunk_calls(dtype: torch.dtype) -> Iterator[tuple[str, int | None, Call, Call]]:
    """Name, bytes that must move, our call, and torch's operators for the same.

    At sizes well above the L2 cache. A convolution is bound by arithmetic: no bytes are given.
    """
    operators = torch.ops.lpips_fast
    layer = ScalingLayer().cuda()
    images = [torch.rand(32, 3, 512, 512, device="cuda") for _ in range(2)]
    pixels = sum(image.numel() for image in images)

    def torchs_scaling() -> Tensor:
        scaled = layer(2 * torch.cat(images) - 1)
        return scaled.to(dtype, memory_format=torch.channels_last)

    yield (
        "scaling of 2 × 32 images, 512²",
        pixels * (4 + dtype.itemsize),
        lambda: operators.scale_images(images, layer.shift, layer.scale, True, dtype),
        torchs_scaling,
    )
    x = torch.randn(8, 64, 256, 256, device="cuda", dtype=dtype).relu_()
    x = x.contiguous(memory_format=torch.channels_last)
    size, bias = x.numel() * dtype.itemsize, torch.zeros(64, device="cuda", dtype=dtype)
    yield (
        "bias and ReLU in place, 8 × 64 × 256²",
        2 * size,
        lambda: operators.bias_relu_(x, bias),
        lambda: x.add_(bias.view(1, -1, 1, 1)).relu_(),
    )
    for kernel in (2, 3):
        y, index = F.max_pool2d(x, kernel, 2, return_indices=True)
        grad, pooled = torch.randn_like(y), y.numel() * dtype.itemsize
        arguments = ([kernel, kernel], [2, 2], [0, 0], [1, 1], False)
        yield (
            f"max-pooling {kernel}x{kernel}, stride 2, 8 × 64 × 256²",
            size + pooled,
            functools.partial(operators.max_pool2d, x, kernel, 2, False),
            functools.partial(F.max_pool2d, x, kernel, 2),
        )
        yield (
            f"backward of max-pooling {kernel}x{kernel}",
            2 * (size + pooled),
            functools.partial(operators.max_pool2d_backward, grad, x, y, kernel, 2),
            functools.partial(
                torch.ops.aten.max_pool2d_with_indices_backward, grad, x, *arguments, index
            ),
        )
    weight = torch.randn(64, 64, 3, 3, device="cuda").div_(24)
    weight = weight.to(dtype, memory_format=torch.channels_last)
    conv = Convolution(weight, bias, stride=1, padding=1, packed=None)  # type: ignore[arg-type]
    cuda_convolution.forget_choices()
    cuda_convolution.convolve(conv, x)
    (choice,) = cuda_convolution.CHOICES.values()
    yield (
        f"convolution 3x3 with bias and ReLU, 8 × 64 × 256² "
        f"({'fused' if choice.fused else 'two passes'}: {choice.reason})",
        None,
        lambda: cuda_convolution.convolve(conv, x),
        lambda: F.conv2d(x, weight, bias, padding=1).relu_(),
    )


def measure_trunk(dtype: torch.dtype, bandwidth: float, repeats: int) -> Iterator[dict[str, Any]]:
    for name, moved, ours, torchs in trunk_calls(dtype):
        with torch.no_grad():
            seconds = device_seconds([ours], repeats)
            times_torch = device_seconds([torchs], repeats) / seconds
        yield {
            "name": name,
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": seconds,
            "share_of_copy": moved / seconds / bandwidth if moved else None,
            "times_torch": times_torch,
        }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only 256², batch 8")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--repeats", type=int, default=11, help="replays per figure (default 11)")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "float16", "bfloat16"],
        help="repeatable; default all three",
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="then go on another time")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of results")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ["float32", "float16", "bfloat16"]
    return options


def key_of(case: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one line of the results from another."""
    return (*case["shape"], case["dtype"], case["direction"])


def started_results(path: Path, device: torch.device, settings: list[str]) -> dict[str, Any]:
    """Those of a run that was cut off on the same machine with the same settings, or none yet."""
    facts = machine.facts(device)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept.get("facts") == facts and kept.get("settings") == settings:
            return kept
    command = shlex.join(["python", "benchmarks/bench_cuda_kernels.py", *settings])
    return {"facts": facts, "settings": settings, "command": command, "cases": []}


def main(arguments: Sequence[str] | None = None) -> None:
    start, options = time.monotonic(), parse_arguments(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_kernels.py needs a CUDA device, and there is none")
    device = torch.device("cuda")
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / (
        machine.slug(device) + ("-kernels-quick" if options.quick else "-kernels")
    )
    settings = [f"--dtype={dtype}" for dtype in options.dtype] + [f"--repeats={options.repeats}"]
    settings += ["--quick"] * options.quick + ["--no-compile"] * options.no_compile
    results = started_results(stem.with_suffix(".json"), device, settings)
    if "trunk" not in results:
        results["copy_bandwidth"] = copy_bandwidth()
        results["whole"] = measure_whole(options.repeats)
        results["trunk"] = [
            line
            for dtype in options.dtype
            for line in measure_trunk(
                getattr(torch, dtype), results["copy_bandwidth"], options.repeats
            )
        ]
    bandwidth = results["copy_bandwidth"]
    print(f"{machine.name(device)}: copy {bandwidth / 1e9:,.0f} GB/s", file=sys.stderr)
    known = {key_of(case) for case in results["cases"]}
    for layer in all_layers(options.quick):
        for dtype, direction in itertools.product(options.dtype, kernel_report.DIRECTIONS):
            if (*layer.shape, dtype, direction) in known:
                continue
            case = measure(layer, direction, getattr(torch, dtype), bandwidth, options)
            results["cases"].append(case)
            print(
                f"  {case['net']} {case['pixels']} x{case['batch']} {case['layer']} {dtype} "
                f"{direction}: {case['seconds'] * 1e6:.1f} µs, {case['share_of_copy']:.0%} of copy",
                file=sys.stderr,
                flush=True,
            )
        # After every layer, so that a run that is cut off leaves what it has.
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        stem.with_suffix(".md").write_text(kernel_report.markdown(results))
        if options.budget is not None and time.monotonic() - start > options.budget:
            left = sum(
                (*other.shape, dtype, direction) not in {key_of(c) for c in results["cases"]}
                for other in all_layers(options.quick)
                for dtype, direction in itertools.product(options.dtype, kernel_report.DIRECTIONS)
            )
            if left:
                print(f"{left} figures are left; run it again to go on", file=sys.stderr)
                sys.exit(75)
    print(f"written: {stem}.md", file=sys.stderr)
    sys.exit(0)


if __name__ == "__main__":
    main()
