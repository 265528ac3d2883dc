"""LPIPS, the module: a drop-in for ``lpips.LPIPS`` 0.1.4."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from . import pretrained_networks as pn
from .comparison.arguments import as_argument, as_image
from .comparison.calls import fast_path, prepare_call
from .comparison.frozen import freeze, hide_weights
from .comparison.linear import (
    NetLinLayer,
    add_linear_layers,
    layer_weight,
    load_linear_weights,
    load_trunk,
)
from .comparison.masked_layers import as_filled_to_encode, masked_layer_distances
from .comparison.masks import MaskMode
from .comparison.negative_weights import NegativeWeightsNotice
from .comparison.options import Net, Reduction, Version, announce, check_options, in_words
from .comparison.routes import layer_distances
from .comparison.scaling import ScalingLayer
from .comparison.spatial import spatial_average, upsample
from .compat import DSSIM, L2, BCERankingLoss, Dist2LogitLayer, FakeNet, print_network
from .features import Features
from .many_images import ManyImages
from .normalization import ModelNormalization, normalize_tensor
from .notices import RangeNotice
from .trunk import Trunk, architecture, check_layers, minimum_size, tap_channels
from .trunk.packing import forget
from .weights import lpips_state_dict, read_state_dict

# Beside what is made here, the names that scripts import from the original's submodule.
__all__ = [
    "DSSIM",
    "L2",
    "LPIPS",
    "BCERankingLoss",
    "Dist2LogitLayer",
    "FakeNet",
    "Net",
    "NetLinLayer",
    "Reduction",
    "ScalingLayer",
    "Version",
    "normalize_tensor",
    "pn",
    "print_network",
    "spatial_average",
    "upsample",
]


class LPIPS(ManyImages, nn.Module):
    """Learned Perceptual Image Patch Similarity (Zhang et al., CVPR 2018).

    The first eleven arguments and their defaults are those of ``lpips.LPIPS`` 0.1.4; so are the
    attributes and the keys of the state dict, and a checkpoint of either loads in the other.

    Args:
        pretrained: load the linear weights learned from human judgements.
        net: trunk, ``'alex'`` (default), ``'vgg'`` (also ``'vgg16'``) or ``'squeeze'``.
        version: ``'0.1'``, or ``'0.0'`` for the first release, whose images were not scaled.
        lpips: use the linear weights; ``False`` is the paper's baseline (all weights 1).
        spatial: return a distance map at the images' resolution instead of its mean.
        pnet_rand: random trunk instead of ImageNet's.
        pnet_tune: let the trunk learn.
        use_dropout: dropout on the linear layers in training mode.
        model_path: a file of linear weights, or a whole checkpoint, to load instead.
        eval_mode: start in ``eval()``.
        verbose: print what is set up.
        weights: where the trunk's weights come from: a file, a folder or a state dict. ``None``
            searches, and at last downloads (see :mod:`lpips_fast.weights`). Linear weights in the
            same checkpoint are used too, unless ``model_path`` names others. A trunk has the widths
            of its checkpoint (:mod:`lpips_fast.compression` makes narrow ones).
        reduction: ``'none'`` returns one distance an image, as the original does; ``'mean'`` and
            ``'sum'`` return one number, ready to be a loss.
        check_inputs: ``None`` looks at the values of the first call alone and warns once of a range
            that is surely wrong. ``True`` looks at every input (a synchronisation on GPUs), warns
            of NaN, infinity and values outside the range that ``normalize`` implies, and refuses
            features that are not of images of their size. ``False`` never looks.
        dtype: run the trunk in ``torch.bfloat16`` or ``torch.float16``, on images of any floating
            dtype; scaling, distances and their sums stay float32.
        max_batch: without a graph, look at no more than so many pairs at a time. Where memory runs
            out on a device that can say so, batches are halved anyway.
        checkpoint: keep only the taps for backward and recompute what lies between them.
        normalization: of the features before they are compared: ``'l2'``, which is LPIPS, has the
            fused kernel, and is what the published weights were learned with; ``'l1'``, ``'max'``,
            ``'std'``, ``'none'``, ``'layer'``, ``'instance'``, ``'batch'`` for experiments (see
            :mod:`lpips_fast.normalization`); or ``'learned'``, ``'l2'`` with a factor and a shift
            on the norm that learn with the linear weights.
        layers: indices of the layers to compare, for example ``(0, 1, 2)``; ``None``: all. The
            trunk runs no further than the last, and the sum over these layers alone is a lower
            bound of LPIPS, and not LPIPS. :attr:`layers`, ``retPerLayer`` and :class:`Features`
            speak of these, ascending; the parameters, :attr:`lins`, :attr:`chns` and :attr:`L` stay
            those of the whole trunk, so that checkpoints load.
        frozen: for a loss inside a module that is trained: whatever happens to that module, the
            loss keeps its weights, learns nothing, drops nothing, and ``parent.state_dict()``
            neither holds nor misses it. See :mod:`lpips_fast.comparison.frozen`.

    Attributes:
        layers: the layers that are compared, ascending.
        minimum_size: the smallest height and width of an image, in pixels.
        chns, L: channels and number of all the trunk's layers, compared or not.
        net_name: of the trunk; ``alex:32,96,192,128,128`` where it is narrow.

    >>> model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    >>> image = torch.rand(2, 3, 64, 64) * 2 - 1
    >>> model(image, image).flatten().tolist()
    [0.0, 0.0]
    """

    lins: nn.ModuleList
    norms: nn.ModuleList

    def __init__(
        self,
        pretrained: bool = True,
        net: Net = "alex",
        version: Version = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | os.PathLike[str] | None = None,
        eval_mode: bool = True,
        verbose: bool = True,
        *,
        weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
        reduction: Reduction = "none",
        check_inputs: bool | None = None,
        dtype: torch.dtype | None = None,
        max_batch: int | None = None,
        checkpoint: bool = False,
        normalization: ModelNormalization = "l2",
        layers: Sequence[int] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        trunk_name: str = "vgg" if net == "vgg16" else net
        self.pnet_type = net
        self.pnet_tune = pnet_tune
        self.pnet_rand = pnet_rand
        self.spatial = spatial
        self.lpips = lpips
        self.version = version
        self.reduction = reduction
        self.check_inputs = check_inputs
        self.dtype = dtype
        self.max_batch = max_batch
        self.checkpoint = checkpoint
        self.normalization = normalization
        self.frozen = frozen
        check_options(self)
        # An unknown net is told before anything is printed or loaded.
        self._chosen_layers = None if layers is None else check_layers(trunk_name, layers)
        self.L = len(tap_channels(trunk_name))
        if verbose:
            announce(self)
        self.minimum_size = minimum_size(trunk_name, self.layers)
        self.scaling_layer = ScalingLayer()
        self._range_notice = RangeNotice()
        self._negative_weights_notice = NegativeWeightsNotice()
        if frozen:  # before others look at what is loaded
            hide_weights(self)

        learned = None
        if lpips and pretrained and model_path is not None:
            learned = lpips_state_dict(read_state_dict(model_path), trunk_name, str(model_path))
        trunk_weights, lin_weights, trunk_name = load_trunk(
            trunk_name, weights, learned, is_random=pnet_rand
        )
        self.net_name = trunk_name
        if verbose and trunk_name != architecture(trunk_name):
            print(f"The trunk is a narrow one, and its distances are not LPIPS: {trunk_name}")
        self.chns = tap_channels(trunk_name)
        self.net = Trunk(trunk_name, trunk_weights, requires_grad=pnet_tune)
        if lpips:
            add_linear_layers(self, use_dropout)
            if pretrained:
                load_linear_weights(self, model_path, learned, lin_weights, verbose)
        if dtype is not None:
            self.net.to(dtype)
        if frozen:
            freeze(self)
        elif eval_mode:
            self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """As of any module; a frozen model stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    # ------------------------------------------------------------------------ what it is now

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are compared, ascending."""
        return tuple(range(self.L)) if self._chosen_layers is None else self._chosen_layers

    def layer_weight(self, layer: int) -> Tensor:
        """The linear weights (C,) of a layer, one a channel; ones in the baseline."""
        return layer_weight(self, layer)

    def fast_path(self) -> dict[str, str]:
        """Of every part, whether it runs fast as things are, or the first reason why not.

        The fast path computes what calling the modules one by one would, and is taken only where
        that is certain; a part that is hooked, replaced or reconfigured is called as a module.

        Returns:
            ``"yes"`` or a reason, for the scaling layer, every slice, and the linear layers.

        >>> LPIPS(pnet_rand=True, verbose=False).fast_path()["slice1"]
        'yes'
        """
        return fast_path(self)

    def repack(self) -> None:
        """Has what was packed of the trunk's weights made anew by the next call.

        For code that writes single weights behind torch's back; a write to a whole filter is seen.
        """
        forget(self.parameters())

    def encode(
        self,
        images: Tensor,
        normalize: bool = False,
        *,
        mask: Tensor | None = None,
        mask_mode: MaskMode = "fill",
        fill_value: float = 0.0,
    ) -> Features:
        """Features of images, for :meth:`distance` or as an argument of :meth:`forward`.

        A fixed target is encoded once and compared as often as wanted; detach it, or encode it
        under ``torch.no_grad()``, unless its gradient is wanted.

        Args:
            images: as in :meth:`forward`.
            normalize: images are in [0, 1].
            mask, fill_value: encode the images with this value outside the mask, as ``forward``
                with ``mask_mode="fill"`` does. A mask that weights belongs to the comparison.

        >>> model = LPIPS(pnet_rand=True, verbose=False)
        >>> target = model.encode(torch.zeros(1, 3, 64, 64))
        >>> model(torch.zeros(1, 3, 64, 64), target).item()
        0.0
        """
        image = as_image(self, "images", images, normalize)
        if mask is not None:
            image = as_filled_to_encode(self, image, normalize, mask, mask_mode, fill_value)
        return prepare_call(self, [image], normalize).encode(image)

    # ------------------------------------------------------------------------------- distance

    def _reduce(self, value: Tensor) -> Tensor:
        if self.reduction == "mean":
            return value.mean()
        return value.sum() if self.reduction == "sum" else value

    @overload
    def forward(
        self,
        in0: Tensor | Features,
        in1: Tensor | Features,
        retPerLayer: Literal[False] = False,
        normalize: bool = False,
        *,
        mask: Tensor | None = None,
        mask_mode: MaskMode = "weighted",
        fill_value: float = 0.0,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        in0: Tensor | Features,
        in1: Tensor | Features,
        retPerLayer: Literal[True],
        normalize: bool = False,
        *,
        mask: Tensor | None = None,
        mask_mode: MaskMode = "weighted",
        fill_value: float = 0.0,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward(
        self,
        in0: Tensor | Features,
        in1: Tensor | Features,
        retPerLayer: bool,
        normalize: bool = False,
        *,
        mask: Tensor | None = None,
        mask_mode: MaskMode = "weighted",
        fill_value: float = 0.0,
    ) -> Tensor | tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        in0: Tensor | Features,
        in1: Tensor | Features,
        retPerLayer: bool = False,
        normalize: bool = False,
        *,
        mask: Tensor | None = None,
        mask_mode: MaskMode = "weighted",
        fill_value: float = 0.0,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Distance between two images, or two batches of images, or the masked part of them.

        Args:
            in0, in1: (N, 3, H, W) RGB in [-1, 1]; (N, 1, H, W) is taken for gray, (3, H, W) for a
                batch of one, and a batch of one is compared with every image of the other. Height
                and width are at least :attr:`minimum_size`. Either may be :class:`Features`, as
                :meth:`encode` returns them, at no cost but the comparison.
            retPerLayer: also return the list of each layer's part, whose sum is the distance.
            normalize: images are in [0, 1].
            mask: what counts, (H, W) or (1 or N, 1, H, W) at the images' size: bool, or floating
                point that is nowhere negative. Each image's mask is above 0 somewhere.
            mask_mode: ``"weighted"``: every layer's distance is averaged with the mask as weights,
                ``sum(w d) / sum(w)``, w at a position being the mean of the mask over its cell of
                the image. Around the mask, as far as the network sees, the images still count. With
                ``spatial`` the map is multiplied by the mask. ``"fill"``: both images get
                ``fill_value`` wherever the mask is 0, and the distance is the plain one; nothing
                outside counts. See :mod:`lpips_fast.comparison.masks`.
            fill_value: in [-1, 1], also with ``normalize``.

        Returns:
            (N, 1, 1, 1), or with ``spatial`` maps (N, 1, H, W), or a scalar under ``reduction``;
            float32 for images of float32 and lower precision, float64 for float64.

        Raises:
            ValueError: shapes or devices that do not fit, images too small for the trunk,
                features of another trunk or of other layers, features that should be filled, or a
                mask that is empty, negative or not finite (its values are looked at in eager calls,
                which costs GPUs a synchronisation; elsewhere, and there with
                ``check_inputs=False``, such a mask makes the distance NaN).
            TypeError: integers, or dtypes that differ from each other or from the model's.
        """
        pair = [as_argument(self, "in0", in0, normalize), as_argument(self, "in1", in1, normalize)]
        if self.check_inputs is None:
            self._range_notice.look(pair, normalize)
        if self.lpips and not self.frozen and torch.is_grad_enabled():
            self._negative_weights_notice.look(self.lins)
        if mask is None:
            layers = layer_distances(self, pair[0], pair[1], normalize)
        else:
            layers = masked_layer_distances(self, pair, normalize, mask, mask_mode, fill_value)
        value = self._reduce(functools.reduce(torch.add, layers))
        return (value, [self._reduce(layer) for layer in layers]) if retPerLayer else value

    if TYPE_CHECKING:
        __call__ = forward

    @overload
    def distance(
        self,
        features0: Features,
        features1: Features,
        retPerLayer: Literal[False] = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def distance(
        self,
        features0: Features,
        features1: Features,
        retPerLayer: Literal[True],
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def distance(
        self,
        features0: Features,
        features1: Features,
        retPerLayer: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """:meth:`forward` on features that :meth:`encode` returned; a mask weights positions."""
        return self(features0, features1, retPerLayer, mask=mask)

    def extra_repr(self) -> str:
        """How the number is made, as part of ``repr(model)``."""
        return in_words(self)
