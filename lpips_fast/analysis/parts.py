"""What a distance is made of: normalisations side by side, layers, places, channels.

Every result knows which metric it is of and prints as a table; :mod:`lpips_fast.plots` draws it.
Nothing here keeps a graph, and the model is left as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comparison.calls import lins_are_linear
from ..comparison.options import net_in_words
from ..features import Features
from ..normalization import NORMALIZATIONS, check_normalization
from ..trunk.table import trunk_spec

if TYPE_CHECKING:
    from ..lpips import LPIPS

__all__ = [
    "ChannelImportance",
    "LayerContributions",
    "LayerImportance",
    "NormalizationResult",
    "NormalizationTable",
    "channel_importance",
    "compare_normalizations",
    "describe",
    "layer_contributions",
    "layer_maps",
    "layer_names",
    "rank_correlation",
]


def describe(model: LPIPS) -> str:
    """Which metric a model is, in words.

    >>> import lpips_fast
    >>> describe(lpips_fast.LPIPS(pnet_rand=True, lpips=False, verbose=False))
    'random trunk, not LPIPS: baseline (no linear layers) alex, version 0.1'
    """
    metric = "LPIPS" if model.lpips else "baseline (no linear layers)"
    trunk = "random trunk, not LPIPS: " if model.pnet_rand else ""
    other = "" if model.normalization == "l2" else f", normalization {model.normalization}"
    if len(model.layers) < model.L:
        plural = "s" if len(model.layers) > 1 else ""
        other += f", layer{plural} {','.join(map(str, model.layers))} only"
    dtype = model.dtype or model.scaling_layer.shift.dtype
    if dtype != torch.float32:
        other += f", {str(dtype).removeprefix('torch.')}"
    return f"{trunk}{metric} {net_in_words(model)}, version {model.version}{other}"


def layer_names(model: LPIPS) -> tuple[str, ...]:
    """The layers that a model compares, in their order.

    >>> import lpips_fast
    >>> layer_names(lpips_fast.LPIPS(pnet_rand=True, verbose=False))
    ('relu1', 'relu2', 'relu3', 'relu4', 'relu5')
    """
    names = tuple(trunk_spec(model.net_name).taps)
    return tuple(names[layer] for layer in model.layers)


def _like(model: LPIPS, **changes: Any) -> LPIPS:
    """A model of the same modules that answers with one number a pair, with further changes."""
    if not lins_are_linear(model):
        raise ValueError(
            "the model's linear layers do more than weigh channels (see model.fast_path()); in "
            "training mode they drop channels at random: call model.eval() first"
        )
    like = copy.copy(model)  # its modules and parameters are the same objects
    for name, value in {"spatial": False, "reduction": "none", **changes}.items():
        setattr(like, name, value)
    return like


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text: the first column to the left, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


# --------------------------------------------------------------------------------- normalisations


@dataclass(frozen=True)
class NormalizationResult:
    """The distances of some pairs with one normalisation.

    Attributes:
        name: of the normalisation.
        distances: one a pair, in the order of the pairs.
        rank_correlation: Spearman's, with the distances of ``l2``; NaN for fewer than two pairs,
            and where all distances are equal.
        layer_means: each layer's part of the mean distance.
    """

    name: str
    distances: tuple[float, ...]
    rank_correlation: float
    layer_means: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.distances) / len(self.distances)

    @property
    def deviation(self) -> float:
        """Sample standard deviation (N - 1); NaN for one pair."""
        if len(self.distances) < 2:
            return math.nan
        squares = math.fsum((d - self.mean) ** 2 for d in self.distances)
        return math.sqrt(squares / (len(self.distances) - 1))

    @property
    def variation(self) -> float:
        """Deviation over mean, which has no unit: what can be compared between normalisations."""
        return self.deviation / self.mean if self.mean else math.nan

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest distance."""
        return min(self.distances), max(self.distances)


@dataclass(frozen=True)
class NormalizationTable:
    """What :func:`compare_normalizations` returns; ``print`` shows it as a table.

    Attributes:
        metric: the model in words, but for its normalisation.
        layers: their names.
        results: one a normalisation.
    """

    metric: str
    layers: tuple[str, ...]
    results: tuple[NormalizationResult, ...]

    def __getitem__(self, name: str) -> NormalizationResult:
        return next(r for r in self.results if r.name == check_normalization(name))

    def __iter__(self) -> Iterator[NormalizationResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __str__(self) -> str:
        count = len(self.results[0].distances)
        head = ("normalization", "mean", "deviation", "dev./mean", "lowest", "highest")
        rows = [
            (
                r.name,
                *map(_number, (r.mean, r.deviation, r.variation, *r.range)),
                "-" if math.isnan(r.rank_correlation) else f"{r.rank_correlation:.3f}",
            )
            for r in self.results
        ]
        pairs = f"{count} pair{'' if count == 1 else 's'}"
        table = _table((*head, "rank corr. with l2"), rows)
        return f"Distances of {pairs}, {self.metric}\n{table}"

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON: figures that do not exist are ``None``."""
        return {
            r.name: {
                "formula": NORMALIZATIONS[r.name].formula,
                "distances": list(r.distances),
                "mean": r.mean,
                "deviation": _or_none(r.deviation),
                "variation": _or_none(r.variation),
                "range": list(r.range),
                "layer_means": dict(zip(self.layers, r.layer_means)),
                "rank_correlation_with_l2": _or_none(r.rank_correlation),
            }
            for r in self.results
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


@torch.no_grad()
def compare_normalizations(
    model: LPIPS,
    pairs: Iterable[tuple[Tensor | Features, Tensor | Features]],
    *,
    normalizations: Sequence[str] = tuple(NORMALIZATIONS),
    normalize: bool = False,
) -> NormalizationTable:
    """Distances of the same pairs with each normalisation, from one trunk pass an image.

    Args:
        model: its trunk and linear weights are used; its own normalisation, ``spatial`` and
            ``reduction`` are not.
        pairs: two images each, or two batches, as for :meth:`LPIPS.forward`: tensors or
            :class:`Features`. They are looked at one after the other, so that ``batch`` has the
            images that are given together for its batch.
        normalizations: which ones.
        normalize: tensors are in [0, 1].

    Returns:
        The distances and their mean, deviation, range and rank correlation with those of ``l2``.

    Raises:
        ValueError: no pairs, an unknown normalisation, or active dropout.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> table = compare_normalizations(model, [torch.rand(2, 1, 3, 64, 64)], normalize=True)
    >>> [result.name for result in table]
    ['l2', 'l1', 'max', 'std', 'none', 'layer', 'instance', 'batch']
    """
    names = [check_normalization(name) for name in normalizations]
    if not names:
        raise ValueError("expected at least one normalization, got none")
    models = {name: _like(model, normalization=name) for name in ("l2", *names)}
    parts: dict[str, list[Tensor]] = {name: [] for name in models}
    for in0, in1 in pairs:
        features0, features1 = (
            x if isinstance(x, Features) else model.encode(x, normalize) for x in (in0, in1)
        )
        for name, like in models.items():
            _, layers = like.distance(features0, features1, retPerLayer=True)
            parts[name].append(torch.stack([layer.flatten().double() for layer in layers]))
    if not parts["l2"]:
        raise ValueError("expected at least one pair of images, got none")
    by_layer = {name: torch.cat(some, dim=1) for name, some in parts.items()}
    distances = {name: tuple(some.sum(dim=0).tolist()) for name, some in by_layer.items()}
    results = tuple(
        NormalizationResult(
            name,
            distances[name],
            rank_correlation(distances[name], distances["l2"]),
            tuple(by_layer[name].mean(dim=1).tolist()),
        )
        for name in names
    )
    return NormalizationTable(describe(models["l2"]), layer_names(model), results)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN where it does not exist.

    >>> rank_correlation([1, 2, 3, 10], [10, 20, 30, 31])
    1.0
    """
    if len(x) != len(y):
        raise ValueError(f"expected as many numbers in both, got {len(x)} and {len(y)}")
    if len(x) < 2:
        return math.nan
    ranks = torch.stack([_ranks(x), _ranks(y)])
    deviations = ranks - ranks.mean(dim=1, keepdim=True)
    norms = deviations.norm(dim=1)
    if not bool((norms > 0).all()):
        return math.nan
    return ((deviations[0] @ deviations[1]) / norms.prod()).clamp(-1, 1).item()


def _ranks(values: Sequence[float]) -> Tensor:
    column = torch.tensor(values, dtype=torch.float64)
    below = (column[:, None] > column).sum(dim=1)
    equal = (column[:, None] == column).sum(dim=1)
    return below + (equal + 1) / 2


# ----------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class LayerContributions:
    """What :func:`layer_contributions` returns; ``print`` shows it as a table.

    Attributes:
        metric: the model in words.
        layers: their names.
        values: (N, L): each layer's part of each pair's distance, in float32 or float64.
    """

    metric: str
    layers: tuple[str, ...]
    values: Tensor

    @property
    def distances(self) -> Tensor:
        """(N,): the sums over layers."""
        return self.values.sum(dim=1)

    @property
    def shares(self) -> Tensor:
        """(N, L): parts of 1; all 0 for a pair whose distance is 0."""
        total = self.distances[:, None]
        return torch.where(total == 0, 0.0, self.values / torch.where(total == 0, 1.0, total))

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.values)

    def __str__(self) -> str:
        count = len(self)
        head = ["layer"]
        head += ["distance", "share"] if count == 1 else ["mean distance", "mean share"]
        means, shares = self.values.mean(dim=0).tolist(), self.shares.mean(dim=0).tolist()
        rows = [
            (name, _number(value), f"{100 * share:.1f} %")
            for name, value, share in zip(self.layers, means, shares)
        ]
        rows.append(("sum", _number(sum(means)), f"{100 * sum(shares):.1f} %"))
        pairs = "one pair" if count == 1 else f"{count} pairs"
        return f"Layers of {pairs}, {self.metric}\n{_table(head, rows)}"


@torch.no_grad()
def layer_contributions(
    model: LPIPS,
    in0: Tensor | Features,
    in1: Tensor | Features,
    normalize: bool = False,
    **masking: Any,
) -> LayerContributions:
    """Each layer's part of the distance, whose sum is the distance.

    Args:
        model, in0, in1, normalize: as for :meth:`LPIPS.forward`, and so are ``mask``,
            ``mask_mode`` and ``fill_value``.

    Raises:
        ValueError, TypeError: as :meth:`LPIPS.forward`, and for active dropout.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> parts = layer_contributions(model, *torch.rand(2, 3, 3, 64, 64), normalize=True)
    >>> parts.values.shape, bool(torch.allclose(parts.shares.sum(dim=1), torch.ones(3)))
    (torch.Size([3, 5]), True)
    """
    _, layers = _like(model)(in0, in1, retPerLayer=True, normalize=normalize, **masking)
    values = torch.stack([layer.flatten() for layer in layers], dim=1)
    return LayerContributions(describe(model), layer_names(model), values)


@torch.no_grad()
def layer_maps(
    model: LPIPS,
    in0: Tensor | Features,
    in1: Tensor | Features,
    normalize: bool = False,
    **masking: Any,
) -> dict[str, Tensor]:
    """Each layer's distance map at the images' resolution; their sum is that of ``spatial=True``.

    Args:
        model, in0, in1, normalize: as for :meth:`LPIPS.forward`, and so are ``mask``,
            ``mask_mode`` and ``fill_value``.

    Returns:
        (N, 1, H, W) by the layer's name, in the layers' order.

    Raises:
        ValueError, TypeError: as :meth:`LPIPS.forward`, and for active dropout.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> maps = layer_maps(model, *torch.rand(2, 1, 3, 64, 64), normalize=True)
    >>> {name: tuple(map.shape) for name, map in maps.items()}["relu5"]
    (1, 1, 64, 64)
    """
    _, layers = _like(model, spatial=True)(
        in0, in1, retPerLayer=True, normalize=normalize, **masking
    )
    return dict(zip(layer_names(model), layers, strict=True))


# --------------------------------------------------------------------------------------- channels


@dataclass(frozen=True, eq=False)
class LayerImportance:
    """How one layer's weight is spread over its channels.

    Attributes:
        layer: its name.
        weights: (C,): the linear weights, as they are.
        top: channels of the largest weights: index, weight, and share of the layer's weight.
        share: the layer's share of the weight of all compared layers. It says nothing of the size
            of features: :func:`layer_contributions` says what a layer adds to a distance.
    """

    layer: str
    weights: Tensor
    top: tuple[tuple[int, float, float], ...]
    share: float

    @property
    def effective_channels(self) -> float:
        """``(sum w)² / sum w²``: C for equal weights, 1 where one channel has all; 0 for none."""
        sizes = self.weights.abs()
        squares = sizes.square().sum().item()
        return sizes.sum().item() ** 2 / squares if squares else 0.0

    @property
    def unused_channels(self) -> int:
        """Channels of weight 0."""
        return int((self.weights == 0).sum())


@dataclass(frozen=True, eq=False)
class ChannelImportance:
    """What :func:`channel_importance` returns; ``print`` shows it as a table.

    Attributes:
        metric: the model in words.
        layers: one a layer.
    """

    metric: str
    layers: tuple[LayerImportance, ...]

    def __iter__(self) -> Iterator[LayerImportance]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows = [
            (
                r.layer,
                f"{len(r.weights)}",
                f"{r.unused_channels}",
                f"{r.effective_channels:.1f}",
                f"{100 * r.share:.1f} %",
                "  ".join(f"{channel} ({100 * share:.0f} %)" for channel, _, share in r.top[:3]),
            )
            for r in self.layers
        ]
        head = ("layer", "channels", "of weight 0", "effective", "share of weight")
        return f"Channels, {self.metric}\n{_table((*head, 'heaviest channels'), rows)}"


@torch.no_grad()
def channel_importance(model: LPIPS, top: int = 8) -> ChannelImportance:
    """How the learned weights are spread over layers and channels; no image is needed.

    Args:
        model: with linear weights; those of a baseline are 1.
        top: channels to name in each layer, heaviest first.

    Raises:
        ValueError: ``top`` below 1.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> first = channel_importance(model).layers[0]
    >>> first.layer, len(first.weights), first.effective_channels < 64
    ('relu1', 64, True)
    """
    if top < 1:
        raise ValueError(f"top is {top}, expected at least 1")
    names = layer_names(model)
    weights = [
        model.layer_weight(k).double().cpu()
        if model.lpips
        else torch.ones(model.chns[k], dtype=torch.float64)
        for k in model.layers
    ]
    everything = sum(w.abs().sum().item() for w in weights)
    results = []
    for name, weight in zip(names, weights, strict=True):
        total = weight.abs().sum().item()
        heaviest = weight.abs().argsort(descending=True, stable=True)[:top].tolist()
        results.append(
            LayerImportance(
                layer=name,
                weights=weight,
                top=tuple(
                    (k, weight[k].item(), weight[k].abs().item() / total if total else 0.0)
                    for k in heaviest
                ),
                share=total / everything if everything else 0.0,
            )
        )
    return ChannelImportance(describe(model), tuple(results))
