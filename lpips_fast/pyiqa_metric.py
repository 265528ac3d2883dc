"""LPIPS as metrics of pyiqa (IQA-PyTorch), with every network: :data:`NAMES`.

Importing this module registers them, beside pyiqa's own ``lpips``. pyiqa is installed by itself:
``pip install pyiqa``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lpips import LPIPS

try:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.utils.registry import ARCH_REGISTRY
except ImportError as error:
    raise ImportError("the metrics of pyiqa need pyiqa: pip install pyiqa") from error

__all__ = ["NAMES", "FastLPIPS"]

#: The names for ``pyiqa.create_metric``, and their networks.
NAMES = {"lpips-fast": "alex", "lpips-fast-vgg": "vgg", "lpips-fast-squeeze": "squeeze"}


class FastLPIPS(torch.nn.Module):
    """:class:`LPIPS` as pyiqa calls a metric with a reference.

    Args:
        options: of :class:`LPIPS`, also through ``pyiqa.create_metric("lpips-fast", …)``; its
            weights stay as they are (``frozen``) unless ``frozen=False`` or ``pnet_tune=True``.

    >>> import pyiqa, lpips_fast.pyiqa_metric                     # doctest: +SKIP
    >>> metric = pyiqa.create_metric("lpips-fast")                # doctest: +SKIP
    >>> metric("examples/images/ex_p0.png", "examples/images/ex_ref.png")      # doctest: +SKIP
    tensor([[0.7219]])
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options.setdefault("frozen", not options.get("pnet_tune", False))
        options.setdefault("verbose", False)
        self.model = LPIPS(**options)

    def forward(
        self, in1: Tensor, in0: Tensor, retPerLayer: bool = False, normalize: bool = True
    ) -> Any:
        """The distance of images ``in1`` from references ``in0``, (N, 3 or 1, H, W) in [0, 1].

        Returns (N, 1), as pyiqa's own; (N, 1, H, W) with ``spatial=True``. With ``retPerLayer``
        that and a list of what each layer adds, both of four dimensions.
        """
        in0, in1 = (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (in0, in1))
        if retPerLayer:
            return self.model(in0, in1, retPerLayer=True, normalize=normalize)
        distance = self.model(in0, in1, normalize=normalize)
        return distance if self.model.spatial else distance.flatten(1)


def _register() -> None:
    if "FastLPIPS" not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(FastLPIPS)
    for name, net in NAMES.items():
        DEFAULT_CONFIGS[name] = {
            "metric_opts": {"type": "FastLPIPS", "net": net},
            "metric_mode": "FR",
            "lower_better": True,
            "score_range": "0, 1",
        }


_register()
