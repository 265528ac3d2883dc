"""Lighter trunks: channels that matter little removed, and what is left fitted to the whole metric.

    full = LPIPS(net="vgg")
    fitted_on, held_out = distorted_triplets(images, 64, 600), distorted_triplets(others, 64, 200)
    narrow = prune(full, fitted_on, keep=0.5)
    distill(narrow, full, fitted_on, steps=400)
    print(agreement(narrow, full, held_out))
    torch.save(narrow.state_dict(), "narrow.pth")
    LPIPS(net="vgg", model_path="narrow.pth")       # an ordinary trunk, with the fast path

:mod:`.pruning` removes channels, :mod:`.distillation` fits a student, :mod:`.triplets` makes what
both learn from, and :mod:`.agreement` says what is left of the metric. ``docs/compression.md`` has
what each is worth, and what was tried and is not here.
"""

from .agreement import Agreement, agreement, time_ratio
from .distillation import DistillationError, distill
from .pruning import channel_effects, prune
from .triplets import Triplets, distorted_triplets

__all__ = [
    "Agreement",
    "DistillationError",
    "Triplets",
    "agreement",
    "channel_effects",
    "distill",
    "distorted_triplets",
    "prune",
    "time_ratio",
]
