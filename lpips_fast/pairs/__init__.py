"""Many images against many: all pairs, nearest neighbours, vectors for an index.

One trunk pass an image instead of one a pair. :mod:`.all_pairs` compares, :mod:`.memory_plan`
decides what is kept in memory, :mod:`.trunk_share` shares the work among processes,
:mod:`.embedding` makes vectors, :mod:`.sources` are the images.
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
    serve_pairwise,
)
from .embedding import Embedding, embed, embedding_size, euclidean_weights
from .sources import Images
from .trunk_share import ShareError, TrunkShare

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "NEAR",
    "RELATIVE_ERROR",
    "Embedding",
    "Images",
    "Plan",
    "ShareError",
    "TrunkShare",
    "embed",
    "embedding_size",
    "euclidean_weights",
    "mean_diversity",
    "nearest",
    "pairwise",
    "plan",
    "serve_pairwise",
]
