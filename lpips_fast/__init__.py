"""LPIPS, several times faster: ``import lpips_fast as lpips`` and go on.

The metric is loaded with the package. What stands on it (all pairs, folders, learning, analysis,
export and the rest) is loaded when it is first named: ``lpips_fast.metrics.LPIPSMetric`` needs no
import of its own.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import functional, pretrained_networks
from . import pretrained_networks as pn
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
from .version import __version__

if TYPE_CHECKING:
    from . import (
        analysis,
        choice,
        export,
        fidelity,
        folders,
        images,
        judgements,
        metrics,
        pairs,
        pairwise,
        plots,
        trainer,
        training,
        trunk,
        weights,
    )
    from .choice import recommend_trunk
    from .compare_images import compare
    from .evaluate_folders import evaluate
    from .judgements import score_2afc_dataset, score_jnd_dataset
    from .trainer import Trainer

# Not needed to measure a distance, and so not loaded with the package.
_LATE_MODULES = frozenset(
    {
        "analysis",
        "choice",
        "export",
        "fidelity",
        "folders",
        "images",
        "judgements",
        "metrics",
        "pairs",
        "pairwise",
        "plots",
        "trainer",
        "training",
        "trunk",
        "weights",
    }
)
_LATE_NAMES = {
    "Trainer": "trainer",
    "compare": "compare_images",
    "evaluate": "evaluate_folders",
    "recommend_trunk": "choice",
    "score_2afc_dataset": "judgements",
    "score_jnd_dataset": "judgements",
}


def __getattr__(name: str) -> object:
    if name in _LATE_MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _LATE_NAMES:
        return getattr(import_module(f"{__name__}.{_LATE_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


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
    "Trainer",
    "__version__",
    "analysis",
    "choice",
    "compare",
    "dssim",
    "evaluate",
    "export",
    "fidelity",
    "folders",
    "functional",
    "im2tensor",
    "images",
    "judgements",
    "l2",
    "load_image",
    "metrics",
    "normalize_features",
    "normalize_tensor",
    "np2tensor",
    "pairs",
    "pairwise",
    "plots",
    "pn",
    "pretrained_networks",
    "print_network",
    "psnr",
    "recommend_trunk",
    "rgb2lab",
    "score_2afc_dataset",
    "score_jnd_dataset",
    "spatial_average",
    "tensor2im",
    "tensor2np",
    "tensor2tensorlab",
    "tensor2vec",
    "tensorlab2tensor",
    "trainer",
    "training",
    "trunk",
    "upsample",
    "voc_ap",
    "weights",
]
