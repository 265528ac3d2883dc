"""What a trunk costs on this machine: time and memory of one call, measured once and kept.

**Time** is the median of calls in this process, the trunks in turn, so that a machine that is busy
for a while slows all of them.

**Memory** is the weights and what one call adds at its peak, without its images
(:mod:`.peak_memory`). On a CPU it takes a process of its own, and Linux. Elsewhere it is
not known.

Trunks have random weights, whose speed is that of trained ones, so that nothing is downloaded.
What was measured is kept under ``$XDG_CACHE_HOME/lpips_fast/trunk-costs``, a file a measurement,
named by everything that it depends on. Files are replaced as a whole, and one that cannot be read
is measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from .. import kernels
from ..trunk.table import minimum_size
from ..version import __version__
from .peak_memory import ENVIRONMENT, added_at_peak, can_measure

__all__ = ["BUSY", "MODES", "Mode", "Setting", "TrunkCost", "cache_folder", "trunk_costs"]

#: ``forward`` without a graph; ``step``: forward, and the gradient to one of the two images.
Mode = Literal["forward", "step"]
MODES: tuple[str, ...] = get_args(Mode)

MIB = 2**20

#: An interquartile range above this part of the median is a machine that does not do just this.
BUSY = 0.25

_FORMAT = 1  # of the files; another number makes all of them be measured again
_SECONDS = 1.0  # of calls to a trunk
_CALLS = (5, 100)  # at least and at most


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        image_size: height and width; one pair a call.
        mode: see :data:`Mode`.
        dtype: of the trunk.
        device: where.
    """

    image_size: tuple[int, int]
    mode: Mode
    dtype: torch.dtype
    device: torch.device

    def key(self, net: str) -> dict[str, Any]:
        """Everything that a measurement depends on, as JSON has it."""
        return {
            "format": _FORMAT,
            "net": net,
            "image_size": list(self.image_size),
            "mode": self.mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "kernels": list(kernels.LOADED_LIBRARIES),
            "torch": torch.__version__,
            "lpips_fast": __version__,
        }


@dataclass(frozen=True)
class TrunkCost:
    """What one call costs.

    Attributes:
        latency_ms: median.
        latency_iqr_ms: interquartile range; see :data:`BUSY`.
        memory_mb: in MiB; ``None`` where it cannot be measured.
    """

    latency_ms: float
    latency_iqr_ms: float
    memory_mb: float | None


def trunk_costs(
    nets: Sequence[str],
    setting: Setting,
    *,
    refresh: bool = False,
    progress: bool = False,
) -> dict[str, TrunkCost]:
    """What each trunk costs, measured where no earlier measurement is kept.

    Args:
        nets: keys of :data:`lpips_fast.trunk.TRUNKS`.
        setting: what to measure.
        refresh: measure again, and keep that.
        progress: say on standard error what it takes, and show a bar if somebody looks at it.

    Raises:
        ValueError: images too small for one of the trunks.
    """
    for net in nets:
        if min(setting.image_size) < minimum_size(net):
            raise ValueError(f"trunk {net!r} needs images of {minimum_size(net)} pixels or more")
    known = {} if refresh else {net: _kept(setting, net) for net in nets}
    costs = {net: cost for net, cost in known.items() if cost is not None}
    missing = [net for net in nets if net not in costs]
    if missing:
        if progress:
            print(
                f"Measuring {', '.join(missing)} on this machine, once: about ten seconds, for "
                "large images a minute",
                file=sys.stderr,
            )
        with tqdm(
            total=2 * len(missing),
            desc="measuring",
            disable=None if progress else True,
            file=sys.stderr,
            leave=False,
        ) as bar:
            latencies = _latencies(missing, setting, bar.update)
            for net in missing:
                memory = _memory(net, setting)
                costs[net] = TrunkCost(*latencies[net], memory)
                _keep(setting, net, costs[net])
                bar.update()
    return {net: costs[net] for net in nets}


def device_name(device: torch.device) -> str:
    """The processor that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# ------------------------------------------------------------------------------ measuring


def _call(net: str, setting: Setting, image_size: tuple[int, int]) -> tuple[Callable[[], Any], int]:
    """What is measured, and the bytes of the model's weights."""
    from ..lpips import LPIPS, Net

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dtype = None if setting.dtype == torch.float32 else setting.dtype
        model = LPIPS(net=cast(Net, net), pnet_rand=True, dtype=dtype, verbose=False)
        model.requires_grad_(False)
        image, target = torch.rand(2, 1, 3, *image_size).mul_(2).sub_(1).to(setting.device)
    model = model.to(setting.device)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if setting.mode == "step":
        image.requires_grad_()

        def step() -> Tensor:
            return torch.autograd.grad(model(image, target).sum(), image)[0]

        return step, held

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(image, target)

    return forward, held


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _latencies(
    nets: Sequence[str], setting: Setting, advance: Callable[[], object]
) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of a call of each trunk, in milliseconds."""
    calls = {net: _call(net, setting, setting.image_size)[0] for net in nets}
    seconds: dict[str, list[float]] = {net: [] for net in nets}
    wanted = {}
    for net, call in calls.items():
        call()  # chooses algorithms and packs weights
        once = _seconds(call, setting.device)
        wanted[net] = min(max(_CALLS[0], math.ceil(_SECONDS / once)), _CALLS[1])
        advance()
    for turn in range(max(wanted.values())):
        for net, call in calls.items():
            if turn < wanted[net]:
                seconds[net].append(_seconds(call, setting.device))
    result = {}
    for net, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        result[net] = (middle * 1e3, (high - low) * 1e3)
    return result


def _memory(net: str, setting: Setting) -> float | None:
    """MiB of the weights and of one call at its peak; ``None`` where nobody tells."""
    if not can_measure(setting.device):
        return None
    if setting.device.type == "cuda":
        return _peak_bytes(net, setting) / MIB
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    dtype = str(setting.dtype).removeprefix("torch.")
    arguments = [net, *map(str, setting.image_size), setting.mode, dtype]
    done = subprocess.run(
        [
            sys.executable,
            *("-W", "ignore", "-m", "lpips_fast.choice.trunk_costs"),
            *arguments,
            str(torch.get_num_threads()),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        warnings.warn(f"the memory of {net} could not be measured: {last}", stacklevel=2)
        return None
    return int(done.stdout.split()[-1]) / MIB


def _peak_bytes(net: str, setting: Setting) -> int:
    small, _ = _call(net, setting, (64, 64))
    small()
    del small
    call, held = _call(net, setting, setting.image_size)
    return held + added_at_peak(call, setting.device)


# ------------------------------------------------------------------------------ keeping


def cache_folder() -> Path:
    """Where measurements are kept: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification has a relative path ignored.
    root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return root / "lpips_fast" / "trunk-costs"


def _path(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    height, width = key["image_size"]
    return cache_folder() / f"{key['net']}-{height}x{width}-{key['mode']}-{digest}.json"


def _kept(setting: Setting, net: str) -> TrunkCost | None:
    """An earlier measurement, or ``None`` if there is none that can be read and makes sense."""
    key = setting.key(net)
    try:
        kept = json.loads(_path(key).read_text(encoding="utf-8"))
        cost = TrunkCost(**kept["cost"])
        if kept["key"] != key or not _makes_sense((cost.latency_ms, cost.latency_iqr_ms)):
            return None
        if cost.memory_mb is not None and not _makes_sense((cost.memory_mb,)):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return cost


def _makes_sense(numbers: Iterable[Any]) -> bool:
    return all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf
        for x in numbers
    )


def _keep(setting: Setting, net: str, cost: TrunkCost) -> None:
    key = setting.key(net)
    path = _path(key)
    text = json.dumps({"key": key, "cost": dataclasses.asdict(cost)}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own for every writer, and one replacement: a reader sees a whole file.
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            partial = Path(file.name)
            file.write(text)
        try:
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"the measurement is not kept: {error}", stacklevel=2)


if __name__ == "__main__":  # in a process of its own: see _memory
    _net, _height, _width, _mode, _dtype, _threads = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _setting = Setting(
        (int(_height), int(_width)),
        _mode,  # type: ignore[arg-type]
        getattr(torch, _dtype),
        torch.device("cpu"),
    )
    print(_peak_bytes(_net, _setting))
