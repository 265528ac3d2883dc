"""What LPIPS accepts as an image or as features, and what it says of anything else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .features import Features
from .notices import level_of_the_caller
from .trunk.table import tap_shapes


def as_rgb_batch(
    name: str,
    image: Tensor,
    *,
    like: Tensor,
    any_dtype: bool,
    minimum_size: int,
    trunk: str,
    unit_range: bool,
) -> Tensor:
    """An image argument as (N, 3, H, W), or an error that says what is wrong with it.

    Args:
        name: of the argument, for messages.
        image: (N, 3, H, W), (N, 1, H, W) or, without a batch, (3, H, W) or (1, H, W).
        like: a tensor on the model's device and of its dtype.
        any_dtype: take images of any floating dtype, not that of ``like`` alone; autocast does so
            too, and takes them to it.
        minimum_size: the smallest height and width that the trunk can take.
        trunk: its name, for messages.
        unit_range: the image is in [0, 1], and will be taken to [-1, 1].
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of shape (N, 3, H, W), got {type(image).__name__}; "
            "lpips_fast.im2tensor converts an RGB array"
        )
    if not image.is_floating_point():
        raise TypeError(
            f"{name} is {image.dtype}, expected floating point in [-1, 1]; "
            "convert 8-bit images with x.float() / 127.5 - 1"
        )
    if image.device != like.device:
        raise ValueError(
            f"{name} is on {image.device} but the model is on {like.device}; "
            "move one of them with .to()"
        )
    if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}, expected (N, 3, H, W), RGB, or (N, 1, H, W), "
            "grayscale; composite or drop an alpha channel first"
        )
    if min(image.shape[-2:]) < minimum_size:
        raise ValueError(
            f"{name} of {image.shape[-2]}x{image.shape[-1]} pixels is too small for trunk "
            f"{trunk!r}: it needs at least {minimum_size}x{minimum_size}; resize or pad it"
        )
    # Asked first: a call of torch that changes nothing takes longer than the question.
    if image.dtype != like.dtype:
        is_narrower = torch.promote_types(image.dtype, like.dtype) == like.dtype
        if is_narrower and unit_range:
            # lpips takes it there in the image's own dtype, and what that rounds away is gone.
            image = ((2 * image - 1).to(like.dtype) + 1) / 2
        elif any_dtype or is_narrower or kernels.autocast_dtype(like.device):
            image = image.to(like.dtype)  # as torch does where the scaling layer subtracts
        else:
            raise TypeError(
                f"{name} is {image.dtype} but the model is {like.dtype}; "
                "convert one of them with .to(), or use torch.autocast"
            )
    if image.dim() == 3:
        image = image.unsqueeze(0)
    return image if image.shape[1] == 3 else image.expand(-1, 3, -1, -1)


def check_features(
    name: str,
    features: Features,
    *,
    net: str,
    layers: Sequence[int],
    channels: Sequence[int],
    device: torch.device | None,
    look: bool,
) -> None:
    """Refuses features that a model cannot compare, and says why.

    Args:
        name: of the argument, for messages.
        features: as :meth:`lpips_fast.LPIPS.encode` returns them, or made by hand.
        net, layers: the model's trunk, and the layers that it compares.
        channels: of every layer of that trunk.
        device: the model's; ``None``: any, but one.
        look: also hold the features to their images' size, and warn of NaN and infinity, which
            costs a synchronisation on GPUs. Nothing else reads values.

    Raises:
        ValueError: features of another trunk, of other layers, of no such shape, or elsewhere.
        TypeError: no tensors, integers, or several dtypes.
    """
    remedy = "encode the images with this model"
    if not all(isinstance(tap, Tensor) for tap in features.taps):
        kinds = ", ".join(sorted({type(tap).__name__ for tap in features.taps}))
        raise TypeError(f"{name} must hold one torch.Tensor a layer, got {kinds}; {remedy}")
    expected = [channels[layer] for layer in layers]
    if features.net not in (None, net):
        raise ValueError(
            f"{name} are features of trunk {features.net!r}, but the model's is {net!r}; {remedy}"
        )
    if features.layers is not None and tuple(features.layers) != tuple(layers):
        raise ValueError(
            f"{name} are features of {_layers(features.layers)}, but the model compares "
            f"{_layers(layers)}; {remedy}"
        )
    if len(features.taps) != len(layers):
        raise ValueError(
            f"{name} are features of {len(features.taps)} layers, but the model compares "
            f"{len(layers)}, {_layers(layers)} of trunk {net!r}; {remedy}"
        )
    shapes = [tuple(tap.shape) for tap in features.taps]
    if any(len(shape) != 4 for shape in shapes):
        wrong = next(shape for shape in shapes if len(shape) != 4)
        raise ValueError(f"{name} hold a tensor of shape {wrong}, expected (N, C, H, W); {remedy}")
    found = [shape[1] for shape in shapes]
    if found != expected:
        raise ValueError(
            f"{name} are features of {found} channels, but {_layers(layers)} of trunk {net!r} "
            f"have {expected}; {remedy}"
        )
    counts = [shape[0] for shape in shapes]
    if any(count != counts[0] for count in counts):
        raise ValueError(
            f"{name} hold {counts} images in their layers, expected one number; {remedy}"
        )
    dtypes = {tap.dtype for tap in features.taps}
    if len(dtypes) > 1 or not features.taps[0].is_floating_point():
        told = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"{name} are {told}, expected one floating dtype; {remedy}")
    places = {tap.device for tap in features.taps}
    if len(places) > 1 or device not in (None, *places):
        told = " and ".join(sorted(str(place) for place in places))
        wanted = "expected one device" if device is None else f"but the model is on {device}"
        raise ValueError(f"{name} are on {told}, {wanted}; move them with .to()")
    if look:
        _look_at_features(name, features, net, layers)


def _layers(layers: Sequence[int]) -> str:
    told = ", ".join(map(str, layers))
    return f"layer {told}" if len(layers) == 1 else f"layers {told}"


def _look_at_features(name: str, features: Features, net: str, layers: Sequence[int]) -> None:
    shapes = tap_shapes(net, features.image_size)
    for layer, tap in zip(layers, features.taps):
        if tuple(tap.shape[1:]) != shapes[layer]:
            raise ValueError(
                f"{name} hold {tuple(tap.shape[1:])} for layer {layer}, but images of "
                f"{features.image_size[0]}x{features.image_size[1]} pixels have {shapes[layer]} "
                "there; encode the images with this model"
            )
    warn_of_features(name, features.taps, layers)


def warn_of_features(
    name: str, taps: Sequence[Tensor], layers: Sequence[int] | None = None
) -> None:
    """Warns of NaN and infinity in features, naming the first layer that holds some.

    Args:
        name: of the argument, for messages.
        taps: one tensor a layer.
        layers: the layers' numbers; ``None``: 0, 1, …
    """
    for layer, tap in zip(range(len(taps)) if layers is None else layers, taps):
        bad = (~torch.isfinite(tap)).sum().item()
        if bad:
            text = f"{name} hold {bad} NaN or infinite values in layer {layer}"
            warnings.warn(text, stacklevel=level_of_the_caller())
            return


def check_same_size(size0: tuple[int, int], size1: tuple[int, int]) -> None:
    """Refuses two images of different sizes."""
    if size0 != size1:
        raise ValueError(
            f"the two images differ in size, {size0[0]}x{size0[1]} and {size1[0]}x{size1[1]} "
            "pixels (height x width); resize or crop one of them"
        )


def common_batch(batch0: int, batch1: int) -> int:
    """The batch size of a comparison: one image is compared with every image of the other."""
    if batch0 != batch1 and 1 not in (batch0, batch1):
        raise ValueError(
            f"the two batches differ, {batch0} and {batch1} images; "
            "they must match unless one of them is 1"
        )
    return batch0 if batch1 == 1 else batch1


def warn_of_values(name: str, image: Tensor, normalize: bool) -> None:
    """Warns of NaN, infinity, and values outside the range that ``normalize`` implies."""
    message = _suspicion(image, normalize)
    if message is not None:
        warnings.warn(f"{name} {message}", stacklevel=level_of_the_caller())


def _suspicion(image: Tensor, normalize: bool) -> str | None:
    if image.numel() == 0:
        return None
    bad = (~torch.isfinite(image)).sum().item()
    if bad:
        return f"holds {bad} NaN or infinite values"
    low, high = image.min().item(), image.max().item()
    span = f"has values from {low:.4g} to {high:.4g}, expected "
    tolerance = 0.01  # of resampling, which overshoots a little
    if low < (0 if normalize else -1) - tolerance or high > 1 + tolerance:
        hint = "; 8-bit images are taken there by x / 127.5 - 1" if high > 2 else ""
        return f"{span}[{0 if normalize else -1}, 1] with normalize={normalize}{hint}"
    if not normalize and low >= 0 and high > 0:
        return f"{span}[-1, 1]: if it is an image in [0, 1], pass normalize=True"
    return None
