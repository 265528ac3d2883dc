"""Many images against many: all pairs, nearest neighbours, vectors for an index.

One trunk pass an image instead of one a pair. :mod:`.all_pairs` compares, :mod:`.memory_plan`
decides what is kept in memory, :mod:`.embedding` makes vectors, :mod:`.sources` are the images.
"""

from .all_pairs import (
    DEFAULT_MEMORY_LIMIT,
    NEAR,
    RELATIVE_ERROR,
    Plan,
    mean_diversity,
    nearest,
    pairwise,
    plan,
)
from .embedding import Embedding, embed, embedding_size, euclidean_weights
from .sources import Images

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "NEAR",
    "RELATIVE_ERROR",
    "Embedding",
    "Images",
    "Plan",
    "embed",
    "embedding_size",
    "euclidean_weights",
    "mean_diversity",
    "nearest",
    "pairwise",
    "plan",
]
