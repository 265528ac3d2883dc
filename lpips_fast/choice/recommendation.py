"""Which trunk to use: agreement with people as published, time and memory as measured here.

**Agreement** is the 2AFC score of Zhang et al., "The Unreasonable Effectiveness of Deep Features as
a Perceptual Metric", CVPR 2018, Table 5 (arXiv:1801.03924v2), rows "Squeeze - lin", "Alex - lin"
and "VGG - lin": how often the metric chose as people did, of two distorted patches, the one nearer
to a reference, on the validation sets of BAPPS. Its models are the paper's own; what version 0.1 of
the weights reaches on a data set, ``lpips-fast evaluate --2afc`` tells.

**Time and memory** of one pair are measured on this machine: :mod:`.trunk_costs`.

The rule: of the trunks within all limits the one with the highest score, and of those within
:data:`NEAR` of it the fastest. Distances of different trunks cannot be compared with each other:
a table whose numbers others are to be held against needs the trunk that they used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..trunk.table import TRUNKS, minimum_size
from .trunk_costs import BUSY, MODES, Mode, Setting, TrunkCost, device_name, trunk_costs

__all__ = [
    "NEAR",
    "PEOPLE_2AFC",
    "PUBLISHED_2AFC",
    "Candidate",
    "Miss",
    "Published2AFC",
    "Recommendation",
    "recommend_trunk",
]

#: Scores no further apart than this count as equal, as in the paper's table.
NEAR = 0.005

#: Decimals to which the table is given, in fractions: its last digit is a tenth of a percent.
_DIGITS = 3


@dataclass(frozen=True)
class Published2AFC:
    """A row of the table: 2AFC scores in [0, 1]. Guessing reaches 0.5.

    Attributes:
        traditional, cnn: distortions, such as those that the weights were learned on.
        superres, deblur, colorization, frameinterp: outputs of real algorithms.
        overall: the table's last column, the mean of the six.
    """

    traditional: float
    cnn: float
    superres: float
    deblur: float
    colorization: float
    frameinterp: float
    overall: float


#: The paper's Table 5, by trunk.
PUBLISHED_2AFC: Mapping[str, Published2AFC] = MappingProxyType(
    {
        "alex": Published2AFC(0.739, 0.834, 0.715, 0.612, 0.653, 0.632, overall=0.698),
        "vgg": Published2AFC(0.760, 0.828, 0.705, 0.605, 0.625, 0.630, overall=0.692),
        "squeeze": Published2AFC(0.761, 0.835, 0.711, 0.608, 0.653, 0.632, overall=0.700),
    }
)

#: The same table's row "Human": what one more person reaches.
PEOPLE_2AFC = Published2AFC(0.808, 0.844, 0.734, 0.671, 0.688, 0.686, overall=0.739)


@dataclass(frozen=True)
class Miss:
    """A limit that a trunk does not keep.

    Attributes:
        limit: ``'min_2afc'``, ``'max_latency_ms'``, ``'max_memory_mb'`` or ``'image_size'``.
        allowed, found: the limit and the trunk's number; ``found`` is NaN where it is not known.
        by: how far off, relative to the limit; infinite where it cannot be told.
        text: the same in words.
    """

    limit: str
    allowed: float
    found: float
    by: float
    text: str


@dataclass(frozen=True)
class Candidate:
    """A trunk and what is known of it.

    Attributes:
        net: as ``LPIPS(net=…)`` takes it.
        agreement: published.
        cost: measured; ``None`` where the images are too small for the trunk.
        misses: the limits that it does not keep.
    """

    net: str
    agreement: Published2AFC
    cost: TrunkCost | None
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class Recommendation:
    """What :func:`recommend_trunk` returns; ``str()`` makes a table of it.

    Attributes:
        choice: the trunk, or ``None`` if none keeps the limits.
        closest: where none does, the one whose largest miss is the smallest.
        reasons: why, in sentences.
        candidates: every trunk.
        limits: those that were set, by name.
        device, threads, image_size, mode, dtype: what was measured.
    """

    choice: str | None
    closest: str | None
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    limits: Mapping[str, float]
    device: str
    threads: int
    image_size: tuple[int, int]
    mode: str
    dtype: str

    def __str__(self) -> str:
        height, width = self.image_size
        what = "forward" if self.mode == "forward" else "training step"
        lines = [
            *self.reasons,
            "",
            f"{'net':<9}{'2AFC, published':>17}{'latency, ms':>17}{'memory, MiB':>14}  limits",
        ]
        for candidate in self.candidates:
            cost = candidate.cost
            latency = memory = "-"
            if cost is not None:
                latency = f"{cost.latency_ms:.1f} ± {cost.latency_iqr_ms:.1f}"
                memory = "-" if cost.memory_mb is None else f"{cost.memory_mb:.0f}"
            verdict = "; ".join(miss.text for miss in candidate.misses) or "kept"
            lines.append(
                f"{candidate.net:<9}{candidate.agreement.overall:>17.3f}{latency:>17}"
                f"{memory:>14}  {verdict if self.limits else ''}".rstrip()
            )
        lines += [
            f"{'people':<9}{PEOPLE_2AFC.overall:>17.3f}",
            "",
            "2AFC: Zhang et al., CVPR 2018, Table 5 (lin), mean of six sets. Latency (median ± "
            "interquartile range) and",
            f"memory: {what} of one pair of {width}x{height} pixels, {self.dtype}, measured on "
            f"{self.device}, {self.threads} threads.",
        ]
        return "\n".join(lines)


def recommend_trunk(
    min_2afc: float | None = None,
    max_latency_ms: float | None = None,
    max_memory_mb: float | None = None,
    device: torch.device | str | None = None,
    image_size: tuple[int, int] = (256, 256),
    *,
    mode: Mode = "forward",
    dtype: torch.dtype = torch.float32,
    refresh: bool = False,
    progress: bool = False,
) -> Recommendation:
    """The trunk that agrees best with people within limits of time and memory.

    The first call measures, some ten seconds for usual sizes; later ones read what it kept.

    Args:
        min_2afc: the least published 2AFC score, in [0, 1]; people reach 0.739.
        max_latency_ms: the most milliseconds for one pair.
        max_memory_mb: the most MiB for the weights and one call at its peak.
        device: where; ``None``: a GPU if there is one that torch can use, else the CPU.
        image_size: height and width of the images.
        mode: ``'forward'``, or ``'step'``: forward and the gradient to one image.
        dtype: of the trunk.
        refresh: measure again what an earlier call kept.
        progress: show a bar on standard error.

    Returns:
        The choice, or that there is none and what comes closest, with scores and reasons.

    Raises:
        ValueError: a limit that is no positive number, a score that is no fraction, an unknown
            mode, or images too small for every trunk.

    Source: the module's docstring.

    >>> recommend_trunk(min_2afc=0.695, max_latency_ms=200).choice        # doctest: +SKIP
    'squeeze'
    """
    limits = _limits(min_2afc, max_latency_ms, max_memory_mb)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    height, width = image_size
    able = [net for net in TRUNKS if min(image_size) >= minimum_size(net)]
    if not able:
        least = min(minimum_size(net) for net in TRUNKS)
        raise ValueError(
            f"images of {height}x{width} pixels are too small for every trunk: {least}x{least} "
            "is the least"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting((height, width), mode, dtype, torch.device(device))
    costs = trunk_costs(able, setting, refresh=refresh, progress=progress)
    candidates = tuple(
        Candidate(net, PUBLISHED_2AFC[net], costs.get(net), _misses(net, costs.get(net), limits))
        for net in TRUNKS
    )
    choice, closest, reasons = _decide(candidates)
    busy = [net for net, cost in costs.items() if cost.latency_iqr_ms > BUSY * cost.latency_ms]
    if busy:
        reasons.append(
            f"The machine was busy while {', '.join(busy)} was measured: measure again with "
            "refresh (--refresh)."
        )
    return Recommendation(
        choice=choice,
        closest=closest,
        reasons=tuple(reasons),
        candidates=candidates,
        limits=MappingProxyType(limits),
        device=device_name(setting.device),
        threads=torch.get_num_threads(),
        image_size=(height, width),
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
    )


def _limits(
    min_2afc: float | None, max_latency_ms: float | None, max_memory_mb: float | None
) -> dict[str, float]:
    if min_2afc is not None and not 0 <= min_2afc <= 1:
        raise ValueError(
            f"min_2afc is {min_2afc}, expected a fraction in [0, 1]; people reach "
            f"{PEOPLE_2AFC.overall}"
        )
    named = {"max_latency_ms": max_latency_ms, "max_memory_mb": max_memory_mb}
    for name, limit in named.items():
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"{name} is {limit}, expected a number above 0")
    limits = {"min_2afc": min_2afc, **named}
    return {name: float(limit) for name, limit in limits.items() if limit is not None}


def _misses(net: str, cost: TrunkCost | None, limits: Mapping[str, float]) -> tuple[Miss, ...]:
    misses = []
    if cost is None:
        least = minimum_size(net)
        text = f"needs images of {least}x{least} pixels or more"
        misses.append(Miss("image_size", least, math.nan, math.inf, text))
    wanted = limits.get("min_2afc")
    score = PUBLISHED_2AFC[net].overall
    if wanted is not None and score < wanted:
        short = wanted - score
        text = f"2AFC {score:.3f} is {short:.{_DIGITS}f} below {wanted:g}"
        misses.append(Miss("min_2afc", wanted, score, short / wanted, text))
    measured = () if cost is None else (cost.latency_ms, cost.memory_mb)
    for name, unit, found in zip(("max_latency_ms", "max_memory_mb"), ("ms", "MiB"), measured):
        allowed = limits.get(name)
        if allowed is None:
            continue
        if found is None:
            text = "memory cannot be measured here"
            misses.append(Miss(name, allowed, math.nan, math.inf, text))
        elif found > allowed:
            text = f"{found:.4g} {unit} is {found - allowed:.3g} over {allowed:g}"
            misses.append(Miss(name, allowed, found, found / allowed - 1, text))
    return tuple(misses)


def _decide(candidates: tuple[Candidate, ...]) -> tuple[str | None, str | None, list[str]]:
    fitting = [c for c in candidates if not c.misses]
    if not fitting:
        closest = min(candidates, key=lambda c: max(miss.by for miss in c.misses))
        what = "; ".join(miss.text for miss in closest.misses)
        reasons = [f"No trunk keeps all limits. {closest.net} comes closest: {what}."]
        return None, closest.net, reasons
    best = max(c.agreement.overall for c in fitting)
    near = [c for c in fitting if round(best - c.agreement.overall, _DIGITS) <= NEAR]
    choice = min(near, key=_latency)
    reasons = [f"Use {choice.net}: {_praise(choice, fitting, near)}."]
    left = [f"{c.net} ({'; '.join(m.text for m in c.misses)})" for c in candidates if c.misses]
    if left:
        reasons.append(f"Out: {', '.join(left)}.")
    if choice.net != "alex":
        reasons.append("Distances of different trunks do not compare; alex is lpips's default.")
    return choice.net, None, reasons


def _praise(choice: Candidate, fitting: list[Candidate], near: list[Candidate]) -> str:
    score = f"published 2AFC score {choice.agreement.overall:.3f}"
    if len(fitting) == 1:
        return f"the only one that keeps all limits, {score}"
    if len(near) == 1:
        return f"the highest {score}"
    others = ", ".join(f"{c.net} {c.agreement.overall:.3f}" for c in near if c is not choice)
    return (
        f"{score}, as good as {others} (no more than {NEAR} apart), and the faster with "
        f"{_latency(choice):.1f} ms"
    )


def _latency(candidate: Candidate) -> float:
    assert candidate.cost is not None
    return candidate.cost.latency_ms
