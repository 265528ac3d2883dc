"""LPIPS, the module: a drop-in for ``lpips.LPIPS`` 0.1.4."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, gradient_scaling, kernels, slice_distance
from .composed import accumulator_dtype
from .features import Features
from .inputs import as_rgb_batch, check_features, check_same_size, common_batch, warn_of_values
from .normalization import Normalization, check_normalization
from .trunk.modules import Slice, Trunk
from .trunk.table import check_layers, minimum_size, tap_channels, tap_shapes, trunk_spec
from .weights import WeightsError, load_lin_weights, load_trunk_weights, read_state_dict

if TYPE_CHECKING:
    from .pairs.sources import Images

VERSIONS = ("0.0", "0.1")
REDUCTIONS = ("none", "mean", "sum")

# Elements of an image batch from which taps are compared one by one, each in a call of its own;
# below, memory is no concern and one call for all layers is faster.
_STREAMED_FROM = 3 * 128 * 128


def spatial_average(in_tens: Tensor, keepdim: bool = True) -> Tensor:
    """Mean over positions: (N, C, H, W) to (N, C, 1, 1), or to (N, C) without ``keepdim``."""
    return in_tens.mean([2, 3], keepdim=keepdim)


def upsample(in_tens: Tensor, out_HW: tuple[int, int] = (64, 64)) -> Tensor:
    """Bilinear resize of (N, C, h, w) to (N, C, *out_HW), corners not aligned."""
    return F.interpolate(in_tens, size=tuple(out_HW), mode="bilinear", align_corners=False)


class ScalingLayer(nn.Module):
    """Takes images from [-1, 1] to the mean and deviation of ImageNet that the trunks expect."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, inp: Tensor) -> Tensor:
        return (inp - self.shift) / self.scale

    def batch(
        self, images: Sequence[Tensor], unit_range: bool, dtype: torch.dtype, version: str = "0.1"
    ) -> Tensor:
        """Batches of images one behind the other, scaled, channels-last, as ``dtype``.

        Args:
            images: (N_k, 3, H, W) each, of one size.
            unit_range: the images are in [0, 1] instead of [-1, 1].
            version: the first release, 0.0, fed images to the trunk unscaled.

        Returns:
            (sum of N_k, 3, H, W). The same numbers as by :meth:`forward`, in one pass over memory
            where there is a kernel for it: on the CPU and on CUDA.
        """
        if kernels.is_eager() and kernels.has_trunk_kernels(self.shift.device):
            shift, scale = self.shift, self.scale
            if version == "0.0":
                shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
            return torch.ops.lpips_fast.scale_images(list(images), shift, scale, unit_range, dtype)
        together = images[0] if len(images) == 1 else torch.cat(tuple(images))
        if unit_range:
            together = 2 * together - 1
        scaled = together if version == "0.0" else self(together)
        return scaled.to(dtype, memory_format=torch.channels_last)


class NetLinLayer(nn.Module):
    """One layer's weights per channel, as a 1x1 convolution behind an optional dropout."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*layers, nn.Conv2d(chn_in, chn_out, 1, bias=False))

    @property
    def weight(self) -> Tensor:
        """(chn_out, chn_in, 1, 1)."""
        return self.model[-1].weight  # type: ignore[return-value]

    @property
    def drops(self) -> bool:
        """Whether a call would drop channels at random, which no fused kernel does."""
        dropout = self.model[0]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
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
            searches, and at last downloads (see :mod:`lpips_fast.weights`).
        reduction: ``'none'`` returns one distance an image, as the original does; ``'mean'`` and
            ``'sum'`` return one number, ready to be a loss.
        check_inputs: look at the values of every input and warn of NaN, infinity, and values
            outside the range that ``normalize`` implies; of features, warn of NaN and infinity,
            and refuse those that are not of images of their size. It costs a synchronisation on
            GPUs.
        dtype: run the trunk in ``torch.bfloat16`` or ``torch.float16``, on images of any floating
            dtype; scaling, distances and their sums stay float32.
        max_batch: without a graph, look at no more than so many pairs at a time. Where memory runs
            out on a device that can say so, batches are halved anyway.
        checkpoint: keep only the taps for backward and recompute what lies between them.
        normalization: of the features before they are compared: ``'l2'``, which is LPIPS and has
            the fused kernel, or ``'l1'``, ``'max'``, ``'std'``, ``'none'``, for experiments (see
            :mod:`lpips_fast.normalization`). The published weights were learned with ``'l2'``.
        layers: indices of the layers to compare, for example ``(0, 1, 2)``; the trunk runs no
            further than the last of them, from images as small as that part can take. The result
            is the sum over these layers alone: a lower bound of LPIPS (its weights are not
            negative), and not LPIPS. ``None``: all. Everything that speaks of layers speaks of
            these, in ascending order (:attr:`layers`, ``retPerLayer``, :class:`Features`), while
            the parameters, :attr:`lins`, :attr:`chns` and :attr:`L` stay those of the whole trunk,
            so that checkpoints load.

    Attributes:
        layers: the layers that are compared, ascending.
        minimum_size: the smallest height and width of an image, in pixels.
        chns, L: channels and number of all the trunk's layers, compared or not.

    >>> model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    >>> image = torch.rand(2, 3, 64, 64) * 2 - 1
    >>> model(image, image).flatten()
    tensor([0., 0.])
    """

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
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
        reduction: Literal["none", "mean", "sum"] = "none",
        check_inputs: bool = False,
        dtype: torch.dtype | None = None,
        max_batch: int | None = None,
        checkpoint: bool = False,
        normalization: Normalization = "l2",
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}; expected one of {', '.join(VERSIONS)}")
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}"
            )
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        check_normalization(normalization)
        trunk_name = "vgg" if net == "vgg16" else net
        trunk_spec(trunk_name)  # an unknown net is told before anything is printed or loaded
        self.layers = check_layers(trunk_name, layers)
        if verbose:
            print(
                f"Setting up [{'LPIPS' if lpips else 'baseline'}] perceptual loss: "
                f"trunk [{net}], v[{version}], spatial [{'on' if spatial else 'off'}]"
                + (f", normalization [{normalization}]" if normalization != "l2" else "")
                + (f", layers {list(self.layers)}" if layers is not None else "")
            )
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
        self.scaling_layer = ScalingLayer()
        self.chns = tap_channels(trunk_name)
        self.L = len(self.chns)
        self.minimum_size = minimum_size(trunk_name, self.layers)

        trunk_weights = None if pnet_rand else load_trunk_weights(trunk_name, weights)
        self.net = Trunk(trunk_name, trunk_weights, requires_grad=pnet_tune)
        if lpips:
            for k, channels in enumerate(self.chns):
                self.add_module(f"lin{k}", NetLinLayer(channels, use_dropout=use_dropout))
            # The same modules again under `lins`, as in the original, whose checkpoints hold both.
            self.lins = nn.ModuleList(getattr(self, f"lin{k}") for k in range(self.L))
            self.register_load_state_dict_pre_hook(_rename_lin_weights)
            if pretrained:
                self._load_lin_weights(trunk_name, model_path, verbose)
        if dtype is not None:
            self.net.to(dtype)
        if eval_mode:
            self.eval()

    def _load_lin_weights(
        self, trunk_name: str, model_path: str | os.PathLike[str] | None, verbose: bool
    ) -> None:
        if model_path is None:
            state_dict = load_lin_weights(trunk_name, self.version)
            source = f"the linear weights of lpips {self.version}, packaged"
        else:
            state_dict = _unwrapped(read_state_dict(Path(model_path)), model_path)
            source = str(Path(model_path).resolve())
        if verbose:
            print(f"Loading model from: {source}")
        missing, _ = self.load_state_dict(state_dict, strict=False)
        without = [key for key in missing if key.startswith("lin")]
        if without:
            raise WeightsError(
                f"{source} holds no linear weights for trunk {trunk_name} "
                f"(missing {without[0]!r}); expected keys like 'lin0.model.1.weight'"
            )

    # ----------------------------------------------------------------------------- features

    def _image(self, name: str, image: Tensor, normalize: bool) -> Tensor:
        """An argument as an image that the scaling layer takes, or an error that says why not."""
        image = as_rgb_batch(
            name,
            image,
            like=self.scaling_layer.shift,
            any_dtype=self.dtype is not None,
            minimum_size=self.minimum_size,
            trunk=self.pnet_type,
        )
        if self.check_inputs:
            warn_of_values(name, image, normalize)
        return image

    def _features(self, name: str, features: Features) -> Features:
        """An argument as features that this model compares, or an error that says why not."""
        check_features(
            name,
            features,
            net=self.net.net_name,
            layers=self.layers,
            channels=self.chns,
            device=self.scaling_layer.shift.device,
            look=self.check_inputs,
        )
        return features

    def _batch(self, images: Sequence[Tensor], normalize: bool) -> Tensor:
        dtype = self.dtype or self.scaling_layer.shift.dtype
        return self.scaling_layer.batch(images, normalize, dtype, self.version)

    def _taps(self, images: Sequence[Tensor], normalize: bool) -> Iterator[Tensor]:
        return self.net.taps(self._batch(images, normalize), self.checkpoint, self.layers)

    def _needs_graph(self, image: Tensor | Features) -> bool:
        if not torch.is_grad_enabled():
            return False
        if isinstance(image, Features):
            return any(tap.requires_grad for tap in image.taps)
        return image.requires_grad or self.net.learns()

    def _encode(self, image: Tensor, normalize: bool) -> Features:
        taps = tuple(self._taps([image], normalize))
        return Features(taps, _size(image), self.net.net_name, self.layers)

    def encode(self, images: Tensor, normalize: bool = False) -> Features:
        """Features of images, for :meth:`distance` or as an argument of :meth:`forward`.

        A fixed target is encoded once and compared as often as wanted; detach it, or encode it
        under ``torch.no_grad()``, unless its gradient is wanted.

        Args:
            images: as in :meth:`forward`.
            normalize: images are in [0, 1].

        >>> model = LPIPS(pnet_rand=True, verbose=False)
        >>> target = model.encode(torch.zeros(1, 3, 64, 64))
        >>> model(torch.zeros(1, 3, 64, 64), target).item()
        0.0
        """
        return self._encode(self._image("images", images, normalize), normalize)

    # ----------------------------------------------------------------------------- distance

    def _lin(self, layer: int) -> NetLinLayer:
        return getattr(self, f"lin{layer}")

    def _drops(self) -> bool:
        return self.lpips and any(self._lin(k).drops for k in self.layers)

    def _per_layer(
        self,
        taps0: Sequence[Tensor],
        taps1: Sequence[Tensor],
        size: tuple[int, int],
        weights: Sequence[Tensor] | None,
        first: int = 0,
    ) -> list[Tensor]:
        """One tensor a layer: (N, 1, 1, 1), or (N, 1, H, W) for ``spatial``.

        The taps are those of ``self.layers[first]`` and of the layers that follow there; the
        weights, as :meth:`_lin_weights` gives them, those of all layers.
        """
        layers = self.layers[first : first + len(taps0)]
        if self._drops():
            lins = [self._lin(k) for k in layers]
            normal0, normal1 = (
                [functional.normalize_features(tap, self.normalization) for tap in taps]
                for taps in (taps0, taps1)
            )
            maps = [lin((a - b) ** 2) for lin, a, b in zip(lins, normal0, normal1)]
            if not self.spatial:
                return [spatial_average(m) for m in maps]
        else:
            if weights is not None:
                weights = weights[first : first + len(taps0)]
            if not self.spatial:
                distances = functional.distance(
                    taps0, taps1, weights, normalization=self.normalization
                )
                return [d.view(-1, 1, 1, 1) for d in distances.unbind(dim=1)]
            maps = functional.distance_map(taps0, taps1, weights, normalization=self.normalization)
        return [upsample(m, size) for m in maps]

    def _layers_in_one_pass(
        self, in0: Tensor, in1: Tensor, normalize: bool, weights: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Every layer's distance of two images that both need a graph, or both none."""
        size = _size(in0)
        if self._needs_graph(in0) or in0.numel() < _STREAMED_FROM or not kernels.is_eager():
            split = [len(in0), len(in1)]
            taps = self._taps((in0, in1), normalize)
            pairs = [_broadcast(*tap.split(split)) for tap in taps]
            return self._per_layer([a for a, _ in pairs], [b for _, b in pairs], size, weights)
        # A tap is consumed as soon as it exists, and its memory goes back.
        layers: list[Tensor] = []
        for a, b in self._streamed_taps(in0, in1, normalize):
            layers += self._per_layer([a], [b], size, weights, first=len(layers))
            del a, b
        return layers

    def _streamed_taps(
        self, in0: Tensor, in1: Tensor, normalize: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The taps of two images, layer by layer."""
        if in0.device.type == "cpu":
            # Side by side: large as they are, nothing is gained by one batch of both, and twice
            # the memory would be in use at a time.
            taps0, taps1 = (self._taps([image], normalize) for image in (in0, in1))
            for _ in self.layers:  # not by zip, which holds on to what it gave last
                yield _broadcast(next(taps0), next(taps1))
        else:
            for tap in self._taps((in0, in1), normalize):
                yield _broadcast(*tap.split([len(in0), len(in1)]))
                del tap

    def _layers_of_features(
        self, features0: Features, features1: Features, weights: Sequence[Tensor] | None
    ) -> list[Tensor]:
        check_same_size(features0.image_size, features1.image_size)
        pairs = [_broadcast(a, b) for a, b in zip(features0.taps, features1.taps, strict=True)]
        taps0, taps1 = [a for a, _ in pairs], [b for _, b in pairs]
        return self._per_layer(taps0, taps1, features0.image_size, weights)

    def _lin_weights(self) -> list[Tensor] | None:
        """The linear weights of every compared layer, None for the baseline."""
        return [self._lin(k).weight for k in self.layers] if self.lpips else None

    def _channel_weights(self, like: Tensor, weights: Sequence[Tensor] | None) -> list[Tensor]:
        """(C_l,) of every compared layer, as the operators take them beside features ``like``."""
        dtype = accumulator_dtype(like.dtype)
        if weights is None:
            return [like.new_ones(self.chns[k], dtype=dtype) for k in self.layers]
        return [weight.view(-1).to(dtype) for weight in weights]

    def _layers_to_target(
        self,
        image: Tensor | Features,
        target: Tensor | Features,
        normalize: bool,
        weights: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Every layer's distance of images that need a graph to a target that needs none."""
        x = self._batch([image], normalize) if isinstance(image, Tensor) else None
        fused = self.normalization == "l2" and not self.checkpoint and not self._drops()
        if x is None or not fused or not slice_distance.takes(self.net, x):
            return self._layers_of_features(
                self._encode(image, normalize) if isinstance(image, Tensor) else image,
                self._encoded_target(target, normalize),
                weights,
            )
        assert isinstance(image, Tensor)
        blocks = self.net.slices()[: self.layers[-1] + 1]
        is_small = x.numel() < _STREAMED_FROM and len(blocks) == len(self.layers)
        if is_small and isinstance(target, Tensor) and len(target) == len(x):
            with torch.no_grad():
                together = [torch.cat((x, self._batch([target], normalize)))]
            targets = [together] * len(blocks)
            return self._slice_distances(x, _size(image), blocks, targets, weights)

        target = self._encoded_target(target, normalize)
        if len(target) != len(x) or any(tap.dtype != x.dtype for tap in target.taps):
            return self._layers_of_features(self._encode(image, normalize), target, weights)
        check_same_size(_size(image), target.image_size)
        taps = dict(zip(self.layers, target.taps))
        targets = [taps.get(k) for k in range(len(blocks))]
        return self._slice_distances(x, _size(image), blocks, targets, weights)

    def _encoded_target(self, target: Tensor | Features, normalize: bool) -> Features:
        with torch.no_grad():
            return self._encode(target, normalize) if isinstance(target, Tensor) else target

    def _slice_distances(
        self,
        x: Tensor,
        size: tuple[int, int],
        blocks: Sequence[Slice],
        targets: Sequence[Tensor | list[Tensor] | None],
        weights: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Distances of scaled images, slice by slice; a slice without a target only runs."""
        layers = []
        channel_weights = iter(self._channel_weights(x, weights))
        keys = self.net.receptive_fields(x, len(blocks))
        for block, target, of_slice in zip(blocks, targets, keys):
            if target is None:
                x = block(x, of_slice)
                continue
            x, value = slice_distance.slice_distance(
                block, x, target, next(channel_weights), self.spatial, of_slice
            )
            layers.append(upsample(value, size) if self.spatial else value.view(-1, 1, 1, 1))
        return layers

    def _layers(
        self, in0: Tensor | Features, in1: Tensor | Features, normalize: bool
    ) -> list[Tensor]:
        weights = self._lin_weights()
        images = [x for x in (in0, in1) if isinstance(x, Tensor) and x.requires_grad]
        if not images or not self._scales_gradients(in0, in1):
            return self._unscaled_layers(in0, in1, normalize, weights)
        learning = [w for w in weights or () if w.requires_grad]
        entered, token = gradient_scaling.enter([*images, *learning])
        replaced = {id(old): new for old, new in zip([*images, *learning], entered)}
        in0, in1 = (replaced.get(id(x), x) for x in (in0, in1))
        if weights is not None:
            weights = [replaced.get(id(w), w) for w in weights]
        layers = self._unscaled_layers(in0, in1, normalize, weights)
        size = _size(in0) if isinstance(in0, Tensor) else in0.image_size
        shapes = tap_shapes(self.net.net_name, size)
        positions = [float(shapes[k][1] * shapes[k][2]) for k in self.layers]
        if self.spatial:
            positions = [p / (size[0] * size[1]) for p in positions]
        return gradient_scaling.leave(layers, token, positions)

    def _scales_gradients(self, *arguments: Tensor | Features) -> bool:
        """Whether gradients are scaled inside (:mod:`lpips_fast.gradient_scaling`).

        Only where nobody else sees them: no features with a graph, no trunk that learns, no hooks.
        """
        if not torch.is_grad_enabled() or self.net.slices()[0][0].weight.dtype != torch.float16:
            return False
        if torch._C._are_functorch_transforms_active() or kernels.has_tangents():
            return False
        if any(isinstance(x, Features) and self._needs_graph(x) for x in arguments):
            return False
        if self._drops() and any(w.requires_grad for w in self._lin_weights() or ()):
            return False
        if any(p.requires_grad for p in self.net.parameters()):
            return False
        return not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            for module in self.net.modules()
        )

    def _unscaled_layers(
        self,
        in0: Tensor | Features,
        in1: Tensor | Features,
        normalize: bool,
        weights: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        graphs = [self._needs_graph(x) for x in (in0, in1)]
        if isinstance(in0, Tensor) and isinstance(in1, Tensor):
            check_same_size(_size(in0), _size(in1))
            if graphs[0] == graphs[1]:
                return self._layers_in_one_pass(in0, in1, normalize, weights)
        if graphs[0] != graphs[1]:
            image, target = (in0, in1) if graphs[0] else (in1, in0)
            return self._layers_to_target(image, target, normalize, weights)
        features = [self._encode(x, normalize) if isinstance(x, Tensor) else x for x in (in0, in1)]
        return self._layers_of_features(features[0], features[1], weights)

    def _chunked_layers(
        self, in0: Tensor | Features, in1: Tensor | Features, normalize: bool
    ) -> list[Tensor]:
        """:meth:`_layers`, at most ``max_batch`` pairs at a time where no graph is kept."""
        batch = common_batch(len(in0), len(in1))
        limit = self.max_batch or batch
        if batch <= limit or torch.is_grad_enabled():
            try:
                return self._layers(in0, in1, normalize)
            except torch.OutOfMemoryError:
                if torch.is_grad_enabled() or batch < 2:
                    raise
                limit = (batch + 1) // 2
        parts = []
        for first in range(0, batch, limit):
            part = slice(first, first + limit)
            pair = [x if len(x) == 1 and batch > 1 else x[part] for x in (in0, in1)]
            parts.append(self._chunked_layers(pair[0], pair[1], normalize))
        return [torch.cat(layer) for layer in zip(*parts)]

    def _reduce(self, value: Tensor) -> Tensor:
        if self.reduction == "mean":
            return value.mean()
        return value.sum() if self.reduction == "sum" else value

    def forward(
        self,
        in0: Tensor | Features,
        in1: Tensor | Features,
        retPerLayer: bool = False,
        normalize: bool = False,
    ) -> Any:
        """Distance between two images, or two batches of images.

        Args:
            in0, in1: (N, 3, H, W) RGB in [-1, 1]; (N, 1, H, W) is taken for gray, (3, H, W) for a
                batch of one, and a batch of one is compared with every image of the other. Height
                and width are at least :attr:`minimum_size`. Either may be :class:`Features`, as
                :meth:`encode` returns them, at no cost but the comparison.
            retPerLayer: also return the list of each layer's part, whose sum is the distance.
            normalize: images are in [0, 1].

        Returns:
            (N, 1, 1, 1), or with ``spatial`` maps (N, 1, H, W), or a scalar under ``reduction``;
            float32 for images of float32 and lower precision, float64 for float64.

        Raises:
            ValueError: shapes or devices that do not fit, images too small for the trunk, or
                features of another trunk or of other layers.
            TypeError: integers, or dtypes that differ from each other or from the model's.
        """
        pair = [
            self._features(name, x) if isinstance(x, Features) else self._image(name, x, normalize)
            for name, x in (("in0", in0), ("in1", in1))
        ]
        layers = self._chunked_layers(pair[0], pair[1], normalize)
        value = self._reduce(functools.reduce(torch.add, layers))
        return (value, [self._reduce(layer) for layer in layers]) if retPerLayer else value

    def distance(self, features0: Features, features1: Features, retPerLayer: bool = False) -> Any:
        """:meth:`forward` on features that :meth:`encode` returned."""
        return self(features0, features1, retPerLayer)

    def extra_repr(self) -> str:
        """How the number is made, as part of ``repr(model)``."""
        return (
            f"net={self.pnet_type!r}, version={self.version!r}, lpips={self.lpips}, "
            f"normalization={self.normalization!r}"
            + (f", layers={self.layers}" if len(self.layers) < self.L else "")
        )

    # -------------------------------------------------------------------------- many images

    def pairwise(self, X: Images, Y: Images | None = None, **options: Any) -> Tensor:
        """Distances (N, M) between all pairs, from one trunk pass an image instead of a pair.

        See :func:`lpips_fast.pairwise.pairwise` for the arguments.
        """
        from .pairs.all_pairs import pairwise

        return pairwise(self, X, Y, **options)

    def nearest(self, X: Images, gallery: Images, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Distances and positions (N, k) of the k nearest images of a gallery.

        See :func:`lpips_fast.pairwise.nearest` for the arguments.
        """
        from .pairs.all_pairs import nearest

        return nearest(self, X, gallery, k, **options)

    def embed(self, x: Images, **options: Any) -> Tensor:
        """Vectors (N, D) whose squared Euclidean distance is LPIPS, for a vector index.

        See :func:`lpips_fast.embedding.embed` for the arguments.
        """
        from .pairs.embedding import embed

        return embed(self, x, **options)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[2], image.shape[3]


def _broadcast(tap0: Tensor, tap1: Tensor) -> tuple[Tensor, Tensor]:
    """Both for the common batch; one image stands for all without a copy."""
    batch = common_batch(len(tap0), len(tap1))
    # Not where it changes nothing: torch.compile cannot save views of unknown size for backward.
    return tuple(  # type: ignore[return-value]
        tap if len(tap) == batch else tap.expand(batch, -1, -1, -1) for tap in (tap0, tap1)
    )


def _unwrapped(checkpoint: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict without the wrappings that training scripts put around it."""
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(
            f"{path} is no state dict of LPIPS: it holds a {type(checkpoint).__name__}"
        )
    return {str(key).removeprefix("module."): value for key, value in checkpoint.items()}


def _rename_lin_weights(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before loading: linear weights under any name that the original gives them.

    With or without dropout the convolution is ``model.1`` or ``model.0``, and a file may hold
    ``linK``, ``lins.K`` or both. A state dict that holds some but not all of them is an error even
    where loading is not strict: the rest would stay random without a word.
    """
    assert isinstance(module, LPIPS)
    found, absent = 0, []
    for k in range(module.L):
        lin = module._lin(k)
        aliases = [
            f"{prefix}{group}.model.{index}.weight"
            for group in (f"lin{k}", f"lins.{k}")
            for index in (0, 1)
        ]
        weight = next((state_dict[a] for a in aliases if a in state_dict), None)
        for alias in aliases:
            state_dict.pop(alias, None)
        if weight is None:
            absent.append(f"{prefix}lin{k}")
            continue
        found += 1
        position = len(lin.model) - 1  # type: ignore[arg-type]
        for group in (f"lin{k}", f"lins.{k}"):
            state_dict[f"{prefix}{group}.model.{position}.weight"] = weight
    if found and absent:
        error_msgs.append(
            f"linear weights of {len(absent)} of {module.L} layers are missing, "
            f"first {absent[0]!r}: is the checkpoint of another trunk?"
        )
