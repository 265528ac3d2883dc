"""LPIPS, the module: a drop-in for ``lpips.LPIPS`` 0.1.4."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .trunk import Trunk, minimum_size, tap_channels, trunk_spec
from .weights import WeightsError, load_lin_weights, load_trunk_weights, read_state_dict

VERSIONS = ("0.0", "0.1")
REDUCTIONS = ("none", "mean", "sum")


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
            outside the range that ``normalize`` implies. It costs a synchronisation on GPUs.

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
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}; expected one of {', '.join(VERSIONS)}")
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}"
            )
        trunk_name = "vgg" if net == "vgg16" else net
        trunk_spec(trunk_name)  # an unknown net is told before anything is printed or loaded
        if verbose:
            print(
                f"Setting up [{'LPIPS' if lpips else 'baseline'}] perceptual loss: "
                f"trunk [{net}], v[{version}], spatial [{'on' if spatial else 'off'}]"
            )
        self.pnet_type = net
        self.pnet_tune = pnet_tune
        self.pnet_rand = pnet_rand
        self.spatial = spatial
        self.lpips = lpips
        self.version = version
        self.reduction = reduction
        self.check_inputs = check_inputs
        self.scaling_layer = ScalingLayer()
        self.chns = tap_channels(trunk_name)
        self.L = len(self.chns)
        self.minimum_size = minimum_size(trunk_name)

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

    # ------------------------------------------------------------------------------- images

    def _check_pair(self, in0: Tensor, in1: Tensor) -> tuple[Tensor, Tensor]:
        """The two images as (N, 3, H, W) of one dtype, or an error that says what is wrong."""
        parameter = next(self.net.parameters())
        autocast = torch.is_autocast_enabled(parameter.device.type)
        images = []
        for name, image in (("in0", in0), ("in1", in1)):
            if not isinstance(image, Tensor):
                raise TypeError(
                    f"{name} must be a torch.Tensor of shape (N, 3, H, W), got "
                    f"{type(image).__name__}; lpips_fast.im2tensor converts an RGB array"
                )
            if not image.is_floating_point():
                raise TypeError(
                    f"{name} is {image.dtype}, expected floating point in [-1, 1]; "
                    "convert 8-bit images with x.float() / 127.5 - 1"
                )
            if image.device != parameter.device:
                raise ValueError(
                    f"{name} is on {image.device} but the model is on {parameter.device}; "
                    "move one of them with .to()"
                )
            if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3):
                raise ValueError(
                    f"{name} has shape {tuple(image.shape)}, expected (N, 3, H, W), RGB, or "
                    "(N, 1, H, W), grayscale; composite or drop an alpha channel first"
                )
            if autocast:
                image = image.float()
            elif image.dtype != parameter.dtype:
                raise TypeError(
                    f"{name} is {image.dtype} but the model is {parameter.dtype}; "
                    "convert one of them with .to(), or use torch.autocast"
                )
            if image.dim() == 3:
                image = image.unsqueeze(0)
            images.append(image.expand(-1, 3, -1, -1))
        in0, in1 = images
        sizes_match = in0.shape[2:] == in1.shape[2:]
        if not sizes_match or (in0.shape[0] != in1.shape[0] and 1 not in (len(in0), len(in1))):
            raise ValueError(
                f"the two images differ in shape, {tuple(in0.shape)} and {tuple(in1.shape)}; "
                "sizes must match, and batch sizes must match unless one is 1"
            )
        if min(in0.shape[2:]) < self.minimum_size:
            raise ValueError(
                f"images of {in0.shape[2]}x{in0.shape[3]} pixels are too small for trunk "
                f"{self.pnet_type!r}: it needs at least {self.minimum_size}x{self.minimum_size}; "
                "resize or pad them"
            )
        return in0, in1

    def _warn_of_values(self, name: str, image: Tensor, normalize: bool) -> None:
        if image.numel() == 0:
            return
        bad = (~torch.isfinite(image)).sum().item()
        if bad:
            warnings.warn(f"{name} holds {bad} NaN or infinite values", stacklevel=5)
            return
        low, high = image.min().item(), image.max().item()
        expected = (0.0, 1.0) if normalize else (-1.0, 1.0)
        span = f"{name} has values from {low:.4g} to {high:.4g}, expected "
        if low < expected[0] - 0.01 or high > expected[1] + 0.01:
            hint = "; 8-bit images are taken there by x / 127.5 - 1" if high > 2 else ""
            warnings.warn(
                f"{span}[{expected[0]:g}, {expected[1]:g}] with normalize={normalize}{hint}",
                stacklevel=5,
            )
        elif not normalize and low >= 0 and high > 0:
            warnings.warn(
                f"{span}[-1, 1]: if it is an image in [0, 1], pass normalize=True", stacklevel=5
            )

    # ----------------------------------------------------------------------------- features

    def _features(self, image: Tensor) -> tuple[Tensor, ...]:
        # The first release fed images to the trunk unscaled; 0.0 keeps its numbers.
        return self.net(self.scaling_layer(image) if self.version == "0.1" else image)

    def _features_of_pair(
        self, in0: Tensor, in1: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Taps of both images: in one pass, unless only one of them needs a graph."""
        learns = any(p.requires_grad for p in self.net.parameters())
        grad0, grad1 = ((learns or x.requires_grad) and torch.is_grad_enabled() for x in (in0, in1))
        if grad0 != grad1:
            with torch.no_grad():
                target = self._features(in1 if grad0 else in0)
            moving = self._features(in0 if grad0 else in1)
            return (moving, target) if grad0 else (target, moving)
        split = [len(in0), len(in1)]
        taps = [tap.split(split) for tap in self._features(torch.cat((in0, in1)))]
        return tuple(t[0] for t in taps), tuple(t[1] for t in taps)

    # ----------------------------------------------------------------------------- distance

    def _layer_maps(self, feats0: list[Tensor], feats1: list[Tensor]) -> list[Tensor]:
        if self.lpips and any(lin.drops for lin in self.lins):  # type: ignore[union-attr]
            return [
                lin((functional.normalize_tensor(a) - functional.normalize_tensor(b)) ** 2)
                for lin, a, b in zip(self.lins, feats0, feats1)
            ]
        return functional.distance_map(feats0, feats1, self._lin_weights())

    def _lin_weights(self) -> list[Tensor] | None:
        return [lin.weight for lin in self.lins] if self.lpips else None  # type: ignore[misc]

    def _per_layer(
        self, feats0: list[Tensor], feats1: list[Tensor], size: tuple[int, int]
    ) -> list[Tensor]:
        """One tensor a layer: (N, 1, 1, 1), or (N, 1, H, W) for ``spatial``."""
        if self.spatial:
            return [upsample(m, size) for m in self._layer_maps(feats0, feats1)]
        if self.lpips and any(lin.drops for lin in self.lins):  # type: ignore[union-attr]
            return [spatial_average(m) for m in self._layer_maps(feats0, feats1)]
        distances = functional.distance(feats0, feats1, self._lin_weights())
        return [d.view(-1, 1, 1, 1) for d in distances.unbind(dim=1)]

    def _reduce(self, value: Tensor) -> Tensor:
        if self.reduction == "mean":
            return value.mean()
        return value.sum() if self.reduction == "sum" else value

    def forward(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Any:
        """Distance between two images, or two batches of images.

        Args:
            in0, in1: (N, 3, H, W) RGB in [-1, 1]; (N, 1, H, W) is taken for gray, (3, H, W) for a
                batch of one, and a batch of one is compared with every image of the other. Height
                and width are at least :attr:`minimum_size`.
            retPerLayer: also return the list of each layer's part, whose sum is the distance.
            normalize: images are in [0, 1].

        Returns:
            (N, 1, 1, 1), or with ``spatial`` maps (N, 1, H, W), or a scalar under ``reduction``;
            float32 for images of float32 and lower precision, float64 for float64.

        Raises:
            ValueError: shapes or devices that do not fit, or images too small for the trunk.
            TypeError: integers, or dtypes that differ from each other or from the model's.
        """
        pair = self._check_pair(in0, in1)
        if self.check_inputs:
            for name, image in zip(("in0", "in1"), pair):
                self._warn_of_values(name, image, normalize)
        if normalize:
            pair = (2 * pair[0] - 1, 2 * pair[1] - 1)
        feats0, feats1 = self._features_of_pair(*pair)
        if len(pair[0]) != len(pair[1]):
            batch = max(len(pair[0]), len(pair[1])) if 0 not in map(len, pair) else 0
            feats0, feats1 = (
                tuple(f.expand(batch, -1, -1, -1) for f in feats) for feats in (feats0, feats1)
            )
        size = (pair[0].shape[2], pair[0].shape[3])
        layers = self._per_layer(list(feats0), list(feats1), size)
        value = self._reduce(functools.reduce(torch.add, layers))
        return (value, [self._reduce(layer) for layer in layers]) if retPerLayer else value


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
    for k, lin in enumerate(module.lins):
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
