"""The path of version 0.1 to :mod:`lpips_fast.pairs`: all pairs and nearest neighbours."""

from .pairs.all_pairs import (
    DEFAULT_MEMORY_LIMIT,
    NEAR,
    RELATIVE_ERROR,
    Plan,
    mean_diversity,
    nearest,
    pairwise,
    plan,
)

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "NEAR",
    "RELATIVE_ERROR",
    "Plan",
    "mean_diversity",
    "nearest",
    "pairwise",
    "plan",
]
