"""LPIPS, several times faster: ``import lpips_fast as lpips`` and go on."""

from . import functional, pairwise
from .compat import (
    DSSIM,
    L2,
    BCERankingLoss,
    Dist2LogitLayer,
    FakeNet,
    dssim,
    im2tensor,
    l2,
    load_image,
    np2tensor,
    print_network,
    psnr,
    rgb2lab,
    tensor2im,
    tensor2np,
    tensor2tensorlab,
    tensor2vec,
    tensorlab2tensor,
    voc_ap,
)
from .features import Features
from .lpips import LPIPS, NetLinLayer, ScalingLayer, spatial_average, upsample
from .normalization import NORMALIZATIONS, normalize_features, normalize_tensor

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Not needed to measure a distance, and so not loaded with the package.
    if name == "recommend_trunk":
        from .recommendation import recommend_trunk

        return recommend_trunk
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DSSIM",
    "L2",
    "LPIPS",
    "NORMALIZATIONS",
    "BCERankingLoss",
    "Dist2LogitLayer",
    "FakeNet",
    "Features",
    "NetLinLayer",
    "ScalingLayer",
    "dssim",
    "functional",
    "im2tensor",
    "l2",
    "load_image",
    "normalize_features",
    "normalize_tensor",
    "np2tensor",
    "pairwise",
    "print_network",
    "psnr",
    "recommend_trunk",
    "rgb2lab",
    "spatial_average",
    "tensor2im",
    "tensor2np",
    "tensor2tensorlab",
    "tensor2vec",
    "tensorlab2tensor",
    "upsample",
    "voc_ap",
]
