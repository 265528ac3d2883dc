"""The ways from two images to the list of every layer's distance, and which is taken when.

Every way gives the same numbers; they differ in memory, in calls, and in the graph that they keep.
:func:`layer_distances` chooses. Where the model is as built, slices run by hand
(:mod:`lpips_fast.trunk.legality` says when); where it is not, both images go through the modules,
one after the other, as in ``lpips``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import composed, functional, kernels
from ..composed import accumulator_dtype
from ..features import Features
from ..inputs import check_same_size, common_batch
from ..normalization import LEARNED, Normalization, depends_on_batch
from ..trunk import tap_channels, tap_shapes
from ..trunk.legality import FastSlice
from ..trunk.receptive_fields import receptive_fields
from ..trunk.slice_node import as_images, slice_tap
from . import gradient_scaling
from .calls import Call, is_unwatched, prepare_call, run, size_of
from .masks import Mask
from .scaling import like_of
from .slice_distance import slice_distance
from .spatial import spatial_average, upsample

if TYPE_CHECKING:
    from ..lpips import LPIPS

# Elements of an image batch from which taps are compared one by one, each in a call of its own;
# below, memory is no concern and one call for all layers is faster.
_STREAMED_FROM = 3 * 128 * 128
# Elements of the images of a training step, below which they and the target are one batch: what the
# trunk makes of the target is then kept for backward too. Not measured on a GPU.
_ONE_BATCH_ON_CUDA = 16 * 3 * 256 * 256


def layer_distances(
    model: LPIPS,
    in0: Tensor | Features,
    in1: Tensor | Features,
    normalize: bool,
    mask: Mask | None = None,
) -> list[Tensor]:
    """Every layer's distance, (N, 1, 1, 1) or for ``spatial`` (N, 1, H, W).

    Without a graph at most ``model.max_batch`` pairs at a time, and half as many where memory runs
    out.

    Args:
        in0, in1: images (N, 3, H, W) as the model takes them, or features of it.
        normalize: images are in [0, 1].
        mask: weights positions; not for ``spatial``.
    """
    call = prepare_call(model, [x for x in (in0, in1) if isinstance(x, Tensor)], normalize)
    if mask is not None:
        call = dataclasses.replace(call, mask=mask)
    if not kernels.has_operators():
        return _layers(call, in0, in1)
    if _scales_gradients(call, in0, in1):
        return _with_scaled_gradients(call, in0, in1)
    batch = common_batch(*(x.shape[0] if isinstance(x, Tensor) else len(x) for x in (in0, in1)))
    limit = model.max_batch or batch
    is_whole = torch.is_grad_enabled() or depends_on_batch(model.normalization)
    if batch <= limit or is_whole:
        try:
            return _layers(call, in0, in1)
        except RuntimeError as error:
            is_too_large = kernels.is_out_of_memory(error) and batch > 1
            if is_whole or not is_too_large:
                raise
            limit = (batch + 1) // 2
    parts = []
    for first in range(0, batch, limit):
        part = slice(first, first + limit)
        pair = [x if len(x) == 1 and batch > 1 else x[part] for x in (in0, in1)]
        of_part = None if mask is None else mask[part]
        parts.append(layer_distances(model, pair[0], pair[1], normalize, of_part))
    return [torch.cat(layer) for layer in zip(*parts)]


def _scales_gradients(call: Call, *arguments: Tensor | Features) -> bool:
    """Whether gradients are scaled inside (:mod:`.gradient_scaling`).

    Of a trunk in float16, and only where nobody else has a graph of its features.
    """
    model = call.model
    if not torch.is_grad_enabled():
        return False
    if not any(x.requires_grad for x in arguments if isinstance(x, Tensor)):
        return False
    device, dtype = like_of(model).device, model.dtype or like_of(model).dtype
    if (kernels.autocast_dtype(device) or dtype) != torch.float16 or not is_unwatched(model):
        return False
    if model.normalization == LEARNED and any(p.requires_grad for p in model.norms.parameters()):
        return False  # its gradients would leave as they are inside
    return not any(isinstance(x, Features) and _needs_graph(call, x) for x in arguments)


def _with_scaled_gradients(
    call: Call, in0: Tensor | Features, in1: Tensor | Features
) -> list[Tensor]:
    model = call.model
    pair: list[Tensor | Features] = [in0, in1]
    learning = {k: model.layer_weight(k) for k in model.layers} if model.lpips else {}
    learning = {k: weight for k, weight in learning.items() if weight.requires_grad}
    images = {k: x for k, x in enumerate(pair) if isinstance(x, Tensor) and x.requires_grad}
    masks = [call.mask.mask] if call.mask is not None and call.mask.wants_gradient else []
    entered, token = gradient_scaling.enter([*images.values(), *learning.values(), *masks])
    for k, image in zip(images, entered):
        pair[k] = image
    call = dataclasses.replace(call, weights=dict(zip(learning, entered[len(images) :])))
    if masks:
        call = dataclasses.replace(call, mask=Mask(entered[-1]))
    layers = _layers(call, pair[0], pair[1])
    height, width = size_of(entered[0])
    shapes = tap_shapes(model.net_name, (height, width))
    whole = height * width if model.spatial else 1
    grids = [shapes[k][1:] for k in model.layers]
    positions: list[float | Tensor] = [h * w / whole for h, w in grids]
    if call.mask is not None:
        # Where it counts most, a position's share of the gradient is so many times as large.
        weights = call.mask.weights(grids, layers[0].dtype)
        positions = [p / w.detach().amax() for p, w in zip(positions, weights)]
    return gradient_scaling.leave(layers, token, positions)


def _layers(call: Call, in0: Tensor | Features, in1: Tensor | Features) -> list[Tensor]:
    """By the way that is taken; NaN where an image is not finite."""
    in0, in1 = (_without_inference(x) for x in (in0, in1))
    graphs = (_needs_graph(call, in0), _needs_graph(call, in1))
    if not (isinstance(in0, Tensor) and isinstance(in1, Tensor) and _flags_images(call, in0)):
        return _by_way(call, in0, in1, graphs)
    call = call.with_flags()
    layers = _by_way(call, in0, in1, graphs)
    assert call.flags is not None
    # In the order in which they are scaled; what comes behind is one of them again.
    sizes = [len(in0), len(in1)] if graphs != (False, True) else [len(in1), len(in0)]
    flags = call.flags[0] if len(call.flags) == 1 else torch.cat(call.flags)
    one, other = flags[: sum(sizes)].split(sizes)
    flags = (one + other).view(-1, 1, 1, 1)
    together = torch.stack(layers)
    # Not a sum: so the gradient is NaN, too.
    return list(torch.addcmul(together, together, flags.to(together.dtype)).unbind())


def _flags_images(call: Call, image: Tensor) -> bool:
    """Whether scaling says which images are not finite, so that NaN need not come by the first tap.

    A map is NaN where the image is, and so takes it from the tap.
    """
    return (
        image.is_cuda and call.is_as_built and not call.model.spatial and not kernels.is_compiling()
    )


def _by_way(
    call: Call,
    in0: Tensor | Features,
    in1: Tensor | Features,
    graphs: tuple[bool, bool],
) -> list[Tensor]:
    """The way that is taken, and why.

    Args:
        graphs: whether each of both needs one.
    """
    if isinstance(in0, Tensor) and isinstance(in1, Tensor):
        check_same_size(size_of(in0), size_of(in1))
        if not call.is_as_built:
            # Modules may look at what they are given: one image, then the other, as in lpips.
            return _encoded(call, in0, in1)
        if graphs[0] == graphs[1]:
            if graphs[0] or in0.numel() < _STREAMED_FROM or kernels.is_compiling():
                return _one_batch(call, in0, in1)
            return _streamed(call, in0, in1)
    if graphs[0] != graphs[1]:
        # A target that needs no gradient costs no graph.
        image, target = (in0, in1) if graphs[0] else (in1, in0)
        return _to_target(call, image, target)
    return _encoded(call, in0, in1)


def _encoded(call: Call, in0: Tensor | Features, in1: Tensor | Features) -> list[Tensor]:
    """Each image on its own, all its taps together."""
    pair = [call.encode(x) if isinstance(x, Tensor) else x for x in (in0, in1)]
    check_same_size(pair[0].image_size, pair[1].image_size)
    return compare(call, pair[0].taps, pair[1].taps, pair[0].image_size)


def _one_batch(call: Call, in0: Tensor, in1: Tensor) -> list[Tensor]:
    """Both images in one batch, all taps together: the fewest calls."""
    split = [in0.shape[0], in1.shape[0]]
    # Not by tap.split(), which asks for __torch_function__ first.
    pairs = [torch.split_with_sizes(tap, split) for tap in call.taps_at_once((in0, in1))]
    taps0, taps1 = [a for a, _ in pairs], [b for _, b in pairs]
    return compare(call, taps0, taps1, size_of(in0), of_one_batch=True)


def _streamed(call: Call, in0: Tensor, in1: Tensor) -> list[Tensor]:
    """A tap is compared as soon as it exists, and its memory goes back: the least memory."""
    layers: list[Tensor] = []
    for a, b in _streamed_taps(call, in0, in1):
        layers += compare(call, [a], [b], size_of(in0), first=len(layers))
        del a, b
    return layers


def _streamed_taps(call: Call, in0: Tensor, in1: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if in0.device.type == "cpu":
        # Side by side: large as they are, nothing is gained by one batch of both, and twice
        # the memory would be in use at a time.
        taps0, taps1 = (call.taps([image]) for image in (in0, in1))
        for _ in call.model.layers:  # not by zip, which holds on to what it gave last
            yield next(taps0), next(taps1)
    else:
        for tap in call.taps((in0, in1)):
            tap0, tap1 = tap.split([len(in0), len(in1)])
            yield tap0, tap1
            del tap, tap0, tap1


def _to_target(call: Call, image: Tensor | Features, target: Tensor | Features) -> list[Tensor]:
    """An image that wants a gradient, to a target that wants none: one node a slice."""
    model = call.model
    fused = model.normalization == "l2" and not model.checkpoint and call.linear
    learns = call.mask is not None and call.mask.wants_gradient
    if not isinstance(image, Tensor) or not call.is_as_built or not fused or learns:
        return _encoded(call, image, _without_graph(call, target))
    assert call.by_hand is not None
    slices = call.by_hand[: model.layers[-1] + 1]
    if (
        isinstance(target, Tensor)
        and len(target) == len(image)
        and image.numel() < _one_batch_below(image.device)
        and len(slices) == len(model.layers)
        and not kernels.is_compiling()  # which takes no list that changes
    ):
        x, both = call.scaled_pair(image, target)
        together = [as_images(both)]
        return _slice_by_slice(call, x, size_of(image), [together] * len(slices))

    x = call.scaled([image])
    target = _without_graph(call, target)
    check_same_size(size_of(image), target.image_size)
    if len(target) != len(x) or kernels.autocast_dtype(x.device):
        return _encoded(call, image, target)
    if any(tap.dtype != x.dtype for tap in target.taps):
        return _encoded(call, image, target)
    taps = dict(zip(model.layers, target.taps))
    return _slice_by_slice(call, x, size_of(image), [taps.get(k) for k in range(len(slices))])


def _one_batch_below(device: torch.device) -> int:
    return _ONE_BATCH_ON_CUDA if device.type == "cuda" else _STREAMED_FROM


def _without_graph(call: Call, target: Tensor | Features) -> Features:
    with torch.no_grad():
        return call.encode(target) if isinstance(target, Tensor) else target


def _slice_by_slice(
    call: Call,
    x: Tensor,
    size: tuple[int, int],
    targets: Sequence[Tensor | list[Tensor] | None],
) -> list[Tensor]:
    """Distances of scaled images; a slice without a target only runs."""
    model = call.model
    assert call.by_hand is not None
    layers = []
    of_taps = tap_channels(model.net_name)
    channels = [of_taps[k] for k in model.layers]
    weights = iter(channel_weights(call, x, model.layers, channels))
    keys = receptive_fields(call.by_hand[: len(targets)], as_images(x))
    of_positions: Iterator[Tensor | None] = itertools.repeat(None)
    if call.mask is not None:
        shapes = tap_shapes(model.net_name, size)
        of_positions = iter(call.mask.weights([shapes[k][1:] for k in model.layers], x.dtype))
    for by_hand, target, of_slice in zip(call.by_hand, targets, keys):
        assert isinstance(by_hand, FastSlice)
        if target is None:
            x = slice_tap(by_hand, x, of_slice)
            continue
        x, value = slice_distance(
            by_hand, x, target, next(weights), model.spatial, of_slice, next(of_positions)
        )
        layers.append(upsample(value, size) if model.spatial else value.view(-1, 1, 1, 1))
    return layers


# ------------------------------------------------------------------------------ from taps on


def compare(
    call: Call,
    taps0: Sequence[Tensor],
    taps1: Sequence[Tensor],
    size: tuple[int, int],
    first: int = 0,
    of_one_batch: bool = False,
) -> list[Tensor]:
    """One tensor a layer: (N, 1, 1, 1), or (N, 1, H, W) for ``spatial``.

    Args:
        taps0, taps1: of the model's ``layers[first]`` and of the layers that follow there; one
            image stands for all of the other.
        size: of the images.
        of_one_batch: both are parts of what the trunk made of one batch in this call.
    """
    model = call.model
    layers = model.layers[first : first + len(taps0)]
    taps0, taps1, normalization = after_learned_norms(model, layers, taps0, taps1)
    eps = composed.EPS
    of_positions = None
    if call.mask is not None:
        of_positions = call.mask.weights([size_of(tap) for tap in taps0], taps0[0].dtype)
    # Outside our operators shapes may be symbols and tensors wrapped: nothing is asked of them.
    if model.lpips and not call.linear:
        maps = []
        for k, tap0, tap1 in zip(layers, taps0, taps1):
            normal0, normal1 = (
                functional.normalize_features(tap, normalization) for tap in (tap0, tap1)
            )
            maps.append(run(model, model.lins[k], (normal0 - normal1) ** 2))
        return _of_maps(model, maps, of_positions, size)
    weights = channel_weights(call, taps0[0], layers, [tap.shape[1] for tap in taps0])
    if not kernels.has_operators():
        maps = [
            composed.distance_map(a, b, w, eps, normalization)
            for a, b, w in zip(taps0, taps1, weights)
        ]
        return _of_maps(model, maps, of_positions, size)
    pairs = [_broadcast(a, b) for a, b in zip(taps0, taps1)]
    taps0, taps1 = [a for a, _ in pairs], [b for _, b in pairs]
    if model.spatial:
        maps = functional.distance_map(taps0, taps1, weights, normalization=normalization)
        return [upsample(m, size) for m in maps]
    if of_one_batch and call.is_as_built and normalization == "l2":
        # What the trunk made of one batch fits the operator: nothing is left to be checked.
        distances = kernels.fused_distance(taps0, taps1, weights, eps, of_positions)
    else:
        distances = functional.distance(
            taps0, taps1, weights, normalization=normalization, position_weights=of_positions
        )
    return list(distances.view(-1, len(pairs), 1, 1, 1).unbind(dim=1))


def after_learned_norms(
    model: LPIPS, layers: Sequence[int], taps0: Sequence[Tensor], taps1: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Normalization]:
    """Taps as the formula of the distance takes them, and by which of these it normalises."""
    if model.normalization != LEARNED:
        return taps0, taps1, model.normalization
    norms = [model.norms[k] for k in layers]
    taps0, taps1 = (
        [run(model, norm, tap) for norm, tap in zip(norms, taps)] for taps in (taps0, taps1)
    )
    return taps0, taps1, "none"  # any more


def _of_maps(
    model: LPIPS,
    maps: Sequence[Tensor],
    of_positions: Sequence[Tensor] | None,
    size: tuple[int, int],
) -> list[Tensor]:
    if model.spatial:
        return [upsample(m, size) for m in maps]
    if of_positions is not None:
        maps = [m * w.to(m.dtype) for m, w in zip(maps, of_positions)]
    return [spatial_average(m) for m in maps]


def channel_weights(
    call: Call, like: Tensor, layers: Sequence[int], channels: Sequence[int]
) -> list[Tensor]:
    """(C_l,) of some layers, as the operators take them beside features ``like``.

    Args:
        channels: of the taps, which a slice that somebody replaced may have changed.
    """
    model = call.model
    dtype = accumulator_dtype(like.dtype)
    if not model.lpips:
        return [like.new_ones(count, dtype=dtype) for count in channels]
    if call.lins is not None and not call.weights:
        weights = [call.lins[k].view(-1) for k in layers]
        if model.frozen and torch.is_grad_enabled():
            weights = [weight.detach() for weight in weights]
    else:
        weights = [call.weights[k] if k in call.weights else model.layer_weight(k) for k in layers]
    return [weight if weight.dtype == dtype else weight.to(dtype) for weight in weights]


def _without_inference(x: Tensor | Features) -> Tensor | Features:
    """Features that were encoded under inference_mode, as autograd can save them: a copy."""
    if isinstance(x, Tensor) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x
    if not any(tap.is_inference() for tap in x.taps):
        return x
    return dataclasses.replace(x, taps=tuple(tap.clone() for tap in x.taps))


def _needs_graph(call: Call, image: Tensor | Features) -> bool:
    if not torch.is_grad_enabled():
        return False
    if isinstance(image, Features):
        return any(tap.requires_grad for tap in image.taps)
    return image.requires_grad or call.trunk_learns()


def _broadcast(tap0: Tensor, tap1: Tensor) -> tuple[Tensor, Tensor]:
    """Both for the common batch; one image stands for all without a copy."""
    if tap0.shape[0] == tap1.shape[0]:
        return tap0, tap1
    # Not by len(), which asks for __torch_function__ first.
    batch = common_batch(tap0.shape[0], tap1.shape[0])
    # Not where it changes nothing: torch.compile cannot save views of unknown size for backward.
    return tuple(  # type: ignore[return-value]
        tap if tap.shape[0] == batch else tap.expand(batch, -1, -1, -1) for tap in (tap0, tap1)
    )
