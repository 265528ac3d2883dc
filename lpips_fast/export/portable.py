"""LPIPS in torch's standard operators alone, for every runtime that knows no operator of ours.

The same formulas from the same weights as :class:`lpips_fast.LPIPS`: scaling, trunk, normalised
features, weighted squared difference, mean or map. No kernel of this package, no memory format, no
in-place operation, no branch that depends on a size: what an exporter or a tracer sees is a plain
graph that holds for every batch, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..lpips import LPIPS, upsample
from ..normalization import LEARNED, LearnedNorm, Normalization, depends_on_batch
from ..trunk.fire import FireModule
from ..trunk.max_pool import padded_max_pool
from ..trunk.table import tap_shapes


class PortableLPIPS(nn.Module):
    """A frozen copy of a model that exporters understand.

    Args:
        model: a float32 :class:`lpips_fast.LPIPS`. It is copied to the CPU as it evaluates (without
            dropout), and keeps its ``net``, ``version``, ``lpips``, ``spatial``, ``normalization``
            and ``layers``.
        normalize: images are in [0, 1] instead of [-1, 1]. It costs nothing: the factor is folded
            into the scaling.
        fused: keep this package's operator for the distance. What then runs the graph must have
            imported :mod:`lpips_fast`.
        batch, image_size: the only number of pairs, and the only (height, width), where an exporter
            is to see them as constants; ``None``: any.

    Raises:
        TypeError: the model is no LPIPS, or not float32.
        ValueError: the model has a ``reduction``.

    Attributes:
        trunk_layers: what the trunk runs, slice by slice, up to the last compared layer.

    >>> model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    >>> portable = PortableLPIPS(model)
    >>> portable(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    tensor([0., 0.])
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        model: LPIPS,
        *,
        normalize: bool = False,
        fused: bool = False,
        batch: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check(model)
        self.batch, self.image_size = batch, image_size
        self.layers = model.layers
        self.spatial = model.spatial
        self.normalization = model.normalization
        self.fused = fused
        shift, scale = model.scaling_layer.shift.cpu(), model.scaling_layer.scale.cpu()
        if model.version == "0.0":  # the first release fed images to the trunk as they are
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        if normalize:  # (2x - 1 - shift) / scale
            shift, scale = (1 + shift) / 2, scale / 2
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())
        self.trunk_layers = nn.ModuleList(
            _plain_slice(block) for block in model.net.slices()[: self.layers[-1] + 1]
        )
        self.norms = nn.ModuleDict()
        if model.normalization == LEARNED:
            self.norms.update({str(k): _plain_norm(model.norms[k]) for k in self.layers})
        for k in self.layers:
            weight = model.layer_weight(k).detach().cpu().clone()
            self.register_buffer(f"weight{k}", weight)
        self.requires_grad_(False)
        self.eval()

    def forward(self, in0: Tensor, in1: Tensor) -> Tensor:
        """Distances of pairs of images.

        Args:
            in0, in1: (N, 3, H, W) float32, RGB, in [-1, 1] or, with ``normalize``, in [0, 1].

        Returns:
            (N,), or for a ``spatial`` model maps (N, 1, H, W).
        """
        batch = self.batch or in0.shape[0]
        height, width = self.image_size or (in0.shape[2], in0.shape[3])
        x = (torch.cat((in0, in1)) - self.shift) / self.scale
        total: Tensor | None = None
        for k, layers in enumerate(self.trunk_layers):
            x = layers(x)
            if k not in self.layers:
                continue
            part = self._distance(x, batch, k)
            if self.spatial:
                part = upsample(part, (height, width))
            total = part if total is None else total + part
        assert total is not None
        return total

    def _distance(self, tap: Tensor, batch: int, layer: int) -> Tensor:
        """One layer's distances (N,) or maps (N, 1, h, w), from the tap of both images."""
        weight = getattr(self, f"weight{layer}")
        normalization: Normalization
        if self.normalization == LEARNED:
            tap, normalization = self.norms[str(layer)](tap), "none"
        else:
            normalization = self.normalization
        if self.fused:
            pair, options = ([tap[:batch]], [tap[batch:]], [weight]), normalization
            if self.spatial:
                return functional.distance_map(*pair, normalization=options)[0]
            return functional.distance(*pair, normalization=options)[:, 0]
        # composed.distance_map, with both images normalised at once: half as many nodes.
        if depends_on_batch(normalization):
            sides = (tap[:batch], tap[batch:])
            normal = torch.cat([functional.normalize_features(x, normalization) for x in sides])
        else:
            normal = functional.normalize_features(tap, normalization)
        difference = normal[:batch] - normal[batch:]
        weighted = weight.view(1, -1, 1, 1) * difference**2
        distance_map = torch.sum(weighted, dim=1, keepdim=True)
        return distance_map if self.spatial else distance_map.mean(dim=(1, 2, 3))


class _Fire(nn.Module):
    def __init__(self, fire: FireModule) -> None:
        super().__init__()
        self.squeeze = _plain_convolution(fire.squeeze)
        self.expand1x1 = _plain_convolution(fire.expand1x1)
        self.expand3x3 = _plain_convolution(fire.expand3x3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        expanded = torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))
        return torch.cat(expanded, dim=1)


class _PaddedMaxPool(nn.Module):
    """Max-pooling behind a ReLU that rounds sizes up, as one that rounds them down."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return padded_max_pool(x, self.kernel, self.stride, value=0.0)


def _plain_norm(norm: nn.Module) -> LearnedNorm:
    assert isinstance(norm, LearnedNorm)
    plain = LearnedNorm(norm.channels)
    plain.load_state_dict({name: p.detach().cpu() for name, p in norm.named_parameters()})
    return plain


def _plain_slice(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(_plain_layer(layer) for layer in block.children()))


def _plain_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return _plain_convolution(layer)
    if isinstance(layer, FireModule):
        return _Fire(layer)
    if isinstance(layer, nn.MaxPool2d):
        kernel, stride = int(layer.kernel_size), int(layer.stride)  # type: ignore[arg-type]
        return _PaddedMaxPool(kernel, stride) if layer.ceil_mode else nn.MaxPool2d(kernel, stride)
    assert isinstance(layer, nn.ReLU)
    return nn.ReLU()


def _plain_convolution(conv: nn.Conv2d) -> nn.Conv2d:
    assert conv.bias is not None
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
    )
    plain.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias.detach()})
    return plain


def _check(model: LPIPS) -> None:
    if not isinstance(model, LPIPS):
        raise TypeError(f"expected a lpips_fast.LPIPS to export, got {type(model).__name__}")
    dtypes = {str(t.dtype) for t in (*model.parameters(), model.scaling_layer.shift)}
    if dtypes != {"torch.float32"}:
        raise TypeError(
            f"the model is {' and '.join(sorted(dtypes))}, and only float32 is exported: make it "
            "without dtype=, or convert it with .float(); runtimes lower precision themselves"
        )
    if model.reduction != "none":
        raise ValueError(
            f"the model has reduction={model.reduction!r}, but an exported one gives a distance "
            "a pair: make it with reduction='none'"
        )


def smallest_dynamic_size(model: LPIPS) -> int:
    """The smallest height and width of a graph of any size, in pixels.

    An exporter takes an axis of length 1 to be of length 1 always, so that every compared tap has
    two positions a side at least.

    >>> smallest_dynamic_size(LPIPS(net="alex", pnet_rand=True, verbose=False))
    47
    """
    size = model.minimum_size
    last = model.layers[-1]
    while any(min(h, w) < 2 for _, h, w in tap_shapes(model.net_name, (size, size))[: last + 1]):
        size += 1
    return size
