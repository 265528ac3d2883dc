"""The trunks as data: their layers, their taps, and the shapes that follow.

A trunk is the convolutional part of an ImageNet classifier; a tap is a ReLU output that LPIPS
compares. The layers and their indices are torchvision's, so that its checkpoints load. A new trunk
is one more entry in :data:`TRUNKS`.

A narrow trunk has the layers of one of these with other numbers of channels, its widths, and a name
that says so: ``alex:32,96,192,128,128`` are AlexNet's five convolutions, and ``16/64`` among those
of SqueezeNet is a fire module's. Wherever a trunk's name goes, a narrow one's does.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

IMAGE_CHANNELS = 3


class Conv(NamedTuple):
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0


class ReLU(NamedTuple):
    pass


class MaxPool(NamedTuple):
    kernel: int
    stride: int
    ceil_mode: bool = False


class Fire(NamedTuple):
    """SqueezeNet's module: a 1x1 convolution, then a 1x1 and a 3x3 one side by side."""

    squeeze: int
    expand: int


Layer = Conv | ReLU | MaxPool | Fire


@dataclass(frozen=True)
class TrunkSpec:
    """One trunk. ``taps`` maps the name of a tap to the index of the layer whose output it is."""

    layers: tuple[Layer, ...]
    taps: dict[str, int]
    initialize: Callable[[Tensor], Any] | None  # of random convolutions; None: torch's own


def _vgg_block(channels: int, convolutions: int) -> tuple[Layer, ...]:
    return (Conv(channels, 3, padding=1), ReLU()) * convolutions + (MaxPool(2, 2),)


def _kaiming_normal(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


TRUNKS: dict[str, TrunkSpec] = {
    # Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.
    "alex": TrunkSpec(
        layers=(
            *(Conv(64, 11, stride=4, padding=2), ReLU(), MaxPool(3, 2)),
            *(Conv(192, 5, padding=2), ReLU(), MaxPool(3, 2)),
            *(Conv(384, 3, padding=1), ReLU()),
            *(Conv(256, 3, padding=1), ReLU()),
            *(Conv(256, 3, padding=1), ReLU()),
        ),
        taps={"relu1": 1, "relu2": 4, "relu3": 7, "relu4": 9, "relu5": 11},
        initialize=None,
    ),
    # Simonyan and Zisserman, "Very Deep Convolutional Networks …", 2015, configuration D.
    "vgg": TrunkSpec(
        layers=(
            *_vgg_block(64, 2),
            *_vgg_block(128, 2),
            *_vgg_block(256, 3),
            *_vgg_block(512, 3),
            *_vgg_block(512, 3)[:-1],
        ),
        taps={"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29},
        initialize=_kaiming_normal,
    ),
    # Iandola et al., "SqueezeNet", 2016, version 1.1.
    "squeeze": TrunkSpec(
        layers=(
            *(Conv(64, 3, stride=2), ReLU(), MaxPool(3, 2, ceil_mode=True)),
            *(Fire(16, 64), Fire(16, 64), MaxPool(3, 2, ceil_mode=True)),
            *(Fire(32, 128), Fire(32, 128), MaxPool(3, 2, ceil_mode=True)),
            *(Fire(48, 192), Fire(48, 192), Fire(64, 256), Fire(64, 256)),
        ),
        taps={
            **{"relu1": 1, "relu2": 4, "relu3": 7, "relu4": 9},
            **{"relu5": 10, "relu6": 11, "relu7": 12},
        },
        initialize=nn.init.kaiming_uniform_,
    ),
}


def architecture(net: str) -> str:
    """The key of :data:`TRUNKS` whose layers a trunk has.

    >>> architecture("alex:32,96,192,128,128"), architecture("vgg")
    ('alex', 'vgg')
    """
    return net.partition(":")[0]


# Entries made of names; not cached functions, which torch.compile warns of.
_NARROW: dict[str, TrunkSpec] = {}
_CHANNELS: dict[str, tuple[int, ...]] = {}


def trunk_spec(net: str) -> TrunkSpec:
    """The table entry of a trunk; a ValueError names the trunks there are."""
    spec = TRUNKS.get(net) or _NARROW.get(net)
    if spec is None:
        spec = _NARROW[net] = _narrow_spec(net)
    return spec


def _narrow_spec(net: str) -> TrunkSpec:
    name, _, text = net.partition(":")
    if name not in TRUNKS:
        raise ValueError(f"unknown trunk {net!r}; expected one of {', '.join(TRUNKS)}")
    spec, widths = TRUNKS[name], text.split(",")
    convolutions = [k for k, layer in enumerate(spec.layers) if isinstance(layer, (Conv, Fire))]
    layers = list(spec.layers)
    for k, width in zip(convolutions, widths):
        numbers = [int(n) if n.isascii() and n.isdecimal() else 0 for n in width.split("/")]
        layer = layers[k]
        if isinstance(layer, Conv) and len(numbers) == 1:
            layers[k] = layer._replace(channels=numbers[0])
        elif isinstance(layer, Fire) and len(numbers) == 2:
            layers[k] = Fire(*numbers)
        else:
            numbers = [0]
        if min(numbers) < 1:
            raise ValueError(f"unknown trunk {net!r}: its widths are like those of {_table(name)}")
    if len(widths) != len(convolutions) or net != with_widths(name, layers):
        raise ValueError(f"unknown trunk {net!r}: its widths are like those of {_table(name)}")
    return dataclasses.replace(spec, layers=tuple(layers))


def _table(name: str) -> str:
    return f"{name}:{_widths(TRUNKS[name].layers)}"


def _widths(layers: Iterable[Layer]) -> str:
    texts = []
    for layer in layers:
        match layer:
            case Conv():
                texts.append(str(layer.channels))
            case Fire():
                texts.append(f"{layer.squeeze}/{layer.expand}")
    return ",".join(texts)


def with_widths(net: str, layers: Iterable[Layer]) -> str:
    """The name of the trunk whose layers are such; the table's own, where they are as there.

    >>> with_widths("alex", [Conv(n, 3) for n in (32, 96, 192, 128, 128)])
    'alex:32,96,192,128,128'
    >>> with_widths("alex", TRUNKS["alex"].layers)
    'alex'
    """
    name = architecture(net)
    named = f"{name}:{_widths(layers)}"
    return name if named == _table(name) else named


def name_by_shapes(net: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """The name of the trunk whose weights have such shapes, or ``net`` where none has.

    Args:
        net: whose layers it has.
        shapes: of its weights and biases, with torchvision's names.

    >>> name_by_shapes("alex", feature_shapes("alex:32,96,192,128,128"))
    'alex:32,96,192,128,128'
    """
    layers = []
    for index, layer in enumerate(trunk_spec(net).layers):
        match layer:
            case Conv():
                weight = shapes.get(f"features.{index}.weight", ())
                if len(weight) != 4:
                    return net
                layer = layer._replace(channels=weight[0])
            case Fire():
                squeeze, expand = (
                    shapes.get(f"features.{index}.{part}.weight", ())
                    for part in ("squeeze", "expand1x1")
                )
                if len(squeeze) != 4 or len(expand) != 4:
                    return net
                layer = Fire(squeeze[0], expand[0])
        layers.append(layer)
    name = with_widths(net, layers)
    if not all(min(numbers) > 0 for numbers in shapes.values()):
        return net
    expected = feature_shapes(name)
    fits = all(tuple(shapes.get(key, ())) == shape for key, shape in expected.items())
    return name if fits else net


def feature_shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a trunk, with torchvision's names.

    >>> feature_shapes("alex")["features.0.weight"]
    (64, 3, 11, 11)
    """
    shapes: dict[str, tuple[int, ...]] = {}
    channels = IMAGE_CHANNELS
    for index, layer in enumerate(trunk_spec(net).layers):
        for name, (outputs, inputs, kernel) in _convolutions(layer, channels).items():
            shapes[f"features.{index}.{name}weight"] = (outputs, inputs, kernel, kernel)
            shapes[f"features.{index}.{name}bias"] = (outputs,)
        channels = _output_channels(layer, channels)
    return shapes


def _convolutions(layer: Layer, channels: int) -> dict[str, tuple[int, int, int]]:
    """(outputs, inputs, kernel) of a layer's convolutions, by the prefix of their parameters."""
    match layer:
        case Conv(outputs, kernel):
            return {"": (outputs, channels, kernel)}
        case Fire(squeeze, expand):
            return {
                "squeeze.": (squeeze, channels, 1),
                "expand1x1.": (expand, squeeze, 1),
                "expand3x3.": (expand, squeeze, 3),
            }
    return {}


def _output_channels(layer: Layer, channels: int) -> int:
    match layer:
        case Conv():
            return layer.channels
        case Fire():
            return 2 * layer.expand
    return channels


def tap_channels(net: str) -> list[int]:
    """Channels of every tap, in order.

    >>> tap_channels("squeeze")
    [64, 128, 256, 384, 384, 512, 512]
    """
    if net not in _CHANNELS:
        spec, channels, per_layer = trunk_spec(net), IMAGE_CHANNELS, []
        for layer in spec.layers:
            channels = _output_channels(layer, channels)
            per_layer.append(channels)
        _CHANNELS[net] = tuple(per_layer[index] for index in spec.taps.values())
    return list(_CHANNELS[net])


def output_size(layer: Layer, size: int) -> int:
    match layer:
        case Conv(_, kernel, stride, padding):
            return (size + 2 * padding - kernel) // stride + 1
        case MaxPool(kernel, stride, ceil_mode):
            if size < kernel and not ceil_mode:
                return 0
            out = (size - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
            # As in torch: a window may not start beyond the input.
            return out - 1 if (out - 1) * stride >= size else out
    return size


def tap_shapes(net: str, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(C, H, W) of every tap for images of (height, width).

    >>> tap_shapes("alex", (64, 64))
    [(64, 15, 15), (192, 7, 7), (384, 3, 3), (256, 3, 3), (256, 3, 3)]
    """
    sizes, (height, width) = [], image_size
    for layer in trunk_spec(net).layers:
        height, width = output_size(layer, height), output_size(layer, width)
        sizes.append((height, width))
    taps = trunk_spec(net).taps.values()
    return [(c, *sizes[index]) for c, index in zip(tap_channels(net), taps)]


def check_layers(net: str, layers: Any) -> tuple[int, ...]:
    """Indices of taps, ascending, or an error that says which there are.

    Args:
        net: a key of :data:`TRUNKS`.
        layers: a sequence of integers in any order, each once; ``None``: all.

    >>> check_layers("alex", (2, 0)), check_layers("alex", None)
    ((0, 2), (0, 1, 2, 3, 4))
    """
    names = list(trunk_spec(net).taps)
    if layers is None:
        return tuple(range(len(names)))
    expected = (
        f"expected indices of the layers of {net!r}, 0 ({names[0]}) to {len(names) - 1} "
        f"({names[-1]}), each once"
    )
    is_sequence = isinstance(layers, Iterable) and not isinstance(layers, (str, bytes))
    chosen = tuple(layers) if is_sequence else ()
    if not is_sequence or any(isinstance(k, bool) or not hasattr(k, "__index__") for k in chosen):
        raise TypeError(f"layers is {layers!r}, {expected}, for example layers=(0, 1, 2)")
    chosen = tuple(operator.index(k) for k in chosen)
    if not chosen:
        raise ValueError(f"layers is empty, {expected}")
    wrong = [k for k in chosen if not 0 <= k < len(names)]
    if wrong:
        raise ValueError(f"layers holds {wrong[0]}, {expected}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers is {chosen} and names a layer twice, {expected}")
    return tuple(sorted(chosen))


def minimum_size(net: str, layers: Sequence[int] | None = None) -> int:
    """The smallest height and width, in pixels, from which every tap has at least one position.

    Args:
        net: a key of :data:`TRUNKS`.
        layers: of the taps that are wanted; ``None``: all.

    >>> minimum_size("vgg"), minimum_size("vgg", (0, 1))
    (16, 2)
    """
    spec = trunk_spec(net)
    last = list(spec.taps.values())[max(check_layers(net, layers))]
    for size in itertools.count(1):
        remaining = size
        for layer in spec.layers[: last + 1]:
            remaining = output_size(layer, remaining) if remaining > 0 else 0
        if remaining > 0:
            return size
    raise AssertionError("unreachable")
