"""The table of what is measured: which network, images, call and precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mode = Literal["forward", "step"]
Variant = Literal["plain", "encoded", "spatial", "compiled", "graphed"]

FULL_HD = (1080, 1920)


@dataclass(frozen=True)
class Case:
    """One line of the results.

    Attributes:
        net: trunk.
        height, width: of the images, in pixels.
        batch: pairs of images.
        mode: ``forward`` without a graph, or a training ``step``: forward and the gradient to one
            image, with the target and every weight frozen.
        dtype: precision of our trunk.
        variant: ``plain``; a step against a target that was ``encoded`` before; ``spatial`` maps;
            ``compiled`` by torch.compile; ``graphed`` by torch.cuda.make_graphed_callables.
    """

    net: str
    height: int
    width: int
    batch: int
    mode: Mode
    dtype: Literal["float32", "bfloat16"] = "float32"
    variant: Variant = "plain"

    @property
    def name(self) -> str:
        parts = [self.net, f"{self.height}x{self.width}", f"b{self.batch}", self.mode, self.dtype]
        return "-".join(parts if self.variant == "plain" else [*parts, self.variant])

    @property
    def takes_all(self) -> bool:
        """Whether every package takes part; else only the original does, to save time."""
        small = self.height * self.width < FULL_HD[0] * FULL_HD[1]
        return small and self.dtype == "float32" and self.variant in ("plain", "spatial")


def all_cases(device_type: str, quick: bool = False) -> list[Case]:
    """Every case for a device, the quick ones of them, in the order in which they run."""
    if quick:
        return list(_quick_cases(device_type))
    return list(_cuda_cases() if device_type == "cuda" else _cpu_cases())


def _square(net: str, size: int, batch: int, mode: Mode, *rest: str) -> Case:
    return Case(net, size, size, batch, mode, *rest)  # type: ignore[arg-type]


def _cpu_cases() -> Iterator[Case]:
    # Batches that a step of VGG16 can do in about a second; the smaller trunks take more images.
    batches = {"alex": (16, 4), "squeeze": (16, 4), "vgg": (8, 1)}
    for net, (at_64, at_256) in batches.items():
        sizes = [(64, 64, 1), (64, 64, at_64), (256, 256, 1), (256, 256, at_256), (512, 512, 1)]
        for mode in ("forward", "step"):
            for height, width, batch in [*dict.fromkeys(sizes), (*FULL_HD, 1)]:
                if net == "vgg" and mode == "step" and (height, width) == FULL_HD:
                    continue  # more than a minute a round, and over 10 GB for the original
                yield Case(net, height, width, batch, mode)  # type: ignore[arg-type]
        yield _square(net, 64, at_64, "forward", "bfloat16")
        yield _square(net, 256, at_256, "forward", "bfloat16")
        if net != "vgg":
            yield Case(net, *FULL_HD, 1, "forward", "bfloat16")
        yield _square(net, 256, at_256, "step", "bfloat16")
        yield _square(net, 256, at_256, "step", "float32", "encoded")
        yield _square(net, 256, at_256, "forward", "float32", "spatial")
    yield _square("alex", 64, 1, "forward", "float32", "compiled")
    yield _square("alex", 64, 1, "step", "float32", "compiled")


def _cuda_cases() -> Iterator[Case]:
    sizes = [(64, 64, 1), (64, 64, 32), (256, 256, 1), (256, 256, 8), (256, 256, 32)]
    sizes += [(512, 512, 8), (*FULL_HD, 1), (*FULL_HD, 4)]
    for net in ("alex", "squeeze", "vgg"):
        for dtype in ("float32", "bfloat16"):
            for mode in ("forward", "step"):
                for height, width, batch in sizes:
                    yield Case(net, height, width, batch, mode, dtype)  # type: ignore[arg-type]
            yield _square(net, 256, 8, "step", dtype, "encoded")
            yield _square(net, 256, 8, "forward", dtype, "spatial")
        for mode in ("forward", "step"):
            for variant in ("compiled", "graphed"):
                yield _square(net, 64, 1, mode, "float32", variant)  # type: ignore[arg-type]


def _quick_cases(device_type: str) -> Iterator[Case]:
    batches = {"alex": 4, "squeeze": 4, "vgg": 1}
    yield _square("alex", 64, 1, "forward")
    for net, batch in batches.items():
        at_256 = 8 if device_type == "cuda" else batch
        yield _square(net, 256, at_256, "forward")
        yield _square(net, 256, at_256, "step")
        yield _square(net, 256, at_256, "forward", "bfloat16")
    yield _square("alex", 256, 8 if device_type == "cuda" else 4, "step", "float32", "encoded")
    if device_type == "cuda":
        yield _square("alex", 64, 1, "forward", "float32", "graphed")
