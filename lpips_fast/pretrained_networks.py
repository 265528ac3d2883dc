"""The trunks by the names of the original's ``pretrained_networks``: ``lpips.pn.alexnet`` and more.

For scripts that take features by hand. The classes are :class:`~lpips_fast.trunk.Trunk` with the
original's arguments: the same slices, keys and named outputs, and the same fast path.
"""

from __future__ import annotations

from collections import namedtuple

from torch import Tensor, nn

from .trunk import Trunk
from .weights import load_trunk_weights

__all__ = ["alexnet", "resnet", "squeezenet", "vgg16"]


class _PretrainedTrunk(Trunk):
    """A trunk of the table, by the original's arguments."""

    _net: str

    def __init__(self, requires_grad: bool = False, pretrained: bool = True) -> None:
        super().__init__(
            self._net, load_trunk_weights(self._net) if pretrained else None, requires_grad
        )


class alexnet(_PretrainedTrunk):
    """AlexNet's taps ``relu1`` … ``relu5``.

    Args:
        requires_grad: whether the weights learn.
        pretrained: ImageNet's weights, searched as for :class:`lpips_fast.LPIPS`, or random ones.

    ``forward`` takes (N, 3, H, W), as :class:`lpips_fast.ScalingLayer` returns it, and returns a
    named tuple.

    >>> import torch
    >>> alexnet(pretrained=False)(torch.zeros(1, 3, 64, 64)).relu3.shape
    torch.Size([1, 384, 3, 3])
    """

    _net = "alex"


class vgg16(_PretrainedTrunk):
    """VGG16's taps ``relu1_2``, ``relu2_2``, ``relu3_3``, ``relu4_3``, ``relu5_3``.

    Arguments and ``forward`` are those of :class:`alexnet`.
    """

    _net = "vgg"


class squeezenet(_PretrainedTrunk):
    """SqueezeNet 1.1's taps ``relu1`` … ``relu7``.

    Arguments and ``forward`` are those of :class:`alexnet`.
    """

    _net = "squeeze"


_RESNETS = (18, 34, 50, 101, 152)
_ResNetOutputs = namedtuple("_ResNetOutputs", ["relu1", "conv2", "conv3", "conv4", "conv5"])


class resnet(nn.Module):
    """torchvision's ResNet up to its last block, which no version of LPIPS was learned on.

    Args:
        requires_grad: whether the weights learn; the original lets them learn whatever is said.
        pretrained: ImageNet's weights, which torchvision downloads, or random ones.
        num: 18, 34, 50, 101 or 152 layers.

    ``forward`` takes (N, 3, H, W), scaled, and returns a named tuple of ``relu1`` and ``conv2`` …
    ``conv5``. As in the original, batch norm is in training mode until ``eval()`` is called.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: another number of layers.
    """

    def __init__(self, requires_grad: bool = False, pretrained: bool = True, num: int = 18) -> None:
        super().__init__()
        if num not in _RESNETS:
            told = ", ".join(map(str, _RESNETS))
            raise ValueError(f"there is no ResNet of {num} layers; expected one of {told}")
        try:
            from torchvision import models
        except ImportError as error:
            raise ImportError("the ResNets are torchvision's: pip install torchvision") from error
        make = getattr(models, f"resnet{num}")
        self.net = make(weights="IMAGENET1K_V1" if pretrained else None)
        self.N_slices = 5
        # The same modules by the names that the original gives them.
        self.conv1, self.bn1, self.relu = self.net.conv1, self.net.bn1, self.net.relu
        self.maxpool, self.layer1, self.layer2 = (
            self.net.maxpool,
            self.net.layer1,
            self.net.layer2,
        )
        self.layer3, self.layer4 = self.net.layer3, self.net.layer4
        self.requires_grad_(requires_grad)

    def forward(self, X: Tensor) -> tuple[Tensor, ...]:
        """The five taps of scaled images (N, 3, H, W)."""
        taps = [self.relu(self.bn1(self.conv1(X)))]
        taps.append(self.layer1(self.maxpool(taps[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            taps.append(layer(taps[-1]))
        return _ResNetOutputs(*taps)
