"""What an image pair gives to linear weights: its mean squared difference per channel.

A layer's distance is ``mean_hw sum_c w_c x_c`` with ``x = (â - b̂)²``. The mean over positions and
the sum over channels commute, so that the distance is ``sum_c w_c m_c`` with ``m_c = mean_hw x_c``.
While the trunk is frozen ``m`` does not change: computed once, it turns an epoch of training into
matrix-vector products (:class:`CachedTriplets`).

``m`` is also the derivative of the distance by the weights, so it comes from the operator's fused
weight gradient, which reads each feature once and writes C numbers an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import composed, kernels
from ..normalization import (
    EPS,
    LEARNED,
    Normalization,
    check_normalization,
    depends_on_batch,
    normalize_features,
)
from ..weights import WeightsError
from .datasets import load_batches

if TYPE_CHECKING:
    from ..lpips import LPIPS

__all__ = ["CachedTriplets", "cache_triplets", "channel_means", "dropout_deviations"]


@torch.no_grad()
def channel_means(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], normalization: Normalization = "l2"
) -> list[Tensor]:
    """Mean over positions of the normalised features' squared difference, per image and channel.

    Args:
        feats0, feats1: features per layer, each (N, C_l, H_l, W_l), as for
            :func:`lpips_fast.functional.distance`.
        normalization: of the features. The operator knows ``'l2'``; the others are composed.

    Returns:
        One tensor (N, C_l) a layer, in the accumulator's dtype, without a graph.

    >>> from lpips_fast.functional import distance
    >>> a, b, weight = torch.rand(2, 64, 8, 8), torch.rand(2, 64, 8, 8), torch.rand(64)
    >>> (means,) = channel_means([a], [b])
    >>> torch.allclose(means @ weight, distance([a], [b], [weight])[:, 0])
    True
    """
    if check_normalization(normalization) != "l2" or not kernels.has_kernel(feats0[0].device):
        return [
            _squared_difference(a, b, normalization).mean(dim=(2, 3))
            for a, b in zip(feats0, feats1, strict=True)
        ]
    # The operator sums the gradient of a layer's weights over the batch. Each image of each layer
    # is handed over as a layer of its own, and so keeps a gradient of its own.
    layers0 = [image for feat in feats0 for image in feat.split(1)]
    layers1 = [image for feat in feats1 for image in feat.split(1)]
    dtype = composed.accumulator_dtype(layers0[0].dtype)
    weights = [layer.new_ones(layer.shape[1], dtype=dtype) for layer in layers0]
    ones = layers0[0].new_ones((1, len(layers0)), dtype=dtype)
    means = torch.ops.lpips_fast.distance_backward(
        ones, layers0, layers1, weights, EPS, False, False, True
    )
    batch = len(feats0[0])
    return [torch.stack(means[k * batch : (k + 1) * batch]) for k in range(len(feats0))]


@torch.no_grad()
def dropout_deviations(
    feats0: Sequence[Tensor], feats1: Sequence[Tensor], normalization: Normalization = "l2"
) -> list[Tensor]:
    """Deviation of :func:`channel_means` under dropout at rate one half, per image and channel.

    The original drops the elements of ``x`` (module docstring), each for itself, and doubles those
    that stay. The mean over positions then has the expectation ``m`` and the deviation
    ``sqrt(sum_hw x²) / HW``, which never exceeds ``m``.

    Returns:
        One tensor (N, C_l) a layer, in the accumulator's dtype, without a graph.
    """
    deviations = []
    for a, b in zip(feats0, feats1, strict=True):
        squared = _squared_difference(a, b, normalization)
        positions = squared.shape[2] * squared.shape[3]
        deviations.append(torch.linalg.vector_norm(squared, dim=(2, 3)) / positions)
    return deviations


def _squared_difference(feat0: Tensor, feat1: Tensor, normalization: Normalization) -> Tensor:
    normal0, normal1 = (normalize_features(feat, normalization) for feat in (feat0, feat1))
    return (normal0 - normal1) ** 2


@dataclass(frozen=True)
class CachedTriplets:
    """A 2AFC data set as a frozen trunk sees it: all that linear weights can learn from.

    Memory is 8 bytes a triplet and channel, and as much again for ``deviations``: with AlexNet's
    1152 channels 9 KiB a triplet, or 2.8 GB for the 151 400 training triplets of BAPPS with both.

    Attributes:
        means: channel means of all layers, one after the other, (2, N, C): of (ref, p0), (ref, p1).
        deviations: what :func:`dropout_deviations` gives, likewise; ``None`` without dropout.
        judge: fraction of people who chose p1, (N,).
    """

    means: Tensor
    deviations: Tensor | None
    judge: Tensor

    def __len__(self) -> int:
        return len(self.judge)

    def distances(
        self, weights: Tensor, rows: Tensor | None = None, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Distances (ref, p0) and (ref, p1) of some triplets, differentiable by the weights.

        Dropout moves each channel's mean ``m`` to ``m + s (B / (1 - p) - 1)``, where ``s`` is its
        deviation and ``B`` is 1 with probability 1 - p. Expectation and variance are exactly those
        that the original's dropout of single positions causes, the result is never negative, and
        where a channel differs at one position only it is the original's dropout itself. Dropping
        whole channels of ``m`` would be simpler, but is far stronger: as if every position of a
        layer (225 in the first of AlexNet) were dropped at once, or none.

        Args:
            weights: of all layers, one after the other, (C,).
            rows: indices of the triplets; ``None``: all.
            dropout: the rate p; 0 for evaluation.

        Returns:
            Two tensors (len(rows),).
        """
        means = self.means if rows is None else self.means[:, rows]
        if dropout > 0:
            if self.deviations is None:
                raise ValueError("dropout needs the deviations, which were not cached")
            deviations = self.deviations if rows is None else self.deviations[:, rows]
            kept = torch.rand_like(means) >= dropout  # on a CPU twice as fast as Bernoulli draws
            means = torch.addcmul(means, deviations, kept / (1 - dropout) - 1)
        d0, d1 = means @ weights
        return d0, d1


@torch.no_grad()
def cache_triplets(
    model: LPIPS,
    dataset: Any,
    *,
    batch_size: int = 50,
    workers: int = 0,
    deviations: bool = True,
    progress: str | None = None,
) -> CachedTriplets:
    """Run the trunk once over a 2AFC data set.

    Args:
        model: whose trunk does not learn. The cache lies on its device.
        dataset: :class:`~lpips_fast.judgements.TwoAFCDataset`, or any sequence of such items.
        batch_size: triplets a trunk pass.
        workers: processes that read images.
        deviations: also what dropout needs.
        progress: label of a progress bar; ``None`` shows none.

    Raises:
        ValueError: a normalisation that learns, or that depends on the batch.
    """
    normalization = model.normalization
    if normalization == LEARNED or depends_on_batch(normalization):
        raise ValueError(
            f"nothing can be kept for linear weights with normalization={normalization!r}, which "
            "learns beside them or depends on the batch"
        )
    size, channels = len(dataset), sum(model.chns[layer] for layer in model.layers)
    means = model.scaling_layer.shift.new_empty((2, size, channels))
    spread = torch.empty_like(means) if deviations else None
    judge = means.new_empty(size)
    first = 0
    hidden = True if progress is None else None  # None: where standard error is no terminal
    with tqdm(total=size, desc=progress, disable=hidden, leave=False) as bar:
        for batch in load_batches(dataset, batch_size, workers=workers, device=means.device):
            count = len(batch["judge"])
            rows = slice(first, first + count)
            features = model.encode(torch.cat((batch["ref"], batch["p0"], batch["p1"])))
            ref, *patches = (features[k * count : (k + 1) * count] for k in range(3))
            for side, patch in enumerate(patches):
                pair = (ref.taps, patch.taps, normalization)
                means[side, rows] = torch.cat(channel_means(*pair), dim=1)
                if spread is not None:
                    moved = dropout_deviations(*pair)
                    spread[side, rows] = torch.cat(moved, dim=1)
            judge[rows] = batch["judge"].flatten()
            first += count
            bar.update(count)
    if not torch.isfinite(means).all():
        raise WeightsError("the trunk's features hold NaN or infinity: its weights must be damaged")
    return CachedTriplets(means, spread, judge)
