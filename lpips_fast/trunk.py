"""The three trunks as data: their layers, their taps, and the module that runs them.

A trunk is the convolutional part of an ImageNet classifier; a tap is a ReLU output that LPIPS
compares. The layers and their indices are torchvision's, so that its checkpoints load; the modules
are grouped into ``slice1``, ``slice2``, … at the taps, as in the ``lpips`` package, so that its
checkpoints load too. A new trunk is one more entry in :data:`TRUNKS`.
"""

from __future__ import annotations

import itertools
import operator
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import ops
from .convolution import conv_relu, convolve, input_gradient, is_frozen_on_cpu
from .fire import FireModule

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


def trunk_spec(net: str) -> TrunkSpec:
    """The table entry of a trunk; a ValueError names the trunks there are."""
    if net not in TRUNKS:
        raise ValueError(f"unknown trunk {net!r}; expected one of {', '.join(TRUNKS)}")
    return TRUNKS[net]


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling by our own kernel on the CPU and on CUDA, which needs no tensor of indices."""

    def forward(self, input: Tensor) -> Tensor:
        if not ops.is_eager() or not ops.has_trunk_kernels(input.device):
            return super().forward(input)
        # Without cuDNN, and in float64, convolutions on CUDA return channels-first.
        if input.is_cuda and not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        return torch.ops.lpips_fast.max_pool2d(input, self.kernel_size, self.stride, self.ceil_mode)

    def input_gradient(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """On the CPU, without a graph: the gradient to ``x``, of which ``y`` was made."""
        operator = torch.ops.lpips_fast.max_pool2d_backward
        return operator(grad, x, y, self.kernel_size, self.stride)


class Slice(nn.Sequential):
    """The layers between two taps. A convolution and the ReLU behind it run as one.

    The first slice lets NaN through, so that a NaN in an image reaches the distance by its tap.
    """

    def __init__(self, keep_nan: bool) -> None:
        super().__init__()
        self.keep_nan = keep_nan

    def _steps(self) -> Iterator[nn.Module]:
        """The layers, a convolution standing for its ReLU too: each is followed by one."""
        return (layer for layer in self if not isinstance(layer, nn.ReLU))

    def forward(self, input: Tensor) -> Tensor:
        return self.consume([input])

    def consume(self, held: list[Tensor]) -> Tensor:
        """:meth:`forward`, taking the images out of a list: their memory goes back when used."""
        x = held.pop()
        for layer in self._steps():
            x = conv_relu(layer, x, self.keep_nan) if isinstance(layer, nn.Conv2d) else layer(x)
        return x

    def is_hooked(self) -> bool:
        """Whether somebody waits for the module to be called."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def record(self, x: Tensor) -> list[Tensor]:
        """:meth:`forward` without a graph: what every layer made, the result last."""
        made: list[Tensor] = []
        for layer in self._steps():
            if isinstance(layer, FireModule):
                made += layer.record(x)
            elif isinstance(layer, nn.Conv2d):
                made.append(convolve(layer, x, self.keep_nan))
            else:
                made.append(layer(x))
            x = made[-1]
        return made

    def input_gradient(self, grad: Tensor, x: Tensor, made: Sequence[Tensor]) -> Tensor:
        """The gradient to ``x``, without a graph.

        One hand-written backward instead of a node of autograd for every layer: at small images
        the nodes take longer than the convolutions.

        Args:
            grad: the gradient to the result before its ReLU.
            x, made: images and what :meth:`record` made of them.
        """
        steps, left = list(self._steps()), [x, *made]
        for k in range(len(steps) - 1, -1, -1):
            layer, result = steps[k], left.pop()
            through_relu = k > 0 and not isinstance(steps[k - 1], MaxPool2d)
            if isinstance(layer, FireModule):
                squeezed = left.pop()
                grad = layer.input_gradient(grad, left[-1], squeezed, through_relu)
            elif isinstance(layer, MaxPool2d):
                grad = layer.input_gradient(grad, left[-1], result)
            else:
                assert isinstance(layer, nn.Conv2d)
                grad = input_gradient(layer, grad, left[-1], through_relu)
        return grad


def _module(layer: Layer, in_channels: int) -> tuple[nn.Module, int]:
    match layer:
        case Conv(channels, kernel, stride, padding):
            return nn.Conv2d(in_channels, channels, kernel, stride, padding), channels
        case ReLU():
            return nn.ReLU(inplace=True), in_channels
        case MaxPool(kernel, stride, ceil_mode):
            return MaxPool2d(kernel, stride, ceil_mode=ceil_mode), in_channels
        case Fire(squeeze, expand):
            return FireModule(in_channels, squeeze, expand), 2 * expand
    raise TypeError(f"not a layer of a trunk: {layer!r}")


class Trunk(nn.Module):
    """A frozen convolutional network that returns its taps.

    Args:
        net: a key of :data:`TRUNKS`.
        state_dict: ``features.N.…`` weights with torchvision's names
            (:func:`lpips_fast.weights.load_trunk_weights`), or ``None`` for random ones, drawn as
            torchvision draws them.
        requires_grad: whether the weights learn.

    Weights and activations are kept channels-last, the order in which both the convolutions and
    the distance that follows are fastest.

    >>> taps = Trunk("alex")(torch.zeros(1, 3, 64, 64))
    >>> taps._fields, taps.relu1.shape
    (('relu1', 'relu2', 'relu3', 'relu4', 'relu5'), torch.Size([1, 64, 15, 15]))
    """

    def __init__(
        self, net: str, state_dict: dict[str, Tensor] | None = None, requires_grad: bool = False
    ) -> None:
        super().__init__()
        spec = trunk_spec(net)
        self.net_name = net
        self.N_slices = len(spec.taps)
        self._outputs = namedtuple("TrunkOutputs", spec.taps)  # type: ignore[misc]
        channels, first = IMAGE_CHANNELS, 0
        for number, last in enumerate(spec.taps.values(), start=1):
            block = Slice(keep_nan=number == 1)
            for index in range(first, last + 1):
                module, channels = _module(spec.layers[index], channels)
                block.add_module(str(index), module)
            self.add_module(f"slice{number}", block)
            first = last + 1
        self._convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        if state_dict is not None:
            self.load_features(state_dict)
        elif spec.initialize is not None:
            for conv in self._convolutions:
                spec.initialize(conv.weight)
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.requires_grad_(requires_grad)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The outputs' class is made from the table and so cannot be pickled by name.
        state = {k: v for k, v in self.__dict__.items() if k != "_outputs"}
        return _restore_trunk, (type(self), state)

    def slices(self) -> list[Slice]:
        return [getattr(self, f"slice{number}") for number in range(1, self.N_slices + 1)]

    def learns(self) -> bool:
        """Whether any of its weights needs a gradient."""
        return any(p.requires_grad for c in self._convolutions for p in (c.weight, c.bias))  # type: ignore[union-attr]

    def records(self, x: Tensor) -> bool:
        """Whether ``record`` and ``input_gradient`` of its slices take scaled images ``x``.

        They do not call modules one by one: where somebody hooks into a slice, it is called.
        """
        if self.learns() or any(block.is_hooked() for block in self.slices()):
            return False
        return is_frozen_on_cpu(self._convolutions[0], x)

    def load_features(self, state_dict: dict[str, Tensor]) -> None:
        """Loads weights with torchvision's names, ``features.N.…``."""
        slice_of = {
            index: f"slice{number}"
            for number, block in enumerate(self.slices(), start=1)
            for index in block._modules
        }
        renamed = {}
        for key, value in state_dict.items():
            index = key.split(".")[1]
            renamed[f"{slice_of[index]}.{key.removeprefix('features.')}"] = value
        self.load_state_dict(renamed)

    def taps(
        self, x: Tensor, checkpoint: bool = False, layers: Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """The taps of scaled images (N, 3, H, W) one after the other.

        A tap that the caller lets go of is kept no longer than the next slice needs it.

        Args:
            checkpoint: keep only the taps for backward, and recompute what lies between them.
            layers: which taps, ascending; ``None``: all. Nothing behind the last of them runs.
        """
        wanted = range(self.N_slices) if layers is None else layers
        held = [x.contiguous(memory_format=torch.channels_last)]
        del x
        for layer, block in enumerate(self.slices()[: wanted[-1] + 1]):
            if checkpoint and torch.is_grad_enabled():
                held = [torch.utils.checkpoint.checkpoint(block, held.pop(), use_reentrant=False)]
            elif torch.is_grad_enabled() or not ops.is_eager() or block.is_hooked():
                held = [block(held.pop())]
            else:
                held = [block.consume(held)]
            if layer in wanted:
                yield held[0]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Taps of scaled images.

        Args:
            x: (N, 3, H, W), as :class:`lpips_fast.ScalingLayer` returns it.

        Returns:
            A named tuple, one tensor (N, C_l, H_l, W_l) per tap.
        """
        return self._outputs(*self.taps(x))


def _restore_trunk(cls: type[Trunk], state: dict[str, Any]) -> Trunk:
    trunk = cls.__new__(cls)
    trunk.__dict__.update(state)
    trunk._outputs = namedtuple("TrunkOutputs", TRUNKS[trunk.net_name].taps)  # type: ignore[misc]
    return trunk


def feature_shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a trunk, with torchvision's names.

    >>> feature_shapes("alex")["features.0.weight"]
    (64, 3, 11, 11)
    """
    shapes, channels = {}, IMAGE_CHANNELS
    for index, layer in enumerate(trunk_spec(net).layers):
        with torch.device("meta"):
            module, channels = _module(layer, channels)
        for name, value in module.state_dict().items():
            shapes[f"features.{index}.{name}"] = tuple(value.shape)
    return shapes


def tap_channels(net: str) -> list[int]:
    """Channels of every tap, in order.

    >>> tap_channels("squeeze")
    [64, 128, 256, 384, 384, 512, 512]
    """
    spec, channels, per_layer = trunk_spec(net), IMAGE_CHANNELS, []
    for layer in spec.layers:
        match layer:
            case Conv():
                channels = layer.channels
            case Fire():
                channels = 2 * layer.expand
        per_layer.append(channels)
    return [per_layer[index] for index in spec.taps.values()]


def _output_size(layer: Layer, size: int) -> int:
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
        height, width = _output_size(layer, height), _output_size(layer, width)
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
            remaining = _output_size(layer, remaining) if remaining > 0 else 0
        if remaining > 0:
            return size
    raise AssertionError("unreachable")
