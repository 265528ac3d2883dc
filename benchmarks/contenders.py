"""The packages that are compared, all with the same weights.

Each is built by its own constructor and computes by its own code; only the loading of weights is
replaced, since an official checkpoint may not be at hand and speed does not depend on its values.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import lpips_fast

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.append(str(TESTS))

import parity  # noqa: E402  (of the tests: weights and images, the same in all packages)

OTHERS = ("lpips", "torchmetrics", "piq")


class UnavailableError(Exception):
    """A package cannot take part; the message says why."""


def image_pair(batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An image and a distorted copy, (batch, 3, height, width) in [-1, 1], float32."""
    image0, image1 = parity.image_pair(batch, height, width, torch.float32, seed=0)
    return image0.to(device), image1.to(device)


@functools.cache
def trunk_weights(net: str) -> dict[str, Tensor]:
    """Random weights that keep activations in range, with torchvision's names."""
    return parity.trunk_weights(net)


def build_ours(
    net: str,
    device: torch.device,
    spatial: bool = False,
    dtype: torch.dtype | None = None,
) -> lpips_fast.LPIPS:
    """A frozen :class:`lpips_fast.LPIPS`."""
    model = lpips_fast.LPIPS(
        net=net, weights=trunk_weights(net), spatial=spatial, dtype=dtype, verbose=False
    )
    return model.requires_grad_(False).to(device)


@functools.cache
def build_other(package: str, net: str, device: torch.device, spatial: bool = False) -> nn.Module:
    """The frozen LPIPS of another package, called as ``model(image0, image1)`` in [-1, 1].

    Frozen in full, since a package that also differentiated its linear weights would do more work.

    Raises:
        UnavailableError: it is not installed, or has no such thing.
    """
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")
    _declare_torchvision_operators()
    builder = {"lpips": _original, "torchmetrics": _torchmetrics, "piq": _piq}[package]
    return builder(net, spatial).requires_grad_(False).eval().to(device)


def _original(net: str, spatial: bool) -> nn.Module:
    import lpips

    model = lpips.LPIPS(net=net, spatial=spatial, pnet_rand=True, verbose=False)
    _load_convolutions(model.net, trunk_weights(net))
    return model


def _torchmetrics(net: str, spatial: bool) -> nn.Module:
    # What LearnedPerceptualImagePatchSimilarity holds as its `net`.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    model = _NoTrainLpips(net=net, spatial=spatial, pnet_rand=True)
    _load_convolutions(model.net, trunk_weights(net))
    return model


class _UnitRange(nn.Module):
    """piq.LPIPS takes [0, 1]; the conversion is a part of using it on images in [-1, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image0: Tensor, image1: Tensor) -> Tensor:
        return self.model((image0 + 1) / 2, (image1 + 1) / 2)


def _piq(net: str, spatial: bool) -> nn.Module:
    if net != "vgg" or spatial:
        raise UnavailableError("piq has LPIPS for vgg only, and no distance maps")
    import piq
    import torchvision

    lin = lpips_fast.weights.load_lin_weights(net, "0.1")

    def random_trunk(**_: object) -> nn.Module:
        return torchvision.models.vgg16(weights=None, init_weights=False)

    with (
        mock.patch("torch.hub.load_state_dict_from_url", return_value=list(lin.values())),
        mock.patch("piq.perceptual.vgg16", random_trunk),
    ):
        model = piq.LPIPS(reduction="none")
    _load_convolutions(model.model, trunk_weights(net))
    return _UnitRange(model)


def _load_convolutions(trunk: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fills convolutions in their order, which is the same whatever a package calls them."""
    convolutions = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    values = iter(weights.values())
    with torch.no_grad():
        for convolution in convolutions:
            for parameter in (convolution.weight, convolution.bias):
                assert parameter is not None
                value = next(values)
                assert value.shape == parameter.shape, (value.shape, parameter.shape)
                parameter.copy_(value)
    assert next(values, None) is None


def _declare_torchvision_operators() -> None:
    # By path: pytest has a `conftest` of its own in every folder.
    name = "lpips_fast_tests_conftest"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / "conftest.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    sys.modules[name].declare_torchvision_operators()
