"""LPIPS as a metric of torchmetrics: mean or sum over a whole data set, on one device or many.

``pip install "lpips-fast[metrics]"``. The constructor takes the words of torchmetrics'
``LearnedPerceptualImagePatchSimilarity``, and the class stands in for it, also by that name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .comparison.masks import MaskMode
from .comparison.options import check_choice
from .features import Features
from .lpips import LPIPS, Version
from .normalization import ModelNormalization

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError('the metric needs torchmetrics: pip install "lpips-fast[metrics]"') from error

__all__ = ["LPIPSMetric", "LearnedPerceptualImagePatchSimilarity"]


class LPIPSMetric(Metric):
    """LPIPS between two sets of images, batch by batch.

    Differences from torchmetrics' own: the state is two numbers unless ``reduction="none"``, so
    that it does not grow and a distributed sum is all that is exchanged; a batch of one image
    works with every reduction; values outside the range are let through, as LPIPS does, unless
    ``check_inputs`` asks for a warning, which costs a synchronisation on GPUs; and vectors are
    normalised as by the original, by their norm + 1e-10, so that numbers differ by some 1e-6.

    Args:
        net_type: trunk, ``'alex'`` (default), ``'vgg'`` or ``'squeeze'``.
        reduction: ``'mean'`` (default) or ``'sum'`` over all images, or ``'none'`` or ``None`` for
            one distance an image, in the order in which they came (of several processes, one
            process after the other).
        normalize: images are in [0, 1] instead of [-1, 1].
        version, lpips, weights, dtype, max_batch, check_inputs, layers, normalization: as for
            :class:`LPIPS`.
        mask_mode, fill_value: what a mask of :meth:`update` means, as for :meth:`LPIPS.forward`.
        kwargs: of :class:`torchmetrics.Metric`, for example ``sync_on_compute``.

    ``update(img1, img2, mask=None)`` takes (N, 3, H, W) each, and either may be :class:`Features`;
    a mask is (H, W) or (1 or N, 1, H, W), and the mean is that of images, however much of them is
    masked. Under torchmetrics' ``BootStrapper``, which draws from all that it is given, pass one
    mask an image. ``compute()`` returns a scalar, or without a reduction one distance an image
    (N in all,), of which torchmetrics makes a scalar where there is but one. ``forward`` returns
    the batch's value, with a graph where the images want a gradient. Before any ``update``,
    ``compute`` warns as torchmetrics' metrics do, and the mean is NaN, the sum 0; without a
    reduction there is nothing to concatenate, a ValueError.

    Sums are float64. A device without it, as ``mps``, needs ``metric.set_dtype(torch.float32)``
    before ``metric.to("mps")``.

    Raises:
        ValueError: an unknown net or reduction, or images that do not fit, as :class:`LPIPS`.

    >>> metric = LPIPSMetric("squeeze", normalize=True)      # doctest: +SKIP
    >>> for output, target in loader:                        # doctest: +SKIP
    ...     metric.update(output, target)
    >>> metric.compute()                                     # doctest: +SKIP
    tensor(0.1376)
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    feature_network = "net"  # what torchmetrics.wrappers.FeatureShare shares

    total: Tensor
    count: Tensor
    distances: list[Tensor]

    def __init__(
        self,
        net_type: Literal["alex", "vgg", "squeeze"] = "alex",
        reduction: Literal["mean", "sum", "none"] | None = "mean",
        normalize: bool = False,
        *,
        version: Version = "0.1",
        lpips: bool = True,
        weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        max_batch: int | None = None,
        check_inputs: bool = False,
        layers: Sequence[int] | None = None,
        normalization: ModelNormalization = "l2",
        mask_mode: MaskMode = "weighted",
        fill_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if reduction not in ("mean", "sum", "none", None):
            raise ValueError(
                f"unknown reduction {reduction!r}; expected 'mean', 'sum', 'none' or None"
            )
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize is {normalize!r}, expected True or False")
        check_choice("mask_mode", mask_mode, get_args(MaskMode))
        self.reduction = reduction
        self.normalize = normalize
        self.mask_mode: MaskMode = mask_mode
        self.fill_value = fill_value
        self.net = LPIPS(
            net=net_type,
            version=version,
            lpips=lpips,
            weights=weights,
            dtype=dtype,
            max_batch=max_batch,
            check_inputs=check_inputs,
            layers=layers,
            normalization=normalization,
            verbose=False,
        ).requires_grad_(False)
        if reduction in ("none", None):
            self.add_state("distances", default=[], dist_reduce_fx="cat")
        else:
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state("total", default=zero, dist_reduce_fx="sum")
            self.add_state(
                "count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum"
            )

    def train(self, mode: bool = True) -> LPIPSMetric:
        """The network stays in evaluation mode: its dropout has no place in a measurement."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = super().forward(*args, **kwargs)
        if self.reduction in ("none", None):
            # The value may have a graph; kept with every batch it would fill the memory.
            self.distances[-1] = self.distances[-1].detach()
        return value

    def update(
        self, img1: Tensor | Features, img2: Tensor | Features, mask: Tensor | None = None
    ) -> None:
        masking: dict[str, Any] = {}
        if mask is not None:
            masking = {"mask": mask, "mask_mode": self.mask_mode, "fill_value": self.fill_value}
        distances = self.net(img1, img2, normalize=self.normalize, **masking).flatten()
        if self.reduction in ("none", None):
            self.distances.append(distances)
        else:
            self.total = self.total + distances.sum(dtype=self.total.dtype)
            self.count = self.count + len(distances)

    def compute(self) -> Tensor:
        if self.reduction in ("none", None):
            return dim_zero_cat(self.distances)
        value = self.total / self.count if self.reduction == "mean" else self.total
        return value.float()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value of :meth:`compute`, or values of several calls; as torchmetrics does."""
        return self._plot(val, ax)


#: By the name that torchmetrics has for it: the import is all that changes in a program.
LearnedPerceptualImagePatchSimilarity = LPIPSMetric
