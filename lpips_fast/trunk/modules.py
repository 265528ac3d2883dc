"""The module that runs a trunk.

The layers of :data:`~lpips_fast.trunk.TRUNKS` are grouped into ``slice1``, ``slice2``, … at the
taps, as in the ``lpips`` package, so that its checkpoints load.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .. import kernels
from ..kernels.max_pool import CONVOLUTION, FIRE, POOLING
from .convolution import conv_relu, convolve, input_gradient, is_frozen_on_cpu
from .fire import FireModule
from .table import IMAGE_CHANNELS, TRUNKS, Conv, Fire, Layer, MaxPool, ReLU, trunk_spec


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling by our own kernel on the CPU and on CUDA, which needs no tensor of indices.

    ``keys`` say which positions are equal but for rounding (:meth:`Trunk.receptive_fields`): of
    these the first of a window gets its gradient.
    """

    def forward(self, input: Tensor, keys: Tensor | None = None) -> Tensor:
        if not kernels.is_eager() or not kernels.has_trunk_kernels(input.device):
            return super().forward(input)
        # Without cuDNN, and in float64, convolutions on CUDA return channels-first.
        if input.is_cuda and not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        return torch.ops.lpips_fast.max_pool2d(
            input, self.kernel_size, self.stride, self.ceil_mode, keys
        )

    def input_gradient(
        self, grad: Tensor, x: Tensor, y: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """On the CPU, without a graph: the gradient to ``x``, of which ``y`` was made."""
        operator = torch.ops.lpips_fast.max_pool2d_backward
        return operator(grad, x, y, self.kernel_size, self.stride, keys)


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

    def forward(self, input: Tensor, keys: Sequence[Tensor] = ()) -> Tensor:
        return self.consume([input], keys)

    def consume(self, held: list[Tensor], keys: Sequence[Tensor] = ()) -> Tensor:
        """:meth:`forward`, taking the images out of a list: their memory goes back when used.

        Args:
            held: the images.
            keys: of their positions before every pooling, for the backward (see
                :meth:`Trunk.receptive_fields`).
        """
        x, keys_left = held.pop(), list(keys)
        for layer in self._steps():
            if isinstance(layer, nn.Conv2d):
                x = conv_relu(layer, x, self.keep_nan)
            elif keys_left and isinstance(layer, MaxPool2d):
                x = layer(x, keys_left.pop(0))
            else:
                x = layer(x)
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

    def input_gradient(
        self, grad: Tensor, x: Tensor, made: Sequence[Tensor], keys: Sequence[Tensor] = ()
    ) -> Tensor:
        """The gradient to ``x``, without a graph.

        One hand-written backward instead of a node of autograd for every layer: at small images
        the nodes take longer than the convolutions.

        Args:
            grad: the gradient to the result before its ReLU.
            x, made: images and what :meth:`record` made of them.
            keys: as :meth:`consume` takes them.
        """
        steps, left, keys_left = list(self._steps()), [x, *made], list(keys)
        for k in range(len(steps) - 1, -1, -1):
            layer, result = steps[k], left.pop()
            through_relu = k > 0 and not isinstance(steps[k - 1], MaxPool2d)
            if isinstance(layer, FireModule):
                squeezed = left.pop()
                grad = layer.input_gradient(grad, left[-1], squeezed, through_relu)
            elif isinstance(layer, MaxPool2d):
                key = keys_left.pop() if keys_left else None
                grad = layer.input_gradient(grad, left[-1], result, key)
            else:
                assert isinstance(layer, nn.Conv2d)
                grad = input_gradient(layer, grad, left[-1], through_relu)
        return grad


def _receptive_geometry(layer: nn.Module) -> list[int] | None:
    """A layer as the operator ``receptive_fields`` takes it; None where it may do anything."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if type(layer) in (nn.ReLU, Slice):
        return []
    if type(layer) is MaxPool2d and not layer.padding and layer.dilation == 1:
        return [POOLING, int(layer.kernel_size), int(layer.stride), int(layer.ceil_mode)]
    if type(layer) is FireModule:  # its 1x1 convolutions see what they are given
        squeeze, narrow, wide = (_receptive_geometry(conv) for conv in layer.children())
        pointwise = [CONVOLUTION, 1, 1, 0]
        return [FIRE, *wide[1:]] if squeeze == narrow == pointwise and wide else None
    if type(layer) is nn.Conv2d and layer.dilation == (1, 1):
        kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
        if kernel[0] == kernel[1] and stride[0] == stride[1] and padding[0] == padding[1]:
            return [CONVOLUTION, kernel[0], stride[0], int(padding[0])]
    return None


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

    def receptive_fields(self, x: Tensor, slices: int | None = None) -> list[list[Tensor]]:
        """Which positions before a max-pooling look at the same picture, for its backward.

        Where an image is flat, padded or periodic, positions are equal in exact arithmetic and
        max-pooling's gradient belongs to the first of them, but rounding makes one of them the
        largest. They are told by what they see: a key for every position, a hash of the bits in
        its receptive field. So it does not matter how rounding falls.

        Args:
            x: scaled images (N, 3, H, W).
            slices: of how many, from the first on; ``None``: all.

        Returns:
            For every slice, int64 keys (N, groups of channels, H_l, W_l) for every pooling in it. Empty
            where equal pictures need not give equal values, or nothing is known of them: where
            somebody hooks into the trunk or replaced a layer, on other devices than the CPU, and
            where there is no call to serve (see :func:`lpips_fast.kernels.is_eager`).
        """
        blocks = self.slices()[:slices]
        nothing: list[list[Tensor]] = [[] for _ in blocks]
        if x.device.type != "cpu" or not kernels.is_eager() or type(x) is not Tensor:
            return nothing
        geometry: list[int] = []
        poolings, last = [0] * len(blocks), 0
        for number, block in enumerate(blocks):
            for layer in (block, *block):
                found = _receptive_geometry(layer)
                if found is None:
                    return nothing
                geometry += found
                if isinstance(layer, MaxPool2d):
                    poolings[number] += 1
                    last = len(geometry)
        keys = iter(torch.ops.lpips_fast.receptive_fields(x.detach(), geometry[:last]))
        return [[next(keys) for _ in range(count)] for count in poolings]

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
        has_graph = torch.is_grad_enabled() and (x.requires_grad or self.learns())
        keys = self.receptive_fields(held[0], wanted[-1] + 1) if has_graph else None
        del x
        for layer, block in enumerate(self.slices()[: wanted[-1] + 1]):
            if keys is not None and keys[layer] and not checkpoint:
                held = [block(held.pop(), keys[layer])]
            elif checkpoint and torch.is_grad_enabled():
                arguments = (held.pop(), keys[layer]) if keys and keys[layer] else (held.pop(),)
                held = [torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)]
            elif torch.is_grad_enabled() or not kernels.is_eager() or block.is_hooked():
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
