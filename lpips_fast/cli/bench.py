"""``lpips-fast bench``: how fast this machine is, forward and in training, beside the original.

Every figure is the median of calls spread over the whole run: the cases take turns, so that a
machine that slows down or is busy for a while slows all of them. The trunks are random, whose speed
is that of the trained ones, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.utils.benchmark import Measurement, Timer

from ..kernels import LOADED_LIBRARIES
from ..trunk.table import TRUNKS, minimum_size
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, add_json_argument, print_to, tell
from .device import add_device_argument, to_device
from .progress import progress_bar

# Each case is looked at so many times, in turn with all others.
_ROUNDS = 3

# An interquartile range above this part of the median is not a machine that does just this.
_STEADY = 0.25

_OURS, _ORIGINAL = "lpips_fast", "lpips"


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--net", choices=(*TRUNKS, "all"), default="all", help="trunk (default: all three)"
    )
    parser.add_argument(
        "--size",
        type=argument_types.image_size,
        default=(256, 256),
        metavar="N|WxH",
        help="of the images (default: 256)",
    )
    parser.add_argument(
        "--batch",
        type=argument_types.positive,
        default=1,
        metavar="N",
        help="pairs in a call (default: 1)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.5,
        metavar="S",
        help="time for each figure (default: 1.5), and at least three calls",
    )
    add_device_argument(parser)
    add_json_argument(parser)


def _run_bench(options: argparse.Namespace) -> None:
    nets = list(TRUNKS) if options.net == "all" else [options.net]
    for net in nets:
        if min(options.size) < minimum_size(net):
            raise CommandError(f"trunk {net} needs images of {minimum_size(net)} pixels or more")
    if options.seconds <= 0:
        raise CommandError(f"--seconds is {options.seconds}, expected more than 0")
    with contextlib.redirect_stdout(sys.stderr):
        cases = _cases(nets, options)
        tell("note", f"{len(cases)} figures: about {len(cases) * options.seconds + 5:.0f} s")
        figures = _measure(cases, options.seconds)
    report = {
        "package_version": __version__,
        "torch_version": torch.__version__,
        "device": _device_name(options.device),
        "threads": torch.get_num_threads(),
        "kernels": list(LOADED_LIBRARIES),
        "size": list(options.size),
        "batch": options.batch,
        "figures": figures,
    }
    print(json.dumps(report, indent=2)) if options.json else print_to(_table(report), sys.stdout)
    if any(f["interquartile_range_ms"] > _STEADY * f["median_ms"] for f in figures):
        tell("warning", "this machine was busy: the figures vary too much to compare by")


# ------------------------------------------------------------------------------ the cases

Case = tuple[str, str, str]  # net, task, package


def _cases(nets: list[str], options: argparse.Namespace) -> dict[Case, Callable[[], Any]]:
    from ..lpips import LPIPS, Net

    packages: dict[str, Callable[[str], torch.nn.Module]] = {
        _OURS: lambda net: to_device(
            LPIPS(net=cast(Net, net), pnet_rand=True, verbose=False), options.device
        )
    }
    original = _original_class()
    if original is not None:
        packages[_ORIGINAL] = lambda net: _build_original(original, net).to(options.device)
    width, height = options.size
    shape = (options.batch, 3, height, width)
    generator = torch.Generator().manual_seed(0)
    target, image = (torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2))
    cases: dict[Case, Callable[[], Any]] = {}
    for net in nets:
        for package, build in packages.items():
            model = build(net)
            target, image = target.to(options.device), image.to(options.device)
            cases[net, "forward", package] = _forward(model, target, image)
            cases[net, "training step", package] = _training_step(model, target, image)
    return cases


def _original_class() -> Any:
    try:
        import lpips
    except Exception as error:  # torchvision, which it needs, fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "lpips":
            tell("note", "pip install lpips shows the original beside it")
        else:
            tell("note", f"the original is left out: {' '.join(str(error).split())}")
        return None
    return lpips.LPIPS


def _build_original(original: Any, net: str) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how it is called
        return original(net=net, pnet_rand=True, verbose=False)


def _forward(model: Any, target: torch.Tensor, image: torch.Tensor) -> Callable[[], Any]:
    def forward() -> None:
        with torch.inference_mode():
            model(target, image)

    return forward


def _training_step(model: Any, target: torch.Tensor, image: torch.Tensor) -> Callable[[], Any]:
    """The loss and its gradient with respect to an image, as a decoder in training asks for it."""
    leaf = image.clone().requires_grad_()

    def training_step() -> None:
        torch.autograd.grad(model(leaf, target).mean(), leaf)

    return training_step


def _measure(cases: dict[Case, Callable[[], Any]], seconds: float) -> list[dict[str, Any]]:
    timers = {
        case: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for case, run in cases.items()
    }
    parts: dict[Case, list[Measurement]] = {case: [] for case in cases}
    with progress_bar(_ROUNDS * len(cases), "measurements") as bar:
        for timer in timers.values():
            timer.timeit(1)  # first calls choose algorithms and pack weights
        for _ in range(_ROUNDS):
            for case, timer in timers.items():
                parts[case].append(timer.blocked_autorange(min_run_time=seconds / _ROUNDS))
                bar.update()
    figures = []
    for (net, task, package), measurements in parts.items():
        whole = Measurement.merge(measurements)[0]
        figures.append(
            {
                "net": net,
                "task": task,
                "package": package,
                "median_ms": whole.median * 1e3,
                "interquartile_range_ms": whole.iqr * 1e3,
                "calls": sum(m.number_per_run * len(m.raw_times) for m in measurements),
            }
        )
    return figures


# ------------------------------------------------------------------------------ what it says


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return str(device)


def _table(report: dict[str, Any]) -> str:
    by_case = {(f["net"], f["task"], f["package"]): f for f in report["figures"]}
    compare = any(f["package"] == _ORIGINAL for f in report["figures"])
    width, height = report["size"]
    lines = [
        f"milliseconds a call, median ± interquartile range; {report['batch']} pair"
        f"{'s' if report['batch'] > 1 else ''} of {width}x{height}, {report['device']}, "
        f"{report['threads']} threads, torch {report['torch_version']}",
        f"{'net':<8}{'task':<14}{_OURS:>18}"
        + (f"{_ORIGINAL:>18}{'times as fast':>15}" if compare else ""),
    ]
    for net, task, package in by_case:
        if package != _OURS:
            continue
        ours, theirs = by_case[net, task, _OURS], by_case.get((net, task, _ORIGINAL))
        line = f"{net:<8}{task:<14}{_figure(ours):>18}"
        if theirs:
            ratio = theirs["median_ms"] / ours["median_ms"]
            line += f"{_figure(theirs):>18}{ratio:>15.1f}"
        lines.append(line)
    return "\n".join(lines)


def _figure(figure: dict[str, Any]) -> str:
    return f"{figure['median_ms']:.2f} ± {figure['interquartile_range_ms']:.2f}"


COMMAND = Command(
    "time this machine, beside the original if it is installed",
    _add_bench_arguments,
    _run_bench,
)
