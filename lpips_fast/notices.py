"""Warnings of what is seen in values: when they may be looked at, and whose line is named."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import kernels
from .features import Features


def may_read_values() -> bool:
    """Whether Python may look at values: eagerly, and while no CUDA graph is captured."""
    return kernels.is_eager() and not (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def level_of_the_caller() -> int:
    """``stacklevel`` of a warning: that of the first frame outside this package and torch."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


class RangeNotice:
    """Looks at the first images of a model, and warns once of a range that is surely wrong.

    Values from 0 to 255, or both images in [0, 1] without ``normalize``, give numbers that look
    right and are not. Outputs of networks overshoot, so nothing is said of a little more than 1.
    One holder serves a model, its copies and its replicas.
    """

    def __init__(self) -> None:
        self.has_looked = False

    def __deepcopy__(self, memo: dict[int, object]) -> RangeNotice:
        return self

    def look(self, pair: Sequence[Tensor | Features], normalize: bool) -> None:
        """The first time, and only in an eager call: on GPUs it costs a synchronisation."""
        # Compiled code is not to depend on what is noted here.
        if torch.compiler.is_compiling() or self.has_looked or not may_read_values():
            return
        images = [x for x in pair if isinstance(x, Tensor) and type(x) in (Tensor, nn.Parameter)]
        if len(images) < len(pair) or any(x.numel() == 0 or x.is_meta for x in images):
            return
        self.has_looked = True
        limits = [tuple(v.item() for v in torch.aminmax(x.detach())) for x in images]
        low, high = min(a for a, _ in limits), max(b for _, b in limits)
        expected = "[0, 1]" if normalize else "[-1, 1]"
        text = None
        if max(-low, high) > 2:
            text = f"expected {expected}; take 8-bit images there by x / 127.5 - 1"
        elif not normalize and all(a >= 0 and b - a > 0.5 for a, b in limits):
            text = "expected [-1, 1]; if they are images in [0, 1], pass normalize=True"
        if text is not None:
            warnings.warn(
                f"the images have values from {low:.4g} to {high:.4g}, {text} "
                "(check_inputs=False: never look)",
                stacklevel=level_of_the_caller(),
            )
