"""LPIPS as the squared Euclidean distance of vectors, for a vector index.

With ``phi(x)`` the concatenation over layers of ``sqrt(w / (H W))`` times the channel-L2 normalised
features, ``LPIPS(x, y) = |phi(x) - phi(y)|²``: equation 1 of Zhang et al., CVPR 2018, with the
weight taken into the square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..comparison.calls import lins_are_linear
from ..composed import EPS, accumulator_dtype
from ..trunk.table import Conv, Fire, Layer, output_size, trunk_spec
from .sources import Images, ImageSource, as_index

if TYPE_CHECKING:
    from ..lpips import LPIPS


def embed(
    model: LPIPS,
    x: Images,
    *,
    normalize: bool = False,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    max_batch: int = 16,
) -> Tensor:
    """phi of images: vectors whose squared Euclidean distance is LPIPS, for a vector index.

    The vectors are as long as all taps together (:func:`embedding_size`): 31,872 for alex at 64x64
    pixels, 640,128 at 256x256; 7,995,392 for vgg there. Embed small images, or fewer layers, or let
    the index reduce the dimension.

    Args:
        model: the model; ``spatial``, negative weights, active dropout and a normalisation other
            than ``l2`` are refused.
        x: images of one size, as for :func:`lpips_fast.pairwise.pairwise`.
        normalize: tensors are in [0, 1].
        layers: indices of the layers to keep, in the order wanted, among those that the model
            compares; ``None``: all of these. Each layer's part of the distance is at least 0, so
            distances of fewer layers are lower bounds of LPIPS.
        dtype: of the vectors, for example ``torch.float16`` for half the memory, at an error of
            about 1e-4 of a usual distance; ``None``: float32 (float64 for float64).
        max_batch: images that go through the trunk at a time.

    Returns:
        (N, D) on the model's device: one layer after the other, within a layer by row, column and
        channel. No graph is kept.

    Raises:
        ValueError, TypeError: as :func:`lpips_fast.pairwise.pairwise`, and for a layer that the
            trunk does not have.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> embed(model, torch.rand(3, 3, 64, 64), normalize=True).shape
    torch.Size([3, 31872])
    """
    source = ImageSource("x", x, model, normalize)
    chosen = _chosen(model, layers)
    sizes = [tap_sizes(model.net_name, source.size)[layer] for layer in chosen]
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    vectors = torch.empty(len(source), ends[-1], dtype=dtype or source.dtype, device=source.device)
    with torch.no_grad():
        embedding = Embedding(model)
        for first in range(0, len(source), max_batch):
            part = range(first, min(first + max_batch, len(source)))
            for position, (layer, tap) in enumerate(zip(model.layers, source.taps(part))):
                for kept, size, end in zip(chosen, sizes, ends):
                    if kept == layer:
                        vectors[as_index(part), end - size : end] = embedding(position, tap)
                if layer == max(chosen):
                    break  # the rest of the trunk is not needed
    return vectors


def embedding_size(
    model: LPIPS, image_size: tuple[int, int], layers: Sequence[int] | None = None
) -> int:
    """The length of the vectors that :func:`embed` returns for images of (height, width).

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> embedding_size(model, (256, 256)), embedding_size(model, (256, 256), layers=[3, 4])
    (640128, 115200)
    """
    sizes = tap_sizes(model.net_name, image_size)
    return sum(sizes[layer] for layer in _chosen(model, layers))


def _chosen(model: LPIPS, layers: Sequence[int] | None) -> Sequence[int]:
    chosen = list(model.layers if layers is None else layers)
    if not chosen or any(layer not in model.layers for layer in chosen):
        compared = "0 to " + str(model.L - 1)
        if len(model.layers) < model.L:
            compared = f"of which the model compares {', '.join(map(str, model.layers))}"
        raise ValueError(
            f"layers is {chosen}, expected indices of the layers of {model.pnet_type!r}, {compared}"
        )
    return chosen


def euclidean_weights(model: LPIPS) -> list[Tensor] | None:
    """Weights (C,) per compared layer, ``None`` for the baseline; an error where phi is not."""
    if model.spatial:
        raise ValueError(
            "a vector, and so one number a pair, is needed, but the model returns maps: "
            "make it with spatial=False"
        )
    if model.normalization != "l2":
        raise ValueError(
            f"all pairs and vectors are made with normalization='l2', but the model has "
            f"{model.normalization!r}: compare its images pair by pair with model(in0, in1)"
        )
    if not model.lpips:
        return None
    if not lins_are_linear(model):
        raise ValueError(
            "the model's linear layers do more than weigh channels (see model.fast_path()); in "
            "training mode they drop channels at random: call model.eval() first"
        )
    weights = [model.layer_weight(layer).detach() for layer in model.layers]
    for layer, weight in zip(model.layers, weights):
        if not bool((weight >= 0).all()):
            raise ValueError(
                f"layer {layer} has a negative or NaN weight ({weight.min().item():.3g}), with "
                "which LPIPS is no Euclidean distance; load learned weights, or clamp them to 0"
            )
    return weights


class Embedding:
    """phi of a model, one layer at a time.

    >>> import lpips_fast
    >>> model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    >>> Embedding(model)(0, torch.rand(2, 64, 15, 15)).shape
    torch.Size([2, 14400])
    """

    def __init__(self, model: LPIPS) -> None:
        weights = euclidean_weights(model)
        self.roots = None if weights is None else [weight.sqrt() for weight in weights]

    def __call__(self, position: int, tap: Tensor, out: Tensor | None = None) -> Tensor:
        """A tap (N, C, H, W) to (N, H W C), in the accumulator's dtype.

        Args:
            position: of the tap's layer among those that the model compares.
            out: where to write it, contiguous.
        """
        images, channels, height, width = tap.shape
        positions = tap.permute(0, 2, 3, 1)  # of channels-last memory, so that nothing is copied
        dtype = accumulator_dtype(tap.dtype)
        norms = torch.linalg.vector_norm(positions, dim=-1, keepdim=True, dtype=dtype)
        scale = (norms + EPS).reciprocal_().mul_(1 / math.sqrt(height * width))
        if out is None:
            out = scale.new_empty(images, height * width * channels)
        phi = torch.mul(positions, scale, out=out.view(positions.shape))
        if self.roots is not None:
            phi *= self.roots[position].to(dtype)
        return out


def tap_sizes(net: str, image_size: tuple[int, int]) -> list[int]:
    """Elements of every tap of one image of (height, width).

    >>> tap_sizes("alex", (64, 64))
    [14400, 9408, 3456, 2304, 2304]
    """
    taps = trunk_spec(net).taps.values()
    outputs = [elements for _, elements in layer_outputs(net, image_size)]
    return [outputs[index] for index in taps]


def layer_outputs(net: str, image_size: tuple[int, int]) -> Iterator[tuple[Layer, int]]:
    """Every layer of a trunk, and the elements of its output for one image of (height, width)."""
    channels, (height, width) = 3, image_size
    for layer in trunk_spec(net).layers:
        height, width = output_size(layer, height), output_size(layer, width)
        if isinstance(layer, Conv):
            channels = layer.channels
        elif isinstance(layer, Fire):
            channels = 2 * layer.expand
        yield layer, channels * height * width
