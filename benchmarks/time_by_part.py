"""Where the time of one call goes, by torch's profiler: convolution, pooling, distance, and so on.

Times are each operator's own, without the operators that it calls. The profiler slows small
operators down, so shares matter here, not sums.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from contenders import build_ours, image_pair
from torch.profiler import ProfilerActivity, profile

NETS = ("alex", "squeeze", "vgg")
MODES = ("forward", "step")
SIZE = 256
CALLS = 5

PARTS = (
    "convolution",
    "ReLU",
    "pooling",
    "distance",
    "concatenation",
    "image preparation",
    "adding gradients",
    "other",
)

_PART_OF_WORD = {
    "convolution": "convolution",
    "conv2d": "convolution",
    "lpips_fast::fire": "convolution",  # and its concatenation
    "depth_to_space": "convolution",  # the last step of a strided one's gradient
    "tap_backward": "distance",  # and the two other gradients that meet it
    "scale_images": "image preparation",
    "max_pool2d": "pooling",
    "lpips_fast_distance": "distance",
    "lpips_fast::distance": "distance",
    "cat": "concatenation",
    "relu": "ReLU",
    "clamp_min": "ReLU",
    "threshold": "ReLU",
    "add_": "adding gradients",
}


def part_of(name: str, shapes: list[Any], before_convolutions: bool) -> str:
    """The part of LPIPS that an operator works for.

    Args:
        name: of the operator, as the profiler gives it.
        shapes: of its inputs; those of a list of tensors are unknown.
        before_convolutions: nothing was convolved yet in this call.
    """
    word = name.removeprefix("aten::")
    for known, part in _PART_OF_WORD.items():
        if word == known or (len(known) > 4 and known in word):
            if part in ("convolution", "image preparation", "other"):
                return part
            break
    else:
        part = "other"
    shape = shapes[0] if shapes else []
    on_images = len(shape) == 4 and shape[1] == 3
    if on_images or before_convolutions:
        return "image preparation"
    return part


def measure(net: str, mode: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a call by part, and which operators make up the part ``other``."""
    model = build_ours(net, device)
    image, target = image_pair(batch, SIZE, SIZE, device)
    image.requires_grad_(mode == "step")

    def call() -> None:
        with torch.set_grad_enabled(mode == "step"):
            distance = model(image, target)
            if mode == "step":
                torch.autograd.grad(distance.mean(), image)

    for _ in range(3):
        call()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    seconds = dict.fromkeys(PARTS, 0.0)
    others: Counter[str] = Counter()
    for _ in range(CALLS):
        with profile(activities=activities, record_shapes=True) as profiler:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
        convolved = False
        for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
            if event.device_type != torch.autograd.DeviceType.CPU or event.name.startswith("cuda"):
                continue  # kernels count with the operators that launch them
            part = part_of(event.name, event.input_shapes or [], not convolved)
            convolved = convolved or part == "convolution"
            on_cuda = device.type == "cuda"
            spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            seconds[part] += spent / 1e6 / CALLS
            if part == "other":
                others[event.name] += spent / 1e6 / CALLS
    return {
        "net": net,
        "height": SIZE,
        "width": SIZE,
        "batch": batch,
        "mode": mode,
        "seconds": seconds,
        "other": dict(others.most_common(5)),
    }


def measure_all(device: torch.device) -> list[dict[str, Any]]:
    batches = (
        {"alex": 4, "squeeze": 4, "vgg": 1} if device.type == "cpu" else dict.fromkeys(NETS, 8)
    )
    return [measure(net, mode, batches[net], device) for net in NETS for mode in MODES]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for entry in measure_all(device):
        total = sum(entry["seconds"].values())
        shares = (f"{part} {s / total:.1%}" for part, s in entry["seconds"].items())
        print(entry["net"], entry["mode"], f"{total * 1e3:.1f} ms:", ", ".join(shares))
        print("   other:", ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in entry["other"].items()))


if __name__ == "__main__":
    main()
